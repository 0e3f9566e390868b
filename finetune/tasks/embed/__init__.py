"""Bi-encoder embeddings of sentences."""
