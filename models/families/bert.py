"""BERT (Devlin et al. 2019): post-norm encoder, learned positions, exact GELU."""

from dataclasses import replace

from models.config import ModelConfig

BERT_BASE = ModelConfig(type_vocab_size=2)

BERT_LARGE = replace(BERT_BASE, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
