"""The train step of a preset as a program: exactly what the doors run, on a mesh of devices that need not be here."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.models.config import ModelConfig
from espalier.models.transformer import init_params, matrix_axes
from espalier.training.optimizer import build_optimizer, schedule
from espalier.training.start import abstract_state
from espalier.training.step import Objective, jit_train_step
from sharding.mesh import batch_sharding


class Program(NamedTuple):
    """A train step that is ready to be compiled."""

    lowered: jax.stages.Lowered
    arguments: tuple[Any, dict]
    """(state, batch): shapes, types and shardings."""


def lower_step(config: Any, mesh: Mesh) -> Program:
    """The train step of a pretraining configuration, lowered for `mesh`.

    UserError where the layout does not fit the model, before anything is compiled.
    """
    model = config.model.fitted(config.model.vocab_size, config.data.sequence_length)
    head, objective, names = _causal(config, model) if model.causal else _masked(config, model)

    def init(key):
        return init_params(model, key, heads=(head,))

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
        optimizer = build_optimizer(config.optimizer, shapes, matrix_axes(shapes))
        state = abstract_state(config, init, optimizer, mesh)
        step = jit_train_step(
            objective, optimizer, schedule(config.optimizer, config.steps), config.accumulation, state
        )
        shape = (config.batch_size, config.data.sequence_length)
        layout = batch_sharding(shape, mesh)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in names.items()}
        return Program(step.lower(state, batch), (state, batch))


TOKENS = {"input_ids": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}


def _causal(config: Any, model: ModelConfig) -> tuple[str, Objective, dict]:
    from clm.loss import causal_lm_objective

    names = TOKENS | {"labels": jnp.int32, "loss_weights": jnp.float32, "label_bytes": jnp.int32}
    return "causal_lm", causal_lm_objective(model, execution=config.execution), names


def _masked(config: Any, model: ModelConfig) -> tuple[str, Objective, dict]:
    from mlm.loss import masked_lm_objective
    from mlm.masking import Vocabulary, rate_at

    # Which ids are special changes no shape.
    vocabulary = Vocabulary(4, np.arange(model.vocab_size) >= 5, np.zeros(model.vocab_size, np.uint8))
    objective = masked_lm_objective(
        model,
        config.masking,
        vocabulary,
        rate=lambda step: rate_at(config.masking, step, config.steps),
        execution=config.execution,
    )
    return "masked_lm", objective, TOKENS
