"""One text from another: translation, summaries, corrections, by an encoder-decoder."""
