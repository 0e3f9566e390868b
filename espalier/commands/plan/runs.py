"""Published training speeds: what ran, on what, how it was laid out, how fast, and who says so.

Sources in the order of this file, and within one the order of its own table. Tokens per second are per rented chip.
Where a source gives only FLOP/s or MFU, they are divided by the FLOPs a token had in its own convention. Which rows of
a large table stand here follows rules stated with the rows, chosen before any prediction was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from espalier.commands.plan.amounts import Job
from espalier.models.config import ModelConfig
from espalier.models.counts import products
from espalier.models.families.bert import BERT_BASE, BERT_LARGE
from espalier.models.families.gpt2 import GPT2
from espalier.models.families.llama import LLAMA_8B
from espalier.models.families.modernbert import MODERNBERT_BASE
from sharding.topology import chip_named


@dataclass(frozen=True)
class Run:
    """One published measurement."""

    name: str
    job: Job
    speed: float
    """Tokens per second and chip, as published or as it follows from what is."""
    source: str
    """Key of SOURCES."""
    says: str = ""
    """What the source says, where it is not tokens per second and chip in a table."""


SOURCES: Mapping[str, str] = {
    "llm-foundry": "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md",
    "MaxText v6e": "https://github.com/AI-Hypercomputer/tpu-recipes/tree/main/training/trillium",
    "MaxText v5p": "https://github.com/AI-Hypercomputer/maxtext/blob/main/docs/reference/models/tiering.md",
    "MaxText v5p scaling": "https://github.com/AI-Hypercomputer/maxtext/tree/main/src/maxtext/configs/tpu/v5p",
    "MaxText 405B v5p": "https://github.com/AI-Hypercomputer/tpu-recipes/tree/main/training/v5p/Llama3.1-405B-MaxText",
    "MaxText v5e": "https://github.com/AI-Hypercomputer/maxtext/tree/main/src/maxtext/configs/tpu/v5e",
    "MaxText v4": "https://github.com/AI-Hypercomputer/maxtext/tree/main/src/maxtext/configs/tpu/v4",
    "MaxText A3": "https://github.com/AI-Hypercomputer/maxtext/tree/main/src/maxtext/configs/gpu/a3/llama_2_7b",
    "MaxText tpu7x": "https://github.com/AI-Hypercomputer/tpu-recipes/tree/main/training/ironwood",
    "JAX-Toolbox": "https://github.com/NVIDIA/JAX-Toolbox/blob/main/docs/frameworks/maxtext/README.md",
    "llm.c": "https://github.com/karpathy/llm.c/tree/master/scripts",
    "llm.c record": "https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_1_short/2024-10-13_llmc",
    "torchtitan": "https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md",
    "ModernBERT": "https://arxiv.org/abs/2412.13663",
    "MosaicBERT": "https://github.com/mosaicml/examples/tree/main/examples/benchmarks/bert",
    "DeepLearningExamples": "https://github.com/NVIDIA/DeepLearningExamples/tree/master/TensorFlow2/LanguageModeling/BERT",
}

LLAMA2_7B = replace(LLAMA_8B, vocab_size=32_000, intermediate_size=11_008, num_key_value_heads=None)
LLAMA2_70B = replace(
    LLAMA2_7B,
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28_672,
)
LLAMA_70B = replace(LLAMA2_70B, vocab_size=128_256)
LLAMA_405B = replace(
    LLAMA_70B, hidden_size=16_384, num_hidden_layers=126, num_attention_heads=128, intermediate_size=53_248
)
MISTRAL_7B = replace(LLAMA_8B, vocab_size=32_000)


def _gpt(layers: int, width: int, heads: int, **changes) -> ModelConfig:
    config = replace(
        GPT2,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return replace(config, **changes)


GPT3_175B = _gpt(96, 12_288, 96, max_position_embeddings=2048, tie_word_embeddings=False)
MPT = {
    name: _gpt(layers, width, heads, vocab_size=50_368, max_position_embeddings=65_536)
    for name, layers, width, heads in (
        ("125m", 12, 768, 12),
        ("350m", 24, 1024, 16),
        ("760m", 24, 1536, 12),
        ("1b", 24, 2048, 16),
        ("3b", 32, 2560, 20),
        ("7b", 32, 4096, 32),
        ("13b", 40, 5120, 40),
        ("30b", 48, 7168, 56),
        ("70b", 80, 8192, 64),
    )
}
TORCH_FULL = {"qkv": 1.0, "attention": 1.0, "out": 1.0, "up": 1.0, "down": 1.0, "elementwise": 1.0}
"""PyTorch's checkpointing runs the whole layer again, also what the backward pass does not need."""


