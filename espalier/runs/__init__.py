"""All runs of a folder, from their files alone: a table, a page, a page that follows those that go on (no JAX)."""
