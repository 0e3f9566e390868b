"""Multiple choice: the answer that a language model finds most likely."""