def maxtext_model(scale: int) -> ModelConfig:
    """The model of MaxText's `global_parameter_scale`, in billions of parameters (get_individual_scales)."""
    base, rest = divmod(scale.bit_length() - 1, 3)
    return replace(
        LLAMA2_7B,
        hidden_size=2048 << (base + (rest > 1)),
        num_hidden_layers=16 << base,
        num_attention_heads=16 << (base + (rest > 0)),
        num_key_value_heads=None,
        intermediate_size=7168 << (base + (rest > 0)),
    )


def _maxtext_speed(config: ModelConfig, length: int, tera: float) -> float:
    """Tokens per second from MaxText's TFLOP/s before July 2025: causal attention counted as if all keys were seen."""
    keys = 12.0 * config.num_attention_heads * config.head_size * length * config.num_hidden_layers
    return tera * 1e12 / (3 * sum(product.flops for product in products(config)) + keys)


def _mosaic() -> list[Run]:
    """Of each BF16 table and size: the row of length 2048 with the most GPUs in the tables of several sizes of cluster
    (large scale, A100 40 GB), with the fewest in the others. H100: the named 3b row, and 7b and 1b at 8k and 32k.
    """
    rows = (
        # chip, size, length, GPUs, micro-batch, micro-batches, checkpointing, tokens per second and GPU
        ("h100", "70b", 2048, 512, 8, 1, True, 1007),
        ("h100", "30b", 2048, 512, 8, 1, True, 2115),
        ("h100", "13b", 2048, 512, 16, 1, True, 4952),
        ("h100", "7b", 2048, 512, 6, 1, False, 9670),
        ("h100", "3b", 2048, 512, 8, 1, False, 21_664),
        ("h100", "1b", 2048, 512, 12, 1, False, 39_837),
        ("h100", "70b", 2048, 32, 2, 16, True, 882),
        ("h100", "30b", 2048, 8, 3, 21, True, 2002),
        ("h100", "13b", 2048, 8, 2, 1, False, 4792),
        ("h100", "7b", 32_768, 8, 2, 2, True, 3318),
        ("h100", "7b", 8192, 8, 8, 2, True, 6935),
        ("h100", "7b", 2048, 8, 6, 1, False, 10_643),
        ("h100", "3b", 1024, 8, 20, 6, False, 27_046),
        ("h100", "1b", 32_768, 8, 1, 4, False, 12_025),
        ("h100", "1b", 8192, 8, 3, 4, False, 29_157),
        ("h100", "1b", 2048, 8, 14, 1, False, 45_455),
        ("h100", "760m", 2048, 8, 24, 2, False, 63_147),
        ("a100-80gb", "70b", 2048, 32, 2, 16, True, 373),
        ("a100-80gb", "30b", 2048, 8, 3, 21, True, 916),
        ("a100-80gb", "13b", 2048, 8, 2, 3, False, 2262),
        ("a100-80gb", "7b", 2048, 8, 6, 2, False, 4641),
        ("a100-80gb", "3b", 2048, 8, 10, 2, False, 10_811),
        ("a100-80gb", "1b", 2048, 8, 14, 4, False, 20_513),
        ("a100-80gb", "760m", 2048, 8, 24, 2, False, 32_434),
        ("a100-80gb", "350m", 2048, 8, 32, 2, False, 58_782),
        ("a100-80gb", "125m", 2048, 8, 40, 2, False, 142_830),
        ("a100-40gb", "70b", 2048, 128, 4, 1, True, 376),
        ("a100-40gb", "30b", 2048, 128, 6, 1, True, 865),
        ("a100-40gb", "13b", 2048, 128, 16, 1, True, 1972),
        ("a100-40gb", "7b", 2048, 128, 18, 1, True, 3623),
        ("a100-40gb", "3b", 2048, 128, 6, 1, False, 9538),
        ("a100-40gb", "1b", 2048, 128, 10, 1, False, 18_647),
        ("a100-40gb", "760m", 2048, 128, 12, 1, False, 28_940),
        ("a100-40gb", "350m", 2048, 128, 18, 1, False, 51_934),
        ("a100-40gb", "125m", 2048, 128, 26, 1, False, 123_936),
    )
    found = []
    for chip, size, length, devices, micro, steps, again, speed in rows:
        job = Job(
            MPT[size],
            chip_named(chip),
            length,
            devices * micro * steps,
            {"fsdp": devices},
            steps,
            recomputed=TORCH_FULL if again else {},
            head="stored",
        )
        found.append(Run(f"MPT-{size}", job, speed, "llm-foundry"))
    return found


