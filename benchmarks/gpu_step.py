"""Training steps on a GPU: what is measured, and one measurement in a process of its own.

    python -m benchmarks.gpu_step CASE STEPS

The step is that of every run, with its donated state; batches lie on the device beforehand, so that data is not
measured. Prints one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from espalier.models.config import Execution, ModelConfig
from espalier.models.counts import attention_flops, count_params, flops_per_token, products
from espalier.models.families.bert import BERT_BASE, BERT_LARGE
from espalier.models.families.gpt2 import GPT2, GPT2_MEDIUM
from espalier.models.families.llama import LLAMA_8B
from espalier.models.families.modernbert import MODERNBERT_BASE

DRY: dict[str, Any] = dict(hidden_dropout=0.0, attention_dropout=0.0)
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """A training step to be timed on one GPU."""

    model: ModelConfig
    rows: int
    length: int
    rate: float = 1.0
    """Part of the tokens that is predicted: 1 of a causal model, else the mask rate."""
    packed: bool = True
    attention: Any = "auto"
    remat: Any = "none"
    optimizer: Any = "adamw"
    target: float | None = None
    """MFU that this is to reach."""
    memory: float = 0.0
    """GB of memory that a GPU must have."""

    @property
    def execution(self) -> Execution:
        return Execution(attention=self.attention, remat=self.remat)


def _encoder(layers: int, hidden: int, heads: int, inner: int) -> ModelConfig:
    """Ettin's sizes (Weller et al. 2025), ModernBERT's architecture."""
    sizes: dict[str, Any] = dict(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=inner
    )
    return replace(MODERNBERT_BASE, **sizes)


GPT_1B = replace(
    GPT2, **DRY, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192,
    max_position_embeddings=2048,
)  # fmt: skip
LLAMA_7B = replace(LLAMA_8B, num_key_value_heads=32, intermediate_size=11_008, vocab_size=32_000)
BERT, LARGE, GPT = (replace(model, **DRY) for model in (BERT_BASE, BERT_LARGE, GPT2))
TINY: dict[str, Any] = dict(
    vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)

CASES = {
    "bert-base plain": Case(BERT, 128, 512, 0.15, packed=False, target=0.46),
    "bert-base packed": Case(BERT, 128, 512, 0.15),
    "bert-base dropout packed": Case(BERT_BASE, 128, 512, 0.15),
    "bert-base xla": Case(BERT, 128, 512, 0.15, attention="xla"),
    "bert-large plain": Case(LARGE, 64, 512, 0.15, packed=False, target=0.54),
    "bert-large packed": Case(LARGE, 64, 512, 0.15),
    "gpt2-124m plain": Case(GPT, 64, 1024, packed=False, target=0.47),
    "gpt2-124m packed": Case(GPT, 64, 1024),
    "gpt2-124m xla": Case(GPT, 16, 1024, attention="xla"),
    "gpt2-124m muon": Case(GPT, 64, 1024, optimizer="muon"),
    "gpt2-350m plain": Case(replace(GPT2_MEDIUM, **DRY), 32, 1024, packed=False, target=0.51),
    "gpt-1.3b plain": Case(GPT_1B, 8, 2048, packed=False, target=0.56),
    "llama-7b plain": Case(LLAMA_7B, 2, 4096, packed=False, remat="full", target=0.58, memory=130),
    "encoder-17m packed": Case(_encoder(7, 256, 4, 384), 256, 1024, 0.3),
    "encoder-32m packed": Case(_encoder(10, 384, 6, 576), 128, 1024, 0.3),
    "encoder-68m packed": Case(_encoder(19, 512, 8, 768), 96, 1024, 0.3),
    "encoder-150m packed": Case(_encoder(22, 768, 12, 1152), 64, 1024, 0.3),
    "encoder-150m plain": Case(_encoder(22, 768, 12, 1152), 64, 1024, 0.3, packed=False),
}
QUICK = {
    "tiny-masked packed": Case(replace(BERT, **TINY), 4, 64, 0.15),
    "tiny-causal plain": Case(replace(GPT, **TINY), 4, 64, packed=False),
}
"""For machines without a GPU: that everything runs."""


def batches_of(case: Case, count: int) -> list[dict[str, np.ndarray]]:
    """Made-up batches. Packed rows are filled with documents of log-normal length, median a fifth of the row."""
    random = np.random.default_rng(0)
    shape, found = (case.rows, case.length), []
    for _ in range(count):
        ids = random.integers(8, case.model.vocab_size, shape, dtype=np.int32)
        segments = np.ones(shape, np.int32)
        for row in segments if case.packed else ():
            ends = np.cumsum(random.lognormal(np.log(case.length / 5), 0.8, case.length).astype(int) + 8)
            for end in ends[ends < case.length]:
                row[end:] += 1
        begins = np.diff(segments, axis=1, prepend=0) != 0
        places = np.arange(case.length, dtype=np.int32)
        positions = (places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)).astype(np.int32)
        batch = {"input_ids": ids, "segment_ids": segments, "positions": positions}
        if not case.packed:
            batch["row_lengths"] = np.full(case.rows, case.length, np.int32)
        if case.model.causal:
            batch |= {"labels": np.roll(ids, -1, axis=1), "label_bytes": np.ones(shape, np.int32)}
            batch["loss_weights"] = np.ones(shape, np.float32)
        found.append(batch)
    return found


def model_flops(case: Case, batch: dict[str, np.ndarray]) -> float:
    """Of a step: causal pairs once, no pair across documents, the head at predicted places, nothing twice."""
    tokens = case.rows * case.length
    forward = tokens * sum(product.flops for product in products(case.model, case.rate))
    for row in batch["segment_ids"]:
        for size in np.unique(row[row > 0], return_counts=True)[1]:
            forward += size * sum(attention_flops(case.model, kind, int(size)) for kind in case.model.layers)
    return 3 * float(forward)


def measure(name: str, steps: int) -> dict[str, Any]:
    """Times `steps` steps, each until its loss is known, one step behind as in a run."""
    import jax
    import jax.numpy as jnp

    from espalier.models.description import describe
    from espalier.models.transformer import init_params, matrix_axes
    from espalier.training.config import OptimizerConfig, TrainConfig
    from espalier.training.optimizer import build_optimizer
    from espalier.training.start import first_state
    from espalier.training.step import jit_train_step
    from sharding.mesh import MeshConfig, build_mesh, place_batch
    from sharding.topology import chip_of

    case = (CASES | QUICK)[name]
    model, device = case.model, jax.local_devices()[0]
    head = "causal_lm" if model.causal else "masked_lm"
    mesh = build_mesh(MeshConfig(data=1), [device])

    def init(key):
        return init_params(model, key, (head,))

    with jax.set_mesh(mesh):
        settings = OptimizerConfig(name=case.optimizer, learning_rate=1e-4)
        shapes = jax.eval_shape(init, jax.random.key(0))
        optimizer = build_optimizer(settings, shapes, matrix_axes(shapes))
        state = first_state(TrainConfig(optimizer=settings), init, optimizer, mesh, None)
        step = jit_train_step(_objective(case), optimizer, lambda _: jnp.float32(1.0), 1, state)
        made = batches_of(case, 4)
        batches = [place_batch(batch, mesh) for batch in made]
        began = time.perf_counter()
        state, metrics = step(state, batches[0])
        losses, compiled = [float(metrics["loss"])], time.perf_counter() - began
        ends, pending = [], metrics
        for number in range(1, WARM_UP + steps + 1):
            state, metrics = step(state, batches[number % len(batches)])
            losses.append(float(pending["loss"]))
            ends.append(time.perf_counter())
            pending = metrics
        seconds = statistics.median(np.diff(ends[WARM_UP - 1 :]).tolist())
        words = describe(model, head, case.execution, case.length, mesh, packed=case.packed)
    assert np.isfinite(losses).all(), losses
    tokens, flops = case.rows * case.length, statistics.mean(model_flops(case, batch) for batch in made)
    chip = chip_of(device)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    result = {
        "device": device.device_kind,
        "versions": {name: sys.modules[name].__version__ for name in ("jax", "jaxlib")},
        "parameters": count_params(model, head),
        "attention": words.get("attention", "xla"),
        "tokens": tokens,
        "step_seconds": seconds,
        "spread_seconds": float(np.ptp(np.quantile(np.diff(ends[WARM_UP - 1 :]), [0.1, 0.9]))),
        "compile_seconds": compiled,
        "tokens_per_second": tokens / seconds,
        "model_flops": flops,
        "mfu": flops / seconds / chip.flops if chip else None,
        "peak_bytes": memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": [losses[0], losses[-1]],
    }
    return result | planned(case, chip)


def planned(case: Case, chip: Any) -> dict[str, Any]:
    """What `plan` says of this step, for rows of one document; of an H100 where there is no chip."""
    from espalier.commands.plan.time.amounts import Job
    from espalier.commands.plan.time.roofline import step_time
    from espalier.models.memory import step_memory
    from espalier.models.transformer import scans
    from espalier.training.optimizers import OPTIMIZERS
    from sharding.topology import chip_named

    chip, model = chip or chip_named("h100"), case.model
    job = Job(
        model=model,
        chip=chip,
        sequence_length=case.length,
        batch_rows=case.rows,
        mesh={},
        predicted_fraction=case.rate,
        remat=case.remat,
        scan=scans(model, case.execution, "gpu"),
        optimizer=case.optimizer,
        attention="stored" if case.attention == "xla" else "fused",
    )
    kind = OPTIMIZERS[case.optimizer]
    memory = step_memory(
        model,
        "causal_lm" if model.causal else "masked_lm",
        {},
        rows=case.rows,
        length=case.length,
        remat=case.remat,
        attention=case.attention if case.attention != "auto" else "triton",
        moments=(kind.moments, kind.matrix_moments),
        scan=job.scan,
    )
    parts = step_time(job)
    seconds = parts.step
    mfu = case.rows * case.length * flops_per_token(model, case.length, case.rate) / seconds / chip.flops
    seconds_of = {name: getattr(parts, name) for name in ("matmul", "attention", "memory", "optimizer", "launch")}
    return {"planned_seconds": seconds, "planned_bytes": memory.total, "planned_mfu": mfu, "planned_parts": seconds_of}


def _objective(case: Case):
    from clm.loss import causal_lm_objective
    from mlm.config import MaskingConfig
    from mlm.loss import masked_lm_objective
    from mlm.masking import Vocabulary

    if case.model.causal:
        return causal_lm_objective(case.model, execution=case.execution)
    ordinary = np.arange(case.model.vocab_size) >= 8
    vocabulary = Vocabulary(4, ordinary, np.zeros(case.model.vocab_size, np.uint8))
    masking = MaskingConfig(rate=case.rate)
    return masked_lm_objective(
        case.model, masking, vocabulary, rate=lambda step, train: case.rate, execution=case.execution
    )


def summary(case: Case) -> dict[str, Any]:
    """The case in JSON values."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    facts = {name: value for name, value in dataclasses.asdict(case).items() if name != "model"}
    return facts | {name: getattr(case.model, name) for name in sizes}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))), flush=True)
