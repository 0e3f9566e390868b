"""The training loop and what it needs; it never learns what a transformer is."""
