"""Nomic BERT (Nussbaum et al. 2024): BERT with rotary positions and SwiGLU, without biases in its layers."""

from dataclasses import replace
from typing import Any

from espalier.models.config import ModelConfig
from espalier.models.families import Family, read_rope, write_rope
from espalier.models.families.bert import BERT_BASE, CLASSIFIER, KEYS, POOLER
from espalier.models.families.bert import write as bert_write

NOMIC_BERT = replace(
    BERT_BASE,
    model_type="nomic_bert",
    vocab_size=30_528,
    hidden_act="silu",
    gated_mlp=True,
    attention_bias=False,
    mlp_bias=False,
    position_embedding="rotary",
    max_position_embeddings=2048,
    rope_theta=1000.0,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
"""nomic-embed-text v1.5."""


def _read(hf: Any) -> dict[str, Any]:
    usual = hf.hidden_size // hf.num_attention_heads
    return {"head_dim": None if hf.head_dim == usual else hf.head_dim, **read_rope(hf.rope_parameters)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return bert_write(config) | {"head_dim": config.head_size, "rope_parameters": write_rope(config)}


FAMILIES = {
    "nomic_bert": Family(
        base=NOMIC_BERT,
        classes={
            "masked_lm": "NomicBertForMaskedLM",
            "sequence_classification": "NomicBertForSequenceClassification",
            "token_classification": "NomicBertForTokenClassification",
            "embedding": "NomicBertModel",
        },
        keys=KEYS,
        # Files keep the names of the first publication, which transformers' own modules have not.
        trunk={
            "embeddings.word_embeddings.weight": "embeddings/token/embedding: V E",
            "embeddings.token_type_embeddings.weight": "embeddings/token_type/embedding: Y E",
            "emb_ln.weight": "embeddings/norm/scale: E",
            "emb_ln.bias": "embeddings/norm/bias: E",
            "encoder.layers.{}.attn.Wqkv.weight": "attention/q/kernel attention/kv/kernel[0] attention/kv/kernel[1]: "
            "(3 N H) D -> 3 D N H",
            "encoder.layers.{}.attn.out_proj.weight": "attention/out/kernel: D (N H) -> N H D",
            "encoder.layers.{}.norm1.weight": "attention_norm/scale: D",
            "encoder.layers.{}.norm1.bias": "attention_norm/bias: D",
            "encoder.layers.{}.mlp.fc12.weight": "mlp/gate_up/kernel[0]: F D -> D F",
            "encoder.layers.{}.mlp.fc11.weight": "mlp/gate_up/kernel[1]: F D -> D F",
            "encoder.layers.{}.mlp.fc2.weight": "mlp/down/kernel: D F -> F D",
            "encoder.layers.{}.norm2.weight": "mlp_norm/scale: D",
            "encoder.layers.{}.norm2.bias": "mlp_norm/bias: D",
        },
        heads={
            "masked_lm": {
                "cls.predictions.transform.dense.weight": "transform/kernel: E D -> D E",
                "cls.predictions.transform.dense.bias": "transform/bias: E",
                "cls.predictions.transform.layer_norm.weight": "norm/scale: E",
                "cls.predictions.transform.layer_norm.bias": "norm/bias: E",
                "cls.predictions.bias": "bias: V",
            },
            # The pooler is part of the stack, so its names have the prefix.
            "sequence_classification": {f"nomic_bert.{name}": where for name, where in POOLER.items()} | CLASSIFIER,
            "token_classification": CLASSIFIER,
            "embedding": POOLER,
        },
        prefix="nomic_bert.",
        aliases={
            "embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",),
            "cls.predictions.bias": ("cls.predictions.decoder.bias",),
        },
        only={"tie_word_embeddings": (True,)},
        read=_read,
        write=_write,
        since="5.5",
    )
}
