"""The train step of a configuration as a program: exactly what training runs, for devices that may be absent."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from espalier.commands.plan.objectives import objective_of
from espalier.models.transformer import matrix_axes
from espalier.pretraining.objective import Setup
from espalier.training.optimizer import build_optimizer, schedule
from espalier.training.sparsity import projection
from espalier.training.start import abstract_state
from espalier.training.step import jit_train_step
from sharding.mesh import batch_sharding


class Program(NamedTuple):
    """A lowered train step."""

    lowered: jax.stages.Lowered
    arguments: tuple[Any, dict]
    """(state, batch): shapes, types and shardings."""


def lower_step(config: Any, mesh: Mesh) -> Program:
    """The train step of a pretraining configuration, lowered for `mesh`.

    UserError if the layout does not divide the model, before anything is compiled.
    """
    model = config.model.fitted(config.model.vocab_size, config.data.sequence_length)
    record = objective_of(config)
    setup = Setup(config, model, tokenizer=None)
    objective = record.build(setup)

    def init(key):
        return record.fresh(setup, key)

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
        matrices = (record.matrix_axes or matrix_axes)(shapes)
        optimizer = build_optimizer(config.optimizer, shapes, matrices)
        project = projection(config.optimizer.sparsity, shapes, matrices, config.steps)
        state = abstract_state(config, init, optimizer, mesh)
        step = jit_train_step(
            objective, optimizer, schedule(config.optimizer, config.steps), config.accumulation, state, project
        )
        shape = (config.batch_size, config.data.sequence_length)
        split = batch_sharding(shape, mesh, tokens=1)
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in record.arrays(config).items()
        }
        return Program(step.lower(state, batch), (state, batch))
