"""What a model is: one frozen dataclass that covers encoders and decoders.

A family (BERT, Llama, …) is a choice of values, never a subclass. Key names are those of Hugging Face
configs wherever one exists. Imports no JAX, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from cli import UserError

LayerKind = Literal["global", "local"]
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a transformer stack; defaults are BERT-base's (Devlin et al. 2019)."""

    model_type: str = "bert"
    """Family, as Hugging Face names it."""
    vocab_size: int = 30522
    """Tokens in the vocabulary; replaced by the tokenizer's size when a run starts."""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    """Key/value heads shared by groups of query heads; unset = as many as query heads."""
    head_dim: int | None = None
    """Size of one head; unset = hidden_size / num_attention_heads."""
    intermediate_size: int = 3072
    hidden_act: Literal["gelu", "gelu_new", "silu", "relu"] = "gelu"
    gated_mlp: bool = False
    """Gated MLP: act(gate(x)) * up(x) (Shazeer 2020)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_position: Literal["pre", "post"] = "post"
    norm_bias: bool = True
    norm_eps: float = 1e-12
    embedding_norm: bool = True
    """Normalise the sum of the embeddings."""
    final_norm: bool = False
    """Normalise after the last layer (pre-norm stacks)."""
    first_attention_norm: bool = True
    """False: the first layer attends to the embeddings as they are (ModernBERT)."""
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
    position_embedding: Literal["learned", "rotary"] = "learned"
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    """Rotary base of local layers; unset = rope_theta."""
    rope_scaling_factor: float | None = None
    """Llama 3 frequency scaling; unset = none."""
    type_vocab_size: int = 0
    """Token types (BERT: 2); 0 = none."""
    causal: bool = False
    prefix_layers: tuple[LayerKind, ...] = ()
    layer_period: tuple[LayerKind, ...] = ("global",)
    """Kinds of layer repeated between prefix and suffix until num_hidden_layers is reached."""
    suffix_layers: tuple[LayerKind, ...] = ()
    sliding_window: int | None = None
    """Tokens a local layer sees: bidirectional ±sliding_window/2, causal the last sliding_window."""
    tie_word_embeddings: bool = True
    head_transform: bool = True
    """Masked-LM head: dense + activation + norm before the vocabulary (BERT, ModernBERT)."""
    head_bias: bool = True
    """A bias per vocabulary entry in the language-model head."""
    head_transform_bias: bool = True
    """A bias in the dense layer before the vocabulary (BERT: yes, ModernBERT: no)."""
    classifier_pooler: Literal["tanh", "transform"] = "tanh"
    """Encoder classification: first token → dense + tanh (BERT) or dense + activation + norm (ModernBERT)."""
    classifier_pooling: Literal["cls", "mean"] = "cls"
    """What an encoder classifies by: its first token, or the mean of all (better with few labels)."""
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if not self.layer_period:
            raise UserError("layer_period is empty; give the kinds of layer that repeat, for instance global")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1; try 0.1")
        fixed, period = len(self.prefix_layers) + len(self.suffix_layers), len(self.layer_period)
        repeated = self.num_hidden_layers - fixed
        if repeated < 0 or repeated % period:
            raise UserError(
                f"num_hidden_layers={self.num_hidden_layers} does not fit prefix {len(self.prefix_layers)} + "
                f"n × period {period} + suffix {len(self.suffix_layers)}; "
                f"try {fixed + period * max(1, round(repeated / period))}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                "change one of them or set head_dim"
            )
        if self.position_embedding == "rotary" and self.head_size % 2:
            raise UserError(f"head_dim={self.head_size} is odd; rotary positions turn pairs: give an even one")
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.kv_heads}; each key/value head serves a whole group of query heads"
            )
        if "local" in self.layers and not self.sliding_window:
            raise UserError("local layers need sliding_window (how many tokens they see); try 128")
        if not self.first_attention_norm and not self.prefix_layers:
            raise UserError(
                "first_attention_norm=False needs the first layer in prefix_layers, because repeated layers are all "
                f'alike; try prefix_layers=("{self.layers[0]}",), or first_attention_norm=True'
            )

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def repeats(self) -> int:
        """R: how often the period repeats."""
        return (self.num_hidden_layers - len(self.prefix_layers) - len(self.suffix_layers)) // len(self.layer_period)

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, first to last."""
        return self.prefix_layers + self.layer_period * self.repeats + self.suffix_layers

    @property
    def padded_vocab_size(self) -> int:
        """Rows stored in the embedding table: a multiple of 128, so that every mesh can split it."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def fitted(self, vocab_size: int, sequence_length: int) -> ModelConfig:
        """This architecture for a tokenizer of `vocab_size` and rows of `sequence_length` tokens.

        Raises UserError where learned positions end before the row does; rotary positions are extended.
        """
        if sequence_length <= self.max_position_embeddings:
            return dataclasses.replace(self, vocab_size=vocab_size)
        if self.position_embedding == "learned":
            raise UserError(
                f"data.sequence_length={sequence_length} exceeds the model's {self.max_position_embeddings} learned "
                f"positions; try --data.sequence-length {self.max_position_embeddings} or "
                f"--model.max-position-embeddings {sequence_length}"
            )
        return dataclasses.replace(self, vocab_size=vocab_size, max_position_embeddings=sequence_length)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from JSON (lists become tuples)."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        unknown = sorted(arguments.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"this version knows no model setting {', '.join(unknown)}; use the code that wrote it")
        return cls(**arguments)


@dataclass(frozen=True)
class Execution:
    """How the model runs: speed and memory. What is computed stays the same, but for the rounding of `dtype`."""

    attention: Literal["auto", "xla"] = "auto"
    """Attention backend; auto = the fastest one that honours the model's boundaries here."""
    scan_layers: bool | None = None
    """Run the repeated layers by lax.scan (fast compile) or unrolled (fast step); unset = scan beyond 24 layers."""
    remat: Literal["none", "dots", "full"] = "none"
    """What is recomputed in the backward pass: nothing, all but matrix products, everything."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; parameters stay float32. auto = bfloat16 on TPU and GPU, float32 on CPU."""
