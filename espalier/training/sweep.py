"""Seeds × learning rates at once, with one compiled program.

Learning rate and key are values in the state, so runs that differ in them share a step. Every run is what it would be
alone, with the initial weights, data order, masks and dropout of its seed. All runs stand in memory at once.

On GPUs, TPUs and meshes the step of a single run stands under two `vmap`s; sums of a batched product may be taken in
another order, so that losses agree to float32 rounding and not bit by bit. XLA's batched products are slow on a CPU
(five runs cost seven times one): there each run has a thread, and the threads share the cores and the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier import progress
from espalier.errors import UserError
from espalier.training.config import TrainConfig
from espalier.training.evaluation import make_evaluate
from espalier.training.optimizer import build_optimizer, schedule
from espalier.training.sparsity import projection
from espalier.training.start import run_keys
from espalier.training.state import TrainState, new_state
from espalier.training.step import Objective, make_train_step


class Sweep(NamedTuple):
    """What came of S seeds × R learning rates in `steps` steps."""

    rows: list[dict[str, float]]
    """A row for each run: seed, learning_rate, train_loss (of the last step) and the metrics of the evaluation."""
    loss_SRs: np.ndarray
    """Training loss of every step, float32 [S, R, steps]; not finite where a run diverged."""
    params: Any
    """The parameters at the end, each leaf [S, R, …]."""

    @property
    def best(self) -> dict[str, float]:
        """The row with the lowest evaluation loss (training loss where nothing was evaluated)."""
        finite = [row for row in self.rows if math.isfinite(row.get("loss", row["train_loss"]))]
        if not finite:
            raise UserError("every run of the sweep diverged; try lower learning rates")
        return min(finite, key=lambda row: row.get("loss", row["train_loss"]))


def sweep(
    config: TrainConfig,
    *,
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    params_of: Callable[[int], Any],
    matrix_axes: Callable[[Any], Any],
    objective: Objective,
    batch_of: Callable[[int, int], dict],
    mesh: Mesh,
    depths: Callable[[Any], Any] | None = None,
    eval_batches: Iterable[dict] = (),
    finalize_eval: Callable[[dict[str, float]], dict[str, float]] = dict,
    vmapped: bool | None = None,
) -> Sweep:
    """Train every seed with every rate for config.steps, and evaluate each at the end. Nothing is written.

    params_of: seed → first parameters. batch_of: (seed, step) → that step's batch, NumPy. The rest as in
    training.loop.train. A rate is the peak of the schedule; under Muon its own rate changes in proportion.
    vmapped: by vmap, else by threads, which take a mesh of one device; unset = by what is faster there.
    """
    if not seeds or not learning_rates:
        raise UserError("a sweep needs one or more seeds and one or more learning_rates")
    if config.keep_best or config.early_stopping.patience is not None:
        raise UserError("a sweep keeps no checkpoints and ends no run early; leave out keep_best and early_stopping")
    if objective.collect is not None:
        raise UserError("a sweep has no place for what an objective collects from its state; train the runs one by one")
    if jax.process_count() > 1:
        raise UserError("a sweep runs in one process; start it on one host")
    peak = config.optimizer.learning_rate
    assert peak is not None and config.steps is not None
    with jax.set_mesh(mesh):
        first_S = [params_of(seed) for seed in seeds]
        shapes = jax.eval_shape(lambda params: params, first_S[0])
        layers = depths(shapes) if depths else None
        matrices = matrix_axes(shapes)
        optimizer = build_optimizer(config.optimizer, shapes, matrices, depths=layers)
        project = projection(config.optimizer.sparsity, shapes, matrices, config.steps)

        def begin(params: Any, key: jax.Array, rate: jax.Array) -> TrainState:
            # A copy, for the steps of a run take its memory, and all rates begin with the same weights.
            params = jax.tree.map(jnp.copy, params)
            state = new_state(params, optimizer.init, config.optimizer, jax.random.wrap_key_data(key))
            muon = state.rates["muon_learning_rate"] * (rate / peak)
            return dataclasses.replace(state, rates=state.rates | {"learning_rate": rate, "muon_learning_rate": muon})

        factor = schedule(config.optimizer, config.steps)
        step = make_train_step(objective, optimizer, factor, config.accumulation, project)
        begun = jax.jit(begin)
        states = [
            [begun(params, jax.random.key_data(run_keys(seed)[1]), jnp.float32(rate)) for rate in learning_rates]
            for seed, params in zip(seeds, first_S, strict=True)
        ]
        del first_S
        if vmapped is None:
            vmapped = mesh.size > 1 or mesh.devices.flat[0].platform != "cpu"
        with progress.waiting(f"training {len(seeds) * len(learning_rates)} runs at once") as far:
            states, loss_SRs = (_vmapped if vmapped else _threaded)(
                step, states, lambda s, number: batch_of(seeds[s], number), config.steps, mesh, far
            )

        evaluate = make_evaluate(objective, eval_batches, mesh, finalize_eval, config.accumulation)
        rows = []
        for s, seed in enumerate(seeds):
            for r, rate in enumerate(learning_rates):
                row = {"seed": seed, "learning_rate": rate, "train_loss": float(loss_SRs[s, r, -1])}
                if eval_batches:
                    row |= evaluate(states[s][r]) or {}
                rows.append(row)
        return Sweep(rows, loss_SRs, _stacked([_stacked([state.params for state in runs]) for runs in states]))


States = list[list[TrainState]]
"""[S][R]"""
BatchOf = Callable[[int, int], dict]
"""(index of the seed, step) → batch"""


def _vmapped(
    step: Any, states: States, batch_of: BatchOf, steps: int, mesh: Mesh, far: Callable[[str], None]
) -> tuple[States, np.ndarray]:
    """The states after so many steps, without what only the optimizer needs, and the losses [S, R, steps]."""
    state_SR = _stacked([_stacked(runs) for runs in states])
    shape = len(states), len(states[0])
    states.clear()
    # A batch belongs to a seed and serves all rates.
    step_SR = jax.jit(jax.vmap(jax.vmap(step, in_axes=(0, None))), donate_argnums=0)
    losses = []
    for number in range(steps):
        batch_S = _stacked(_alike([batch_of(s, number) for s in range(shape[0])]))
        state_SR, metrics = step_SR(state_SR, batch_S)
        losses.append(metrics["loss"])
        far(f"step {number + 1:,} of {steps:,}")
    loss_SRs = np.stack([np.asarray(loss_SR) for loss_SR in losses], axis=-1)
    state_SR = dataclasses.replace(state_SR, opt_state=())
    return [
        [jax.tree.map(lambda leaf, s=s, r=r: leaf[s, r], state_SR) for r in range(shape[1])] for s in range(shape[0])
    ], loss_SRs


def _threaded(
    step: Any, states: States, batch_of: BatchOf, steps: int, mesh: Mesh, far: Callable[[str], None]
) -> tuple[States, np.ndarray]:
    """As _vmapped; bit by bit what the runs would be alone."""
    loss_SRs = np.full((len(states), len(states[0]), steps), np.nan, np.float32)
    done = {(s, r): 0 for s, runs in enumerate(states) for r in range(len(runs))}
    jitted = jax.jit(step, donate_argnums=0)
    compiled: set[str] = set()
    compiling, stop = threading.Lock(), threading.Event()
    caller: Any = jax.config
    precision, nans = caller.jax_default_matmul_precision, caller.jax_debug_nans

    def train(s: int, r: int) -> None:
        losses = []
        # What the caller has set for its own thread.
        with jax.set_mesh(mesh), jax.default_matmul_precision(precision), jax.debug_nans(nans):
            while done[s, r] < steps and not stop.is_set():
                batch = batch_of(s, done[s, r])
                shapes = str(jax.tree.map(np.shape, batch))
                # The first that brings rows of a new length compiles their program; the others wait for it.
                with contextlib.nullcontext() if shapes in compiled else compiling:
                    states[s][r], metrics = jitted(states[s][r], batch)
                    compiled.add(shapes)
                losses.append(metrics["loss"])
                done[s, r] += 1
            states[s][r] = dataclasses.replace(states[s][r], opt_state=())
            loss_SRs[s, r, : len(losses)] = jax.device_get(losses)

    with ThreadPoolExecutor(len(done)) as pool:
        futures = [pool.submit(train, s, r) for s, r in done]
        try:
            while futures:
                ended, waiting = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                futures = list(waiting)
                far(f"step {min(done.values()):,} of {steps:,}")
        finally:
            stop.set()
    return states, loss_SRs


def _alike(batches: Sequence[dict]) -> list[dict]:
    """Batches whose rows are as long as the longest of them: rows of another seed may be longer. Zeros are padding."""

    def widened(*arrays: np.ndarray) -> list[np.ndarray]:
        shape = np.max([array.shape for array in arrays], axis=0)

        def padding(array: np.ndarray) -> list[tuple[int, int]]:
            return [(0, most - size) for most, size in zip(shape, array.shape, strict=True)]

        return [np.pad(array, padding(array)) for array in arrays]

    columns = [widened(*leaves) for leaves in zip(*map(jax.tree.leaves, batches), strict=True)]
    tree = jax.tree.structure(batches[0])
    return [jax.tree.unflatten(tree, leaves) for leaves in zip(*columns, strict=True)]


def _stacked(trees: Sequence[Any]) -> Any:
    """One tree with a leading axis, of many alike."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)
