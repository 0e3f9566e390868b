"""What a model is: one frozen dataclass that covers encoders and decoders.

A family (BERT, Llama, …) is a choice of values, never a subclass. Key names are those of Hugging Face
configs wherever one exists. Imports no JAX, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from espalier.errors import UserError

LayerKind = Literal["global", "local", "nope"]
"""nope: a global layer without rotary positions (Yang et al. 2025, SmolLM 3)."""
HiddenAct = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu", "relu2"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
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
    num_decoder_layers: int = 0
    """Layers of a second stack, a decoder that reads what the first makes of another text (T5, Raffel et al. 2020);
    0 = a model is one stack. Everything else is said of both."""
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    """Key/value heads shared by groups of query heads; unset = as many as query heads."""
    head_dim: int | None = None
    """Size of one head; unset = hidden_size / num_attention_heads."""
    intermediate_size: int = 3072
    hidden_act: HiddenAct = "gelu"
    """gelu is the exact one; gelu_new and gelu_pytorch_tanh are two names of its tanh approximation. relu2 is
    the square of relu (So et al. 2021)."""
    embedding_size: int | None = None
    """E: size of the embeddings, which are then projected to hidden_size (ELECTRA); unset = hidden_size."""
    scale_embeddings: bool = False
    """Multiply token embeddings by √hidden_size (Gemma)."""
    gated_mlp: bool = False
    """Gated MLP: act(gate(x)) * up(x) (Shazeer 2020)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_position: Literal["pre", "post", "both", "output"] = "post"
    """Around attention and MLP: before them, after their residual, before and after them (Gemma), or only after them,
    before the residual is added (OLMo 2)."""
    norm_bias: bool = True
    norm_plus_one: bool = False
    """Norms multiply by 1 + scale (Gemma)."""
    norm_eps: float = 1e-12
    embedding_norm: bool = True
    """Normalise the sum of the embeddings."""
    final_norm: bool = False
    """Normalise after the last layer (pre-norm stacks)."""
    first_attention_norm: bool = True
    """False: the first layer attends to the embeddings as they are (ModernBERT)."""
    attention_bias: bool = True
    """Biases of queries, keys and values, and of the output projection unless attention_out_bias says otherwise."""
    attention_out_bias: bool | None = None
    """A bias in the attention's output projection; unset = attention_bias."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by the square root of this; unset = head_dim."""
    attn_logit_softcapping: float | None = None
    """Attention scores are squashed to ± this by tanh (Gemma 2); unset = not."""
    final_logit_softcapping: float | None = None
    """Scores over the vocabulary are squashed to ± this by tanh (Gemma 2); unset = not."""
    scale_decoder_outputs: bool = False
    """Multiply what the head of a decoder with an encoder takes by 1/√hidden_size (T5 with tied embeddings)."""
    decoder_start_token_id: int = 0
    """The token before the first that a decoder with an encoder writes."""
    cross_attention: bool = False
    """Between attention and MLP every layer reads a memory, as decoders of encoder-decoders do (Vaswani et al. 2017);
    the caller gives it (models.transformer.stack)."""
    mlp_bias: bool = True
    qk_norm: bool = False
    """RMS-normalise queries and keys."""
    qk_norm_over: Literal["head", "all"] = "head"
    """With qk_norm: each head by itself (Qwen 3), or all heads of a token together (OLMo 2)."""
    position_embedding: Literal["learned", "rotary", "relative"] = "learned"
    """relative: a bias on the scores by the distance of query and key, the same in all layers (T5)."""
    max_position_embeddings: int = 512
    """Positions; with learned ones, rows of their table, of which the first position_offset stay unused."""
    position_offset: int = 0
    """Row of the table that the first position has (RoBERTa: 2)."""
    relative_attention_num_buckets: int = 32
    """Distances that relative positions tell apart; a bidirectional stack has half of them for each side."""
    relative_attention_max_distance: int = 128
    """From here on all distances are one."""
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    """Fraction of each head that rotary positions rotate: its first dimensions (Phi-4-mini: 0.75)."""
    local_rope_theta: float | None = None
    """Rotary base of local layers, which are not scaled then; unset = all layers are alike."""
    rope_type: Literal["llama3", "linear", "yarn"] = "llama3"
    """Kind of frequency scaling, where there is a rope_scaling_factor: by wavelength (Llama 3, YaRN), or all alike."""
    rope_scaling_factor: float | None = None
    """Factor by which long wavelengths are stretched; unset = none."""
    rope_original_max_position_embeddings: int = 8192
    """llama3, yarn: the context before it was extended; wavelengths beyond it are stretched by the whole factor."""
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    """llama3: wavelengths up to the original context divided by this stay as they are."""
    rope_beta_fast: float = 32.0
    """yarn: pairs of dimensions that rotate more often than this in the original context are not scaled."""
    rope_beta_slow: float = 1.0
    """yarn: pairs of dimensions that rotate less often than this in the original context are scaled in full."""
    rope_attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied by; unset = 1 + 0.1 ln(rope_scaling_factor)."""
    rope_truncate: bool = True
    """yarn: between beta_fast and beta_slow, begin and end at whole pairs of dimensions."""
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
    classifier_pooler: Literal["tanh", "relu", "gelu", "transform"] = "tanh"
    """Encoder classification: dense + tanh (BERT), relu (DistilBERT) or gelu (ELECTRA), or dense + activation + norm
    (ModernBERT, for tokens and spans too)."""
    classifier_pooling: Literal["cls", "mean", "late"] = "cls"
    """What an encoder classifies by: its first token, the mean of all (better with few labels), or the mean of every
    token's class scores (EuroBERT)."""
    labels: tuple[str, ...] = ()
    """Names of the classes, where there is a head that classifies."""
    problem_type: ProblemType | None = None
    """What the scores of a classifier of sequences are; unset = one label a text."""
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    adapter_dropout: float = 0.0
    """Of what adapters see, where the parameters have some (--lora.dropout of a fine-tuning)."""
    initializer_range: float = 0.02
    zero_outputs: bool = False
    """Output projections of attention and MLP begin at 0: a layer begins as the identity (Fixup, Zhang et al. 2019)."""

    def __post_init__(self):
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "embedding_size"),
            *("rope_original_max_position_embeddings", "relative_attention_max_distance"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.hidden_act not in typing.get_args(HiddenAct):
            raise UserError(f"hidden_act={self.hidden_act!r} is not one of {', '.join(typing.get_args(HiddenAct))}")
        if self.problem_type not in (None, *typing.get_args(ProblemType)):
            raise UserError(
                f"problem_type={self.problem_type!r} is not one of {', '.join(typing.get_args(ProblemType))}"
            )
        if not self.layer_period:
            raise UserError("layer_period is empty; give the kinds of layer that repeat, for instance global")
        for name in ("hidden_dropout", "attention_dropout", "adapter_dropout"):
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
        if not 0 <= self.position_offset < self.max_position_embeddings:
            raise UserError(
                f"position_offset={self.position_offset} must lie between 0 and "
                f"max_position_embeddings={self.max_position_embeddings}; RoBERTa's is 2"
            )
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={value} must be above 0, for instance 30; leave it unset for none")
        if not 0 < self.partial_rotary_factor <= 1:
            raise UserError(f"partial_rotary_factor={self.partial_rotary_factor} must lie above 0 and up to 1")
        if self.position_embedding == "rotary" and (self.rotary_size < 2 or self.rotary_size % 2):
            part = f" × partial_rotary_factor={self.partial_rotary_factor} = {self.rotary_size}"
            raise UserError(
                f"head_dim={self.head_size}{part if self.partial_rotary_factor != 1 else ''} is not an even number "
                "of dimensions, and rotary positions rotate pairs; give an even one"
            )
        if "nope" in self.layers and self.position_embedding != "rotary":
            raise UserError(
                f"nope layers go without rotary positions, and position_embedding={self.position_embedding} has none; "
                "try global, or --model.position-embedding rotary"
            )
        if not 0 < self.rope_beta_slow <= self.rope_beta_fast:
            raise UserError(
                f"rope_beta_slow={self.rope_beta_slow} must be above 0 and at most rope_beta_fast="
                f"{self.rope_beta_fast}; YaRN's are 1 and 32"
            )
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.kv_heads}; each key/value head serves a whole group of query heads"
            )
        buckets = self.relative_attention_num_buckets // (2 if self.causal else 4)
        if self.position_embedding == "relative" and not 0 < buckets < self.relative_attention_max_distance:
            raise UserError(
                f"relative_attention_num_buckets={self.relative_attention_num_buckets} and "
                f"relative_attention_max_distance={self.relative_attention_max_distance} do not go together: there "
                "must be 4 buckets or more, and fewer than four times the distance; T5's are 32 and 128"
            )
        if self.num_decoder_layers < 0:
            raise UserError(f"num_decoder_layers={self.num_decoder_layers} must be 0 (one stack) or more")
        if self.num_decoder_layers and (self.causal or self.cross_attention):
            raise UserError(
                f"num_decoder_layers={self.num_decoder_layers} adds a causal decoder with cross-attention to an "
                "encoder; leave out model.causal and model.cross_attention"
            )
        if "local" in self.layers and not self.sliding_window:
            raise UserError("local layers need sliding_window (how many tokens they see); try 128")
        if not self.first_attention_norm and not self.prefix_layers:
            raise UserError(
                "first_attention_norm=False needs the first layer in prefix_layers, because repeated layers are all "
                f'alike; try prefix_layers=("{self.layers[0]}",), or first_attention_norm=True'
            )
        if not self.first_attention_norm and self.norm_position == "output":
            raise UserError(
                "first_attention_norm=False leaves out a norm before attention, and norm_position=output has none "
                "there; try first_attention_norm=True"
            )

    def check_one_stack(self, what: str) -> None:
        """UserError for an encoder-decoder. what: what takes no such model, as the beginning of a sentence."""
        if self.num_decoder_layers:
            raise UserError(
                f"{what} models of one stack, and this one ({self.model_type}) has an encoder and a decoder; what "
                "there is for it: docs/encoder-decoders.md"
            )

    @property
    def encoder(self) -> ModelConfig:
        """The stack that reads, of an encoder-decoder."""
        return dataclasses.replace(self, num_decoder_layers=0)

    @property
    def decoder(self) -> ModelConfig:
        """The stack that writes, of an encoder-decoder."""
        return dataclasses.replace(
            self,
            num_hidden_layers=self.num_decoder_layers,
            num_decoder_layers=0,
            causal=True,
            cross_attention=True,
        )

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Dimensions of a head that rotary positions rotate."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def attention_divisor(self) -> float:
        """Attention scores are divided by its square root."""
        return self.query_pre_attn_scalar or self.head_size

    @property
    def rotary_length(self) -> float:
        """What the cosines and sines of rotary positions are multiplied by: 1, but for YaRN."""
        if self.rope_scaling_factor is None or self.rope_type != "yarn":
            return 1.0
        if self.rope_attention_factor is not None:
            return self.rope_attention_factor
        return 1.0 + 0.1 * math.log(max(1.0, self.rope_scaling_factor))

    @property
    def embedding_width(self) -> int:
        """E."""
        return self.embedding_size or self.hidden_size

    @property
    def max_length(self) -> int | None:
        """Tokens that a row may have; None = any number (rotary positions are extended)."""
        return self.max_position_embeddings - self.position_offset if self.position_embedding == "learned" else None

    @property
    def usual_length(self) -> int:
        """Tokens of an example where nothing else is said: all positions, but at most 512, as attention costs their
        square."""
        return min(self.max_length or self.max_position_embeddings, 512)

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
        if self.max_length is not None and sequence_length > self.max_length:
            raise UserError(
                f"data.sequence_length={sequence_length} exceeds the model's {self.max_length} learned "
                f"positions; try --data.sequence-length {self.max_length} or "
                f"--model.max-position-embeddings {sequence_length + self.position_offset}"
            )
        positions = max(self.max_position_embeddings, sequence_length)
        return dataclasses.replace(self, vocab_size=vocab_size, max_position_embeddings=positions)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from JSON (lists become tuples)."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        unknown = sorted(arguments.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown model setting {', '.join(unknown)}; use the version of the code that wrote it")
        return cls(**arguments)


@dataclass(frozen=True)
class Execution:
    """How the model runs: speed and memory. What is computed stays the same, but for the rounding of `dtype`."""

    attention: Literal["auto", "xla", "splash", "cudnn", "triton"] = "auto"
    """Attention: splash (TPU), cudnn (GPU, plain rows), triton (GPU), xla; auto = the fastest that honours the rows."""
    scan_layers: bool | None = None
    """Run the repeated layers by lax.scan (fast compile) or unrolled (fast step); unset = scan on TPUs and
    beyond 24 layers."""
    remat: Literal["none", "dots", "full"] = "none"
    """What is recomputed in the backward pass: nothing, all but matrix products, everything."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; parameters stay float32. auto = bfloat16 on TPU and GPU, float32 on CPU."""
    products: Literal["float32", "bfloat16"] = "float32"
    """What products of float32 activations and parameters round their factors to, sums staying float32. On CPUs
    bfloat16 makes a step 1.2 to 1.4 times as fast."""
