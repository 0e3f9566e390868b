"""Named causal-LM runs. A preset is a function; its docstring says what it is, how to run it and what it reached."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from espalier.data.config import DataConfig
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.families.gpt2 import GPT2, GPT2_MEDIUM
from espalier.models.families.llama import LLAMA_1B, LLAMA_8B, LLAMA_70B, LLAMA_405B
from espalier.models.families.qwen import QWEN3_600M
from espalier.pretraining.config import TextConfig
from espalier.training.config import CheckpointConfig, OptimizerConfig
from sharding.mesh import MeshConfig


@dataclass(frozen=True)
class PretrainConfig(TextConfig):
    """A causal-LM pretraining run."""

    task: ClassVar[str] = "causal_lm"
    model: ModelConfig = field(default_factory=lambda: GPT2)
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer_kind="bpe"))

    def __post_init__(self):
        super().__post_init__()
        if not self.model.causal:
            raise UserError(
                "model.no_causal: a model that sees what it must predict learns nothing; leave it out, or use `mlm`"
            )


def debug() -> PretrainConfig:
    """A toy that trains in seconds, to see that everything runs: `./launch.sh clm debug`. Any hardware."""
    return PretrainConfig(
        steps=20,
        batch_size=8,
        log_every=5,
        eval_every=10,
        eval_rows=16,
        model=replace(
            GPT2,
            vocab_size=1024,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=128,
        ),
        data=DataConfig(builtin="pydoc", tokenizer_kind="bpe", sequence_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        checkpoint=CheckpointConfig(every=10),
    )


def demo() -> PretrainConfig:
    """A small Llama for 2 CPU cores on built-in text: `./launch.sh clm demo`.

    On 27 MB of books with `--steps 1800`: 12 minutes (JAX 0.10.1, 5,300 tokens/s), 1.825 bits per byte.
    """
    return PretrainConfig(
        steps=750,
        batch_size=16,
        log_every=25,
        eval_every=250,
        eval_rows=64,
        model=replace(
            LLAMA_1B,
            vocab_size=4096,
            hidden_size=128,
            head_dim=None,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=384,
            max_position_embeddings=1024,
            rope_theta=10_000.0,
            rope_scaling_factor=None,
        ),
        execution=Execution(scan_layers=True),
        data=DataConfig(builtin="pydoc", tokenizer_kind="bpe", sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", b2=0.95, weight_decay=0.1, final_fraction=0.1),
        checkpoint=CheckpointConfig(every=250),
    )


def gpt2() -> PretrainConfig:
    """GPT-2 (124M; Radford et al. 2019), half a million tokens a step: `./launch.sh clm gpt2 --data.files …`.

    Not yet run to the end. 19,073 steps are 10 billion tokens. As it is, it fits a TPU v4:2x2x2 (tests/
    test_plan_compiled.py); on one GPU: `--accumulation 16`.
    """
    return PretrainConfig(
        steps=19_073,
        batch_size=512,
        accumulation=2,
        log_every=10,
        eval_every=500,
        model=replace(GPT2, hidden_dropout=0.0, attention_dropout=0.0),
        data=DataConfig(tokenizer_kind="bpe", sequence_length=1024),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, schedule="cosine", warmup=700, final_fraction=0.1, weight_decay=0.1, b2=0.95, eps=1e-8
        ),
    )


def gpt2_medium() -> PretrainConfig:
    """GPT-2 medium (355M): `./launch.sh clm gpt2-medium --data.files …`. Not yet run."""
    base = gpt2()
    return replace(
        base,
        model=replace(GPT2_MEDIUM, hidden_dropout=0.0, attention_dropout=0.0),
        optimizer=replace(base.optimizer, learning_rate=3e-4),
    )


def llama_1b() -> PretrainConfig:
    """Llama 3.2 1B's architecture, sharded over the devices: `./launch.sh clm llama-1b --data.files …`. Not yet run."""
    return PretrainConfig(
        steps=50_000,
        batch_size=512,
        log_every=10,
        eval_every=1000,
        model=LLAMA_1B,
        data=DataConfig(tokenizer_kind="bpe", sequence_length=2048),
        execution=Execution(remat="dots"),
        mesh=MeshConfig(fsdp=-1),
        optimizer=OptimizerConfig(
            learning_rate=4e-4, schedule="cosine", warmup=2000, final_fraction=0.1, weight_decay=0.1, b2=0.95, eps=1e-8
        ),
    )


def llama_8b() -> PretrainConfig:
    """Llama 3.1 8B's architecture (Dubey et al. 2024): `./launch.sh clm llama-8b --data.files …`. Not yet run."""
    base = llama_1b()
    return replace(
        base,
        steps=250_000,
        model=LLAMA_8B,
        data=replace(base.data, sequence_length=8192),
        execution=Execution(remat="full"),
        optimizer=replace(base.optimizer, learning_rate=3e-4, warmup=8000),
    )


def llama_70b() -> PretrainConfig:
    """Llama 3.1 70B's architecture, for slices of hundreds of chips: `./launch.sh clm llama-70b --data.files …`.

    Not yet run. `./launch.sh plan llama-70b --topology v5p:8x8x8` says what it needs.
    """
    base = llama_8b()
    return replace(base, model=LLAMA_70B, batch_size=1024, optimizer=replace(base.optimizer, learning_rate=1.5e-4))


def llama_405b() -> PretrainConfig:
    """Llama 3.1 405B's architecture, for slices of thousands of chips: `./launch.sh clm llama-405b --data.files …`.

    Not yet run. `./launch.sh plan llama-405b --topology v5p:16x16x16` says what it needs.
    """
    base = llama_8b()
    return replace(
        base,
        model=LLAMA_405B,
        batch_size=2048,
        mesh=MeshConfig(data=1, fsdp=-1, tensor=4),
        optimizer=replace(base.optimizer, learning_rate=8e-5),
    )


def decoder_small() -> PretrainConfig:
    """A decoder of 42M by the recipe of docs/experiments.md: `./launch.sh clm decoder-small --data.files …`.

    Not yet run at this size: what the recipe reached at 64 × 4, on 2 CPU cores, is on that page. Qwen 3's layers (norms
    of queries and keys, gated MLP, rotary positions) with Muon; rates are half of those of that size. Exports as
    Qwen3ForCausalLM.
    """
    return PretrainConfig(
        steps=20_000,
        batch_size=128,
        log_every=10,
        eval_every=1000,
        model=replace(
            QWEN3_600M,
            vocab_size=32_768,
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=None,
            head_dim=None,
            intermediate_size=1408,
            max_position_embeddings=1024,
            rope_theta=10_000.0,
        ),
        data=DataConfig(tokenizer_kind="bpe", sequence_length=1024),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=4e-3,
            muon_learning_rate=0.02,
            schedule="cosine",
            warmup=0.05,
            final_fraction=0.1,
            weight_decay=0.1,
            b2=0.95,
            eps=1e-8,
        ),
    )


PRESETS = {
    "debug": debug,
    "demo": demo,
    "gpt2": gpt2,
    "gpt2-medium": gpt2_medium,
    "decoder-small": decoder_small,
    "llama-1b": llama_1b,
    "llama-8b": llama_8b,
    "llama-70b": llama_70b,
    "llama-405b": llama_405b,
}
