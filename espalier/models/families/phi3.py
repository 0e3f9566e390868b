"""Phi-3 (Abdin et al. 2024) and Phi-4: Llama with one tensor for queries, keys and values, and one for gate and up."""

from dataclasses import replace
from typing import Any

from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.families import Family
from espalier.models.families.llama import ALIASES, EMBEDDINGS, HEADS, KEYS, LLAMA_1B, NORMS, classes, read, write

PHI3_MINI = replace(
    LLAMA_1B,
    model_type="phi3",
    vocab_size=32_064,
    hidden_size=3072,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=96,
    max_position_embeddings=4096,
    rope_theta=10_000.0,
    rope_scaling_factor=None,
    tie_word_embeddings=False,
    layer_period=("local",),
    sliding_window=2047,
)
"""Phi-3-mini-4k."""
HEADS_THERE = ("causal_lm", "sequence_classification", "token_classification", "embedding")


def _read(hf: Any) -> dict[str, Any]:
    rope = hf.rope_parameters
    if rope.get("rope_type") == "longrope":
        # transformers looks for the longest text of a batch and turns all of it by one set of frequencies or the other.
        raise UserError(
            f"rope_type 'longrope' is not supported: beyond {rope['original_max_position_embeddings']} tokens all "
            "frequencies change, for every text of a batch that holds such a long one, so that scores would depend on "
            "what a text is packed with; near: the 4k variants, Phi-4, or smollm3 for long texts"
        )
    return read(hf, partial=True) | {"layer_period": ("local",) if hf.sliding_window else ("global",)}


def _write(config: ModelConfig) -> dict[str, Any]:
    if config.rope_scaling_factor is not None:
        raise UserError(
            f"phi3 in transformers has no rope_type {config.rope_type!r}; train without --model.rope-scaling-factor, "
            "or export as llama"
        )
    written = write(config)
    written["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    return written | {
        "sliding_window": config.sliding_window if "local" in config.layers else None,
        "embd_pdrop": config.hidden_dropout,
    }


FAMILIES = {
    "phi3": Family(
        base=PHI3_MINI,
        classes={head: name for head, name in classes("Phi3").items() if head in HEADS_THERE},
        keys=KEYS | {"sliding_window": "sliding_window", "hidden_dropout": "resid_pdrop"},
        trunk={
            **EMBEDDINGS,
            **NORMS,
            "layers.{}.self_attn.qkv_proj.weight": "attention/q/kernel: (N H) D -> D N H"
            " + attention/kv/kernel[0] attention/kv/kernel[1]: (2 K H) D -> 2 D K H",
            "layers.{}.self_attn.o_proj.weight": "attention/out/kernel: D (N H) -> N H D",
            "layers.{}.mlp.gate_up_proj.weight": "mlp/gate_up/kernel[0] mlp/gate_up/kernel[1]: (2 F) D -> 2 D F",
            "layers.{}.mlp.down_proj.weight": "mlp/down/kernel: D F -> F D",
        },
        heads={head: HEADS[head] for head in HEADS_THERE if head in HEADS},
        prefix="model.",
        aliases=ALIASES,
        read=_read,
        write=_write,
        passes_auto_map=True,
    )
}
