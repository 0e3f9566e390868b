"""Where a run starts: resume → init_from → scratch, in this order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from training.checkpoint import Checkpoints, complete_steps, read_config, restore_optimizer, restore_params
from training.config import TrainConfig
from training.optimizer import Optimizer
from training.run import RunDirectory
from training.state import TrainState, new_state, shard_state


def first_state(
    config: TrainConfig,
    init_params: Callable[[jax.Array], Any],
    optimizer: Optimizer,
    mesh: Mesh,
    checkpoints: Checkpoints,
    load_params: Callable[[Any], Any] | None = None,
) -> tuple[TrainState, str]:
    """The state to go on from, laid out on the mesh, and in words where it came from.

    load_params: parameter shapes with shardings → parameters; default: those in the run config.init_from.
    """

    def around(params):
        return new_state(params, optimizer.init, config.optimizer, _keys(config.seed)[1])

    def scratch():
        return around(init_params(_keys(config.seed)[0]))

    abstract = shard_state(jax.eval_shape(scratch), mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    latest = checkpoints.latest()
    if latest is not None:
        state, _ = checkpoints.restore_state(abstract)
        return state, f"resumed at step {latest} from {checkpoints.folder}"

    if load_params is not None:
        params = load_params(abstract.params)
    elif config.init_from is not None:
        params = restore_params(config.init_from, abstract.params)
    else:
        # It runs once: on CPUs, optimising it would take several times as long as running it.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(scratch, out_shardings=layout, compiler_options=quick)(), "started from scratch"

    state = jax.jit(around, out_shardings=layout, donate_argnums=0)(params)
    if config.init_optimizer and config.init_from is not None:
        state = dataclasses.replace(state, opt_state=restore_optimizer(config.init_from, abstract))
    return state, f"started from the weights of {config.init_from or 'another model'}"


def check_origin(config: TrainConfig, run: RunDirectory) -> None:
    """UserError now, before any work, if the run must start from weights that are not there."""
    if config.init_from and not complete_steps(run.checkpoints):
        read_config(config.init_from)


def _keys(seed: int) -> jax.Array:
    """The key of the parameters and the key of the run (data masks, dropout)."""
    return jax.random.split(jax.random.key(seed))
