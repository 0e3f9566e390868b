"""A reward model: how good a text is, or an answer to a prompt, learnt from which of two people prefer."""
