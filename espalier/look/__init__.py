"""What a model attends to and why it says what it says: `./launch.sh look MODEL --text "…"` (docs/look.md)."""
