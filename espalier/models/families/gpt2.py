"""GPT-2 (Radford et al. 2019): pre-norm decoder, learned positions, tied embeddings, GELU by its tanh approximation."""

from dataclasses import replace
from typing import Any

from espalier.models.config import ModelConfig
from espalier.models.families import Family

GPT2 = ModelConfig(
    model_type="gpt2",
    vocab_size=50257,
    hidden_act="gelu_new",
    norm_position="pre",
    norm_eps=1e-5,
    embedding_norm=False,
    final_norm=True,
    max_position_embeddings=1024,
    causal=True,
    head_transform=False,
    head_bias=False,
)

GPT2_MEDIUM = replace(GPT2, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def _read(hf: Any) -> dict[str, Any]:
    return {"intermediate_size": hf.n_inner or 4 * hf.n_embd}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_inner": config.intermediate_size,
        "embd_pdrop": config.hidden_dropout,
        "summary_first_dropout": config.hidden_dropout,
    }


FAMILIES = {
    "gpt2": Family(
        base=GPT2,
        classes={
            "causal_lm": "GPT2LMHeadModel",
            "sequence_classification": "GPT2ForSequenceClassification",
            "token_classification": "GPT2ForTokenClassification",
            "question_answering": "GPT2ForQuestionAnswering",
            "embedding": "GPT2Model",
        },
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "hidden_act": "activation_function",
            "norm_eps": "layer_norm_epsilon",
            "max_position_embeddings": "n_positions",
            "hidden_dropout": "resid_pdrop",
            "attention_dropout": "attn_pdrop",
            "initializer_range": "initializer_range",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        # GPT-2 keeps its kernels as [input, output].
        trunk={
            "wte.weight": "embeddings/token/embedding: V E",
            "wpe.weight": "embeddings/position/embedding: P E",
            "h.{}.ln_1.weight": "attention_norm/scale: D",
            "h.{}.ln_1.bias": "attention_norm/bias: D",
            "h.{}.attn.c_attn.weight": "attention/q/kernel attention/kv/kernel[0] attention/kv/kernel[1]: "
            "D (3 N H) -> 3 D N H",
            "h.{}.attn.c_attn.bias": "attention/q/bias attention/kv/bias[0] attention/kv/bias[1]: (3 N H) -> 3 N H",
            "h.{}.attn.c_proj.weight": "attention/out/kernel: (N H) D -> N H D",
            "h.{}.attn.c_proj.bias": "attention/out/bias: D",
            "h.{}.ln_2.weight": "mlp_norm/scale: D",
            "h.{}.ln_2.bias": "mlp_norm/bias: D",
            "h.{}.mlp.c_fc.weight": "mlp/up/kernel: D F",
            "h.{}.mlp.c_fc.bias": "mlp/up/bias: F",
            "h.{}.mlp.c_proj.weight": "mlp/down/kernel: F D",
            "h.{}.mlp.c_proj.bias": "mlp/down/bias: D",
            "ln_f.weight": "final_norm/scale: D",
            "ln_f.bias": "final_norm/bias: D",
        },
        heads={
            "causal_lm": {"lm_head.weight": "kernel: V D"},
            "sequence_classification": {"score.weight": "out/kernel: C D -> D C"},
            "token_classification": {
                "classifier.weight": "out/kernel: C D -> D C",
                "classifier.bias": "out/bias: C",
            },
            "question_answering": {"qa_outputs.weight": "out/kernel: 2 D -> D 2", "qa_outputs.bias": "out/bias: 2"},
        },
        prefix="transformer.",
        aliases={"wte.weight": ("lm_head.weight",)},
        ignored=r"\battn\.(masked_)?bias$",
        only={
            "add_cross_attention": (False,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        read=_read,
        write=_write,
    )
}
