"""`plan rollouts`: what drawing and learning from completions takes."""
