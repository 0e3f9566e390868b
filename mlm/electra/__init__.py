"""Replaced-token detection (ELECTRA): a generator fills in masked tokens, a discriminator finds which it changed."""