def _maxtext(
    name: str,
    source: str,
    model: ModelConfig,
    chip: str,
    length: int,
    rows: float,
    mesh: Mapping[str, int],
    recomputed: Mapping[str, float],
    *,
    speed: float = 0.0,
    tera: float = 0.0,
    says: str = "",
    scan: bool = True,
    fast_domain: int | None = None,
) -> Run:
    """A run of MaxText with `rows` rows a device; `tera`: its TFLOP/s and chip in the convention before July 2025."""
    devices = math.prod(mesh.values())
    job = Job(
        model,
        chip_named(chip),
        length,
        round(rows * devices),
        mesh,
        recomputed={"elementwise": 1.0, **recomputed} if recomputed else {},
        head="stored",
        scan=scan,
        fast_domain=fast_domain,
    )
    says = says or (f"{tera:g} TFLOP/s a chip" if tera else "")
    return Run(name, job, speed or _maxtext_speed(model, length, tera), source, says)


MINIMAL = {"attention": 1.0}
FULL = {"qkv": 1.0, "attention": 1.0, "out": 1.0, "up": 1.0}
QKV_SAVED = {"attention": 1.0, "out": 1.0, "up": 1.0}
QKV_OUT_SAVED = {"attention": 1.0, "up": 1.0}
"""What MaxText's policies run again: minimal; full; qkv_proj_offloaded and save_qkv_proj; custom with out_proj too, and
save_dot_except_mlpwi. `down` is dead code in all of them."""


