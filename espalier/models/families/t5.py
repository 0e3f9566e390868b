"""T5 (Raffel et al. 2020), T5 v1.1 and Flan (Chung et al. 2022), mT5 (Xue et al. 2021): an encoder and a decoder,
pre-norm RMSNorm without biases, relative positions, scores that nothing divides.

v1.0 has relu, and embeddings that are the output matrix too, which its states are scaled for; v1.1 a gated GELU, and an
output matrix of its own.
"""

from dataclasses import replace
from typing import Any

from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.families import Family

T5_SMALL = ModelConfig(
    model_type="t5",
    vocab_size=32_128,
    hidden_size=512,
    num_hidden_layers=6,
    num_decoder_layers=6,
    num_attention_heads=8,
    head_dim=64,
    intermediate_size=2048,
    hidden_act="relu",
    norm="rmsnorm",
    norm_position="pre",
    norm_bias=False,
    norm_eps=1e-6,
    embedding_norm=False,
    final_norm=True,
    attention_bias=False,
    query_pre_attn_scalar=1.0,
    mlp_bias=False,
    position_embedding="relative",
    scale_decoder_outputs=True,
    head_transform=False,
    head_bias=False,
)
T5_BASE = replace(
    T5_SMALL,
    hidden_size=768,
    num_hidden_layers=12,
    num_decoder_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
)
T5_V1_1_SMALL = replace(
    T5_SMALL,
    num_hidden_layers=8,
    num_decoder_layers=8,
    num_attention_heads=6,
    intermediate_size=1024,
    hidden_act="gelu_new",
    gated_mlp=True,
    tie_word_embeddings=False,
    scale_decoder_outputs=False,
)
T5_V1_1_BASE = replace(
    T5_V1_1_SMALL,
    hidden_size=768,
    num_hidden_layers=12,
    num_decoder_layers=12,
    num_attention_heads=12,
    intermediate_size=2048,
)
MT5_SMALL = replace(T5_V1_1_SMALL, model_type="mt5", vocab_size=250_112)

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "head_dim": "d_kv",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_attention_heads": "num_heads",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
    "relative_attention_max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
    "hidden_dropout": "dropout_rate",
    "attention_dropout": "dropout_rate",
}


def _read(hf: Any) -> dict[str, Any]:
    gate, _, act = hf.feed_forward_proj.rpartition("-")
    if gate not in ("", "gated") or act not in ("relu", "gelu", "silu", "gelu_new"):
        raise UserError(f"feed_forward_proj={hf.feed_forward_proj!r} is not supported; relu and gated-gelu are")
    start = getattr(hf, "decoder_start_token_id", None)
    # transformers ≥ 5.1 ties every T5 unless its file has both matrices, and keeps what config.json says of it here.
    tied = hf.model_type == "t5" and getattr(hf, "scale_decoder_outputs", hf.tie_word_embeddings)
    return {
        "gated_mlp": bool(gate),
        # As the class there reads it.
        "hidden_act": "gelu_new" if gate and act == "gelu" else act,
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": tied,
        "decoder_start_token_id": (hf.pad_token_id or 0) if start is None else start,
        "max_position_embeddings": getattr(hf, "n_positions", 512),
        # Of runs here: the class there begins otherwise.
        "initializer_range": getattr(hf, "initializer_range", 0.02),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    act = "gelu" if config.gated_mlp and config.hidden_act == "gelu_new" else config.hidden_act
    return {
        "feed_forward_proj": f"gated-{act}" if config.gated_mlp else act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "decoder_start_token_id": config.decoder_start_token_id,
        "n_positions": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "dropout_rate": config.hidden_dropout,
    }


def _attention(block: str, name: str, ours: str) -> dict[str, str]:
    return {
        f"{block}.{name}.q.weight": f"{ours}/q/kernel: (N H) D -> D N H",
        f"{block}.{name}.k.weight": f"{ours}/kv/kernel[0]: (K H) D -> D K H",
        f"{block}.{name}.v.weight": f"{ours}/kv/kernel[1]: (K H) D -> D K H",
        f"{block}.{name}.o.weight": f"{ours}/out/kernel: D (N H) -> N H D",
        f"{block}.layer_norm.weight": f"{ours}_norm/scale: D",
    }


def _mlp(block: str) -> dict[str, str]:
    return {
        f"{block}.DenseReluDense.wi.weight": "mlp/up/kernel: F D -> D F",
        f"{block}.DenseReluDense.wi_0.weight": "mlp/gate_up/kernel[0]: F D -> D F",
        f"{block}.DenseReluDense.wi_1.weight": "mlp/gate_up/kernel[1]: F D -> D F",
        f"{block}.DenseReluDense.wo.weight": "mlp/down/kernel: D F -> F D",
        f"{block}.layer_norm.weight": "mlp_norm/scale: D",
    }


def _stack(name: str) -> dict[str, str]:
    return {
        f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "relative/embedding: U N",
        f"{name}.final_layer_norm.weight": "final_norm/scale: D",
    }


def _family(base: ModelConfig, made: str) -> Family:
    return Family(
        base=base,
        classes={"seq2seq_lm": made},
        keys=KEYS,
        trunk={
            "shared.weight": "embeddings/token/embedding: V E",
            **_stack("encoder"),
            **_attention("encoder.block.{}.layer.0", "SelfAttention", "attention"),
            **_mlp("encoder.block.{}.layer.1"),
        },
        decoder={
            **_stack("decoder"),
            **_attention("decoder.block.{}.layer.0", "SelfAttention", "attention"),
            **_attention("decoder.block.{}.layer.1", "EncDecAttention", "cross_attention"),
            **_mlp("decoder.block.{}.layer.2"),
        },
        heads={"seq2seq_lm": {"lm_head.weight": "kernel: V D"}},
        prefix="",
        aliases={"shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")},
        # A table that old files hold and no version of the model has used.
        ignored=r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
        read=_read,
        write=_write,
    )


FAMILIES = {
    "t5": _family(T5_SMALL, "T5ForConditionalGeneration"),
    "mt5": _family(MT5_SMALL, "MT5ForConditionalGeneration"),
}
