"""Classification of texts or pairs."""
