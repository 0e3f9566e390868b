"""Espalier: language models pretrained, fine-tuned and looked into with JAX."""
