"""Fine-tuning of a pretrained checkpoint on labelled data."""
