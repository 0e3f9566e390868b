"""The settings of the masked-LM objectives. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from espalier.data.config import DataConfig
from espalier.errors import UserError
from espalier.models.attention_settings import AttentionTerms
from espalier.models.config import ModelConfig
from espalier.models.families.bert import BERT_BASE
from espalier.models.families.electra import ELECTRA_SMALL
from espalier.models.families.modernbert import MODERNBERT_BASE
from espalier.models.families.qwen import QWEN3_600M
from espalier.models.families.t5 import T5_V1_1_SMALL
from espalier.pretraining.config import TextConfig
from espalier.short_help import often


@dataclass(frozen=True)
class MaskingConfig:
    """What the model must predict (Devlin et al. 2019; whole words: Cui et al. 2021; rates: Wettig et al. 2023)."""

    rate: float = often(0.15)
    """Part of each row's ordinary tokens that is predicted."""
    final_rate: float | None = None
    """Rate at the last step, reached linearly (e.g. 0.30 to 0.15); unset = constant."""
    mask_fraction: float = 0.8
    """Of the chosen tokens, the part that is replaced by [MASK]; 1 = all."""
    random_fraction: float = 0.1
    """The part that is replaced by a random token; the rest stays as it is."""
    whole_words: bool = False
    """Choose whole words instead of tokens."""
    token: str | None = None
    """With --init-from: a token of its vocabulary that stands for hidden ones, where it has none for that, as those of
    decoders; LLM2Vec (BehnamGhader et al. 2024) takes _."""
    function: str | None = None
    """A masking of your own, as FILE.py:NAME; it does as mlm.masking.mask_batch (docs/own-objective.md)."""

    def __post_init__(self):
        for name in ("rate", "final_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserError(f"masking.{name}={value} must lie between 0 and 1, for instance 0.15")
        if self.mask_fraction < 0 or self.random_fraction < 0 or self.mask_fraction + self.random_fraction > 1:
            raise UserError(
                f"masking.mask_fraction={self.mask_fraction} and random_fraction={self.random_fraction} must not be "
                "negative or sum to more than 1; try 0.8 and 0.1"
            )


@dataclass(frozen=True)
class PretrainConfig(TextConfig):
    """A masked-LM pretraining run."""

    task: ClassVar[str] = "masked_lm"
    model: ModelConfig = field(default_factory=lambda: BERT_BASE)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    attention: AttentionTerms = field(default_factory=AttentionTerms)

    def __post_init__(self):
        super().__post_init__()
        if self.model.causal:
            raise UserError("model.causal: masked LM fills blanks from both sides; leave it out, or train by `clm`")


@dataclass(frozen=True)
class MaskedNextTokenConfig(TextConfig):
    """A decoder that learns to see both sides: hidden tokens are predicted by the states before them."""

    task: ClassVar[str] = "masked_next_token"
    model: ModelConfig = field(default_factory=lambda: replace(QWEN3_600M, causal=False))
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer_kind="bpe"))
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.model.causal:
            raise UserError(
                "model.causal: hidden tokens are predicted from both sides; leave it out, or mix both by `mlm hybrid`"
            )


@dataclass(frozen=True)
class HybridConfig(TextConfig):
    """A pretraining that is causal in some rows and masked in the others."""

    task: ClassVar[str] = "hybrid_lm"
    model: ModelConfig = field(default_factory=lambda: QWEN3_600M)
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer_kind="bpe"))
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    causal_share: float = often(1 / 16)
    """Part of the rows that are causal; each kind's mean loss counts by its part of the rows."""

    def __post_init__(self):
        super().__post_init__()
        if not self.model.causal:
            raise UserError("model.no_causal: of a hybrid some rows are causal; leave it out, or train by `mlm mntp`")
        if not 0.0001 <= self.causal_share <= 0.9999:
            raise UserError(
                f"causal_share={self.causal_share} must lie between 0.0001 and 0.9999; with 0 it is `mlm mntp`, with 1 "
                "`clm`"
            )


@dataclass(frozen=True)
class SpanConfig:
    """What is hidden (Raffel et al. 2020, section 3.1.4)."""

    density: float = often(0.15)
    """Part of the tokens that is hidden."""
    mean_length: float = often(3.0)
    """Tokens of a hidden span, on the average."""

    def __post_init__(self):
        if not 0 < self.density < 1 or self.mean_length < 1:
            raise UserError(
                f"spans.density={self.density} must lie between 0 and 1, and spans.mean_length={self.mean_length} be "
                "at least 1; T5's are 0.15 and 3"
            )


@dataclass(frozen=True)
class SpanCorruptionConfig(TextConfig):
    """A pretraining of an encoder-decoder by span corruption."""

    task: ClassVar[str] = "span_corruption"
    model: ModelConfig = field(default_factory=lambda: T5_V1_1_SMALL)
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer_kind="bpe"))
    spans: SpanConfig = field(default_factory=SpanConfig)

    def __post_init__(self):
        super().__post_init__()
        if not self.model.num_decoder_layers:
            raise UserError("model.num_decoder_layers=0: what is hidden is written by a decoder; give it layers")


@dataclass(frozen=True)
class GeneratorConfig:
    """The generator beside a discriminator (Clark et al. 2020, section 3.2)."""

    size: float = often(0.25)
    """Its width, heads and MLP as a part of the discriminator's: 0.25 to 0.5 are best."""
    layers: int | None = None
    """Its layers; unset = as many as the discriminator's."""

    def __post_init__(self):
        if not 0 < self.size <= 1:
            raise UserError(f"generator.size={self.size} must lie above 0 and up to 1, for instance 0.25")
        if self.layers is not None and self.layers < 1:
            raise UserError(f"generator.layers={self.layers} must be at least 1")


@dataclass(frozen=True)
class ElectraConfig(PretrainConfig):
    """A pretraining by replaced-token detection; `model` is the discriminator."""

    task: ClassVar[str] = "replaced_token_detection"
    model: ModelConfig = field(default_factory=lambda: ELECTRA_SMALL)
    masking: MaskingConfig = field(default_factory=lambda: MaskingConfig(mask_fraction=0.85, random_fraction=0.0))
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    detection_weight: float = often(50.0)
    """What the loss of the discriminator, a mean over all tokens, is multiplied by before the generator's is added."""

    def __post_init__(self):
        super().__post_init__()
        if not self.detection_weight > 0:
            raise UserError(f"detection_weight={self.detection_weight:g} must be above 0; the paper's is 50")
        if self.attention != AttentionTerms():
            raise UserError("attention.entropy is of plain masked LM, and ELECTRA trains two models; leave it out")


@dataclass(frozen=True)
class DiffusionConfig(TextConfig):
    """A pretraining by masked diffusion: the part of the tokens that is hidden is drawn for each row."""

    task: ClassVar[str] = "masked_diffusion"
    model: ModelConfig = field(default_factory=lambda: MODERNBERT_BASE)
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer_kind="bpe"))

    def __post_init__(self):
        super().__post_init__()
        if self.model.causal:
            raise UserError("model.causal: masked diffusion reads both sides of a token; leave it out, or use `clm`")
