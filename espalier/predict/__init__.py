"""What is asked of a model: labels, tags, answers, embeddings, texts. One file a question."""
