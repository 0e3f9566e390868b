"""One file a family: published model shapes as `ModelConfig` values."""
