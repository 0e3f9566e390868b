"""From text to batches: sources, tokenizer, token shards, packed rows, `batch(step)`."""
