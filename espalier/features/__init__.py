"""Sparse autoencoders: features of a language model's stream, and the texts that fire them."""
