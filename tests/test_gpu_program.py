"""The train step as a program for a GPU that is not here: what it never holds, whom it never asks, what it takes over.

The program is read as JAX hands it to XLA; only XLA for GPUs can make it faster or larger from there.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from absent_gpu import h100

import clm.presets
import mlm.presets
from espalier.models.transformer import init_params, matrix_axes
from espalier.pretraining.objective import Setup
from espalier.task import find
from espalier.training.optimizer import build_optimizer
from espalier.training.start import abstract_state
from espalier.training.step import jit_train_step

V, T, B = 20_480, 512, 16
CHUNK = 2**24
"""Scores over the vocabulary that models.vocabulary holds at a time."""
SIZES = dict(
    vocab_size=V,
    hidden_size=64,
    num_hidden_layers=2,
    prefix_layers=("local",),
    layer_period=("global",),
    sliding_window=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
)
PRESETS = {"masked_lm": mlm.presets.modern_base, "causal_lm": clm.presets.llama_1b}


@pytest.mark.parametrize("task", PRESETS)
def test_the_step_on_a_gpu(task):
    """No scores of all tokens, no [T, T], no host; every array of the state is taken over; products in bfloat16."""
    config = PRESETS[task]()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **SIZES),
        batch_size=B,
        data=dataclasses.replace(config.data, sequence_length=T),
    )
    record, mesh = find(task), h100()
    with jax.sharding.use_abstract_mesh(mesh):
        objective = record.build(Setup(config, config.model, tokenizer=None))  # pyright: ignore

        def init(key):
            return init_params(config.model, key, heads=(record.head,))

        shapes = jax.eval_shape(init, jax.random.key(0))
        optimizer = build_optimizer(config.optimizer, shapes, matrix_axes(shapes))
        state = abstract_state(config, init, optimizer, mesh)  # pyright: ignore
        step = jit_train_step(objective, optimizer, lambda _: jnp.float32(1), 1, state)
        arrays = record.arrays(config)  # pyright: ignore
        batch = {name: jax.ShapeDtypeStruct((B, T), dtype) for name, dtype in arrays.items()}
        traced = step.jitted.trace(dataclasses.replace(state, frozen={}), state.frozen, batch)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()

    called = set(re.findall(r"custom_call @([\w.$]+)", program))
    assert called == {"__gpu$xla.gpu.triton"}, "the attention kernel, and nothing of the host"
    assert "infeed" not in program and "outfeed" not in program and "send" not in program
    sizes = set(re.findall(r"tensor<((?:\d+x)+)[a-z]", program))
    found = {tuple(map(int, each[:-1].split("x"))) for each in sizes}
    assert max(map(math.prod, found)) <= CHUNK < B * T * V * (0.3 if task == "masked_lm" else 1)
    assert any(V in shape for shape in found) and not any(shape.count(T) > 1 for shape in found)
    assert program.count("tf.aliasing_output") == len(jax.tree.leaves(state))
    operands = re.findall(r"dot_general .*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)", program)
    assert len(operands) > 20 and set(operands) == {("bf16", "bf16")}
