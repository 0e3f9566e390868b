"""Everything that changes from step to step, as one tree: what is donated, sharded and saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.training.bad_steps import new_health
from espalier.training.config import OptimizerConfig
from espalier.training.optimizers import RATES
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
    """Those of training.optimizers.RATES, float32 scalars: peaks, and weight_decay."""
    health: dict[str, jax.Array]
    """What is known of the steps until now (training.bad_steps.new_health)."""
    frozen: Any = field(default_factory=dict)
    """Parameters that do not change (the base under adapters, a reference model), laid out like `params`; often none.
    Paths are their own, within the same tree as those of `params` or beside it, but for stacks of layers of which the
    first are frozen: see `combined`."""

    @property
    def complete(self) -> Any:
        """Trained and frozen parameters: what the model is applied to."""
        return combined(self.params, self.frozen)


def combined(params: Any, frozen: Any) -> Any:
    """Trainable and frozen parameters as the one tree that a model is applied to.

    No leaf may be in both, but for those of repeated layers [R, …], `layers/period/…`: there the frozen ones are the
    first layers of the stack and the trained ones the others. Of shapes, shapes.
    """
    return _merged(params, frozen, "") if frozen else params


def _merged(params: Any, frozen: Any, path: str) -> Any:
    if isinstance(params, Mapping) and isinstance(frozen, Mapping):
        both = params.keys() & frozen.keys()
        return {**params, **frozen} | {name: _merged(params[name], frozen[name], f"{path}/{name}") for name in both}
    return _stacked(params, frozen, path)


def _stacked(last: Any, first: Any, path: str) -> Any:
    assert "layers/period/" in path and last.shape[1:] == first.shape[1:], f"{path} is both trained and frozen"
    if isinstance(last, jax.ShapeDtypeStruct):
        rows = last.shape[0] + first.shape[0]
        return jax.ShapeDtypeStruct((rows, *last.shape[1:]), last.dtype, sharding=last.sharding)
    numpy = isinstance(last, np.ndarray) and isinstance(first, np.ndarray)
    return (np if numpy else jnp).concatenate([first, last])


def new_state(
    params: Any, init_opt_state: Callable[[Any], Any], config: OptimizerConfig, key: jax.Array, frozen: Any = None
) -> TrainState:
    """The state at step 0 around `params`; frozen: parameters that stay as they are."""
    rates = {name: getattr(config, name) for name in RATES}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=init_opt_state(params),
        key=jax.random.key_data(key),
        rates={name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()},
        health=new_health(),
        frozen={} if frozen is None else frozen,
    )


def shard_state(shapes: TrainState, mesh: Mesh) -> TrainState:
    """The state of shapes with a sharding on every leaf: moments like their parameter, the rest on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: everywhere, shapes),
        params=shard_params(shapes.params, mesh),
        frozen=shard_params(shapes.frozen, mesh),
        opt_state=shard_like_params(shapes.opt_state, shapes.params, mesh),
    )
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
