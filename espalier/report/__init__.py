"""A run as people read it: the HTML report, the model card, and tables for Python. Reads files alone, without JAX."""
