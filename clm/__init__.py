"""Causal-LM pretraining and generation."""
