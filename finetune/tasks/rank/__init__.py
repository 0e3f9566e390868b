"""Search relevance by cross-encoder: a query and a text are read together, and given a score."""
