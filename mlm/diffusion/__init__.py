"""Masked diffusion: a language model that writes by unmasking, and whose loss bounds the likelihood of a text."""
