"""Espalier in a race: the step that every run takes, in the order in which its loop takes it.

python -m benchmarks.ours FOLDER STEPS [float32|bfloat16|products] [scan|unrolled|auto]

products: activations in float32, factors of products in bfloat16.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.contender import report  # noqa: E402
from benchmarks.work import WEIGHTS, Work, model_of, read  # noqa: E402
from clm.loss import causal_lm_objective  # noqa: E402
from espalier.models.config import Execution  # noqa: E402
from espalier.models.hub import load_pretrained  # noqa: E402
from espalier.models.transformer import init_params, matrix_axes  # noqa: E402
from espalier.training.config import OptimizerConfig, TrainConfig  # noqa: E402
from espalier.training.optimizer import build_optimizer  # noqa: E402
from espalier.training.start import first_state  # noqa: E402
from espalier.training.step import jit_train_step  # noqa: E402
from mlm.config import MaskingConfig  # noqa: E402
from mlm.loss import masked_lm_objective  # noqa: E402
from mlm.masking import Vocabulary  # noqa: E402
from sharding.mesh import MeshConfig, build_mesh, place_batch  # noqa: E402


def main(folder: str, steps: str, dtype: str = "auto", layers: str = "auto") -> None:
    work, arrays = read(Path(folder))
    kind: Any = {"dtype": "float32", "products": "bfloat16"} if dtype == "products" else {"dtype": dtype}
    execution = Execution(**kind, scan_layers={"scan": True, "unrolled": False}.get(layers))
    model = model_of(work)
    # One device, as the others use.
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])

    def init(key):
        return init_params(model, key, (work.objective,))

    with jax.set_mesh(mesh):
        settings = OptimizerConfig(learning_rate=work.learning_rate, weight_decay=work.weight_decay)
        shapes = jax.eval_shape(init, jax.random.key(0))
        optimizer = build_optimizer(settings, shapes, matrix_axes(shapes))

        def load(abstract):
            _, params, _ = load_pretrained(Path(folder, WEIGHTS))
            return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, abstract)

        state = first_state(TrainConfig(optimizer=settings), init, optimizer, mesh, None, load)
        step = jit_train_step(_objective(work, model, execution), optimizer, lambda step: jnp.float32(1.0), 1, state)
        losses, ends = [], []
        pending: Any = None
        for number in range(int(steps)):
            batch = place_batch(_batch(work, arrays, number), mesh)
            state, metrics = step(state, batch)
            # The device works on this step while the host reads the one before.
            if pending is not None:
                losses.append(float(pending["loss"]))
                ends.append(time.perf_counter())
            pending = metrics
        losses.append(float(pending["loss"]))
        ends.append(time.perf_counter())
        jax.block_until_ready(state)
    report(BEGAN, losses, ends, {name: sys.modules[name].__version__ for name in ("jax", "jaxlib", "numpy")})


def _objective(work: Work, model, execution: Execution):
    if work.objective == "causal_lm":
        return causal_lm_objective(model, execution=execution)
    ordinary = np.ones(work.vocabulary, bool)
    return masked_lm_objective(
        model,
        MaskingConfig(rate=work.mask_rate),
        Vocabulary(4, ordinary, np.zeros(work.vocabulary, np.uint8)),
        rate=lambda step, train: work.mask_rate,
        execution=execution,
        # The batches of a race are masked already, alike for all.
        mask=lambda batch, *rest: batch,
    )


def _batch(work: Work, arrays: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    ids, labels = arrays["input_ids"][number], arrays["labels"][number]
    positions = np.broadcast_to(np.arange(work.length, dtype=np.int32), ids.shape)
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "positions": positions}
    if work.objective == "causal_lm":
        weights = np.ones(ids.shape, np.float32)
        # What follows a row is not known.
        weights[:, -1] = 0
        return batch | {"labels": labels, "loss_weights": weights, "label_bytes": np.ones_like(ids)}
    weights = np.ones(labels.shape, np.float32)
    places = arrays["masked_positions"][number]
    return batch | {"masked_positions": places, "masked_labels": labels, "masked_weights": weights}


if __name__ == "__main__":
    main(*sys.argv[1:])
