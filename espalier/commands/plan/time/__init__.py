"""How long a training step takes, by analysis, and how good that is against published runs."""
