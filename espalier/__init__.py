"""Espalier: language models pretrained, fine-tuned and looked into with JAX."""

from espalier import neighbours

__version__ = "0.1.0"

neighbours.take()