def _tpus() -> list[Run]:
    """v6e: each dense model's recipe with the fewest and the most chips. Scaling tables: one slice and the most.

    Of MaxText's dense recipes, v5p GPT-3-175B is missing, which is int8, and Gemma 3 and 4.
    """
    v6e, v5p, v5e, v4 = "MaxText v6e", "MaxText v5p scaling", "MaxText v5e", "MaxText v4"
    custom = QKV_OUT_SAVED
    found = [
        _maxtext("Llama-2-70B", v6e, LLAMA2_70B, "v6e", 4096, 3, {"fsdp": 256}, QKV_SAVED, speed=905.0),
        _maxtext(
            *("Llama-3.1-405B", v6e, LLAMA_405B, "v6e", 8192, 1, {"fsdp": 512}, FULL), speed=149.5, fast_domain=256
        ),
        _maxtext("Llama-3.1-70B", v6e, LLAMA_70B, "v6e", 8192, 2, {"fsdp": 32}, QKV_SAVED, speed=921.0),
        _maxtext("Llama-3.1-70B", v6e, LLAMA_70B, "v6e", 8192, 5, {"fsdp": 256}, QKV_SAVED, speed=960.2),
        _maxtext("Llama-3.1-8B", v6e, LLAMA_8B, "v6e", 8192, 3, {"fsdp": 8}, custom, speed=7138.9),
        _maxtext("Llama-3.1-8B", v6e, LLAMA_8B, "v6e", 8192, 4, {"fsdp": 256}, custom, speed=7207.0),
        _maxtext("Mistral-7B", v6e, MISTRAL_7B, "v6e", 8192, 6, {"fsdp": 8}, custom, speed=7776.8),
        _maxtext("GPT-3-175B", v6e, GPT3_175B, "v6e", 2048, 3, {"fsdp": 256}, FULL, speed=357.6),
        _maxtext(
            *("Llama-2-70B", "MaxText v5p", LLAMA2_70B, "v5p", 4096, 2, {"fsdp": 512}, custom),
            speed=692.0,
            says="65.4 % MFU, about 692 tokens/s a chip",
        ),
    ]
    scaling = (
        (32, 6, 4, 64, 2, MINIMAL, 328, 319),
        (64, 3, 4, 64, 2, MINIMAL, 323, 309),
        (128, 1, 8, 256, 2, MINIMAL, 316, 274),
        (256, 1, 8, 512, 2, MINIMAL, 308, 289),
        (512, 2, 8, 512, 2, FULL, 294, 282),
        (1024, 2, 16, 2048, 2, FULL, 297, 279),
    )
    for scale, rows, tensor, chips, slices, policy, one, most in scaling:
        model, mesh = maxtext_model(scale), {"fsdp": chips // tensor, "tensor": tensor}
        found.append(_maxtext(f"MaxText-{scale}B", v5p, model, "v5p", 2048, rows, mesh, policy, tera=one))
        mesh = {"replica": slices, **mesh}
        found.append(_maxtext(f"MaxText-{scale}B", v5p, model, "v5p", 2048, rows, mesh, policy, tera=most))
    saved = {"qkv": 1.0, "out": 1.0, "up": 1.0}
    source = "MaxText 405B v5p"
    found.append(_maxtext("Llama-3.1-405B", source, LLAMA_405B, "v5p", 8192, 2, {"fsdp": 512}, saved, speed=124.6))
    lite = (
        (16, 6, {"fsdp": 256}, FULL, 120, 108),
        (32, 4, {"fsdp": 256}, FULL, 132, 119),
        (64, 2, {"fsdp": 256}, FULL, 118, 99),
        (128, 1, {"fsdp": 16, "tensor": 16}, QKV_SAVED, 110, 91),
    )
    for scale, rows, mesh, policy, one, most in lite:
        model = maxtext_model(scale)
        found.append(_maxtext(f"MaxText-{scale}B", v5e, model, "v5e", 2048, rows, mesh, policy, tera=one))
        mesh = {"replica": 32, **mesh}
        found.append(_maxtext(f"MaxText-{scale}B", v5e, model, "v5e", 2048, rows, mesh, policy, tera=most))
    heads = {"num_key_value_heads": None, "head_dim": 128}
    m22 = replace(
        LLAMA2_7B, hidden_size=6144, num_hidden_layers=48, num_attention_heads=24, intermediate_size=24_576, **heads
    )
    m52 = replace(
        LLAMA2_7B, hidden_size=12_288, num_hidden_layers=32, num_attention_heads=32, intermediate_size=49_152, **heads
    )
    found += [
        _maxtext("MaxText-22B", v4, m22, "v4", 2048, 13, {"fsdp": 64}, FULL, tera=156),
        _maxtext("MaxText-22B", v4, m22, "v4", 2048, 13, {"replica": 8, "fsdp": 64}, FULL, tera=146),
        _maxtext("MaxText-52B", v4, m52, "v4", 2048, 7, {"fsdp": 192}, FULL, tera=154),
        _maxtext("MaxText-52B", v4, m52, "v4", 2048, 7, {"replica": 2, "fsdp": 192}, FULL, tera=162),
    ]
    context = {"out": 1.0, "up": 1.0}
    v7 = "MaxText tpu7x"
    found += [
        _maxtext("Llama-3.1-405B", v7, LLAMA_405B, "tpu7x", 8192, 3, {"fsdp": 512}, FULL, speed=499.8),
        _maxtext("Llama-3.1-70B", v7, LLAMA_70B, "tpu7x", 8192, 2, {"fsdp": 128}, context, speed=2687.0),
        _maxtext("Llama-3.1-70B", v7, LLAMA_70B, "tpu7x", 8192, 2, {"fsdp": 512}, context, speed=2670.6),
    ]
    return found


def _gpus() -> list[Run]:
    """JAX on H100, then GPT-2 in CUDA, then PyTorch; of llm.c every script that states its time a step."""
    found = []
    for nodes, tera in ((1, 492.0), (2, 422.0), (16, 375.0)):
        mesh = {"replica": nodes, "fsdp": 8}
        run = _maxtext("Llama-2-7B", "MaxText A3", LLAMA2_7B, "h100", 4096, 4, mesh, {}, tera=tera, scan=False)
        # A3: four 200 Gb/s cards for eight GPUs.
        found.append(replace(run, job=replace(run.job, slow_bandwidth=12.5e9)))
    found.append(
        _maxtext(
            *("Llama-2-7B", "JAX-Toolbox", LLAMA2_7B, "h100", 4096, 2, {"fsdp": 8}, {}),
            scan=False,
            speed=22.19 * 4096 / 8,
            says="22.19 sequences/s on 8 GPUs",
        )
    )
    a100, h100 = "a100-80gb", "h100"
    scripts = (
        # model, source, chip, micro-batches, tokens and seconds of a step
        ("GPT-2 124M", "llm.c record", _gpt(12, 768, 12), h100, 1, 524_288, 0.140),
        ("GPT-2 124M", "llm.c", _gpt(12, 768, 12), a100, 1, 524_288, 0.300),
        ("GPT-2 350M", "llm.c", _gpt(24, 1024, 16), a100, 1, 524_288, 0.820),
        ("GPT-2 774M", "llm.c", _gpt(36, 1280, 20), a100, 2, 524_288, 1.7),
        ("GPT-2 1558M", "llm.c", _gpt(48, 1600, 25), h100, 8, 1_048_576, 2.80),
    )
    for name, source, model, chip, steps, tokens, seconds in scripts:
        job = Job(model, chip_named(chip), 1024, tokens // 1024, {"data": 8}, steps, head="fused")
        found.append(
            Run(name, job, tokens / seconds / 8, source, f"{seconds:g} s a step of {tokens:,} tokens on 8 GPUs")
        )
    # Half of the products are saved (every second one); 500 W instead of 700 and HBM2e of 2.4 TB/s.
    titan = replace(chip_named("h100"), memory_bandwidth=2.4e12)
    selective = {"qkv": 0.2, "out": 1.0, "up": 0.5, "elementwise": 1.0}
    for devices, speed in ((8, 6667.0), (128, 6514.0)):
        job = Job(LLAMA_8B, titan, 8192, 2 * devices, {"fsdp": devices}, recomputed=selective, head="stored")
        found.append(Run("Llama-3.1-8B", job, speed, "torchtitan", "with torch.compile; GPUs limited to 500 W"))
    return found


def _encoders() -> list[Run]:
    """Masked language models; DeepLearningExamples: BERT-large at the ends of its mixed-precision tables."""
    modern = Job(MODERNBERT_BASE, chip_named("h100"), 1024, 4608, {"data": 8}, 6, 0.3, head="stored")
    bert = Job(BERT_BASE, chip_named("a100-80gb"), 128, 4096, {"data": 8}, 4, 1.0, attention="xla", head="stored")
    hours = 286_720_000 * 128 / (11.5 * 3600 * 8)
    found = [
        Run("ModernBERT-base", modern, 312_000.0, "ModernBERT", "312k tokens/s an H100, as quoted elsewhere"),
        Run("BERT-base", bert, hours, "MosaicBERT", "11.5 hours for 286.72M rows of 128 on 8 GPUs"),
    ]
    rows = (
        ("v100", 128, 60, 1024, 1, 206.5),
        ("v100", 128, 60, 64, 16, 3077.99),
        ("v100", 512, 10, 3072, 1, 40.95),
        ("v100", 512, 10, 192, 16, 614.94),
        ("a100-80gb", 128, 312, 256, 1, 485.59),
        ("a100-80gb", 128, 312, 32, 8, 3799.24),
        ("a100-80gb", 512, 40, 768, 1, 96.52),
        ("a100-80gb", 512, 40, 96, 8, 649.69),
    )
    for chip, length, micro, steps, devices, rate in rows:
        job = Job(
            BERT_LARGE,
            chip_named(chip),
            length,
            micro * steps * devices,
            {"data": devices},
            steps,
            {128: 20 / 128, 512: 80 / 512}[length],
            attention="xla",
            head="stored",
            fast_domain=16 if chip == "v100" else None,  # DGX-2: 16 GPUs on one switch
        )
        says = f"{rate:g} sequences/s"
        found.append(Run("BERT-large", job, rate * length / devices, "DeepLearningExamples", says))
    return found


RUNS: tuple[Run, ...] = (*_mosaic(), *_tpus(), *_gpus(), *_encoders())
"""The 1st, 3rd, 5th … are the half that efficiencies are fitted on; the 2nd, 4th … are held out."""
