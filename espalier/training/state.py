"""Everything that changes from step to step, as one tree: what is donated, sharded and saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.training.config import OptimizerConfig
from sharding.rules import shard_like_params, shard_params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """One training run at one step.

    Rates are values in the state, not constants of the program, so that runs which differ only in them share one
    compiled step and can be vmapped.
    """

    step: jax.Array
    """Optimizer steps done, int32 scalar."""
    params: Any
    opt_state: Any
    key: jax.Array
    """Raw key data (uint32) of the run's random key; never split, only folded with the step."""
    rates: dict[str, jax.Array]
    """learning_rate, muon_learning_rate (peaks) and weight_decay, float32 scalars."""


def new_state(params: Any, init_opt_state: Callable[[Any], Any], config: OptimizerConfig, key: jax.Array) -> TrainState:
    """The state at step 0 around `params`."""
    rates = {name: getattr(config, name) for name in ("learning_rate", "muon_learning_rate", "weight_decay")}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=init_opt_state(params),
        key=jax.random.key_data(key),
        rates={name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()},
    )


def shard_state(shapes: TrainState, mesh: Mesh) -> TrainState:
    """The state of shapes with a sharding on every leaf: moments like their parameter, the rest on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: everywhere, shapes),
        params=shard_params(shapes.params, mesh),
        opt_state=shard_like_params(shapes.opt_state, shapes.params, mesh),
    )
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
