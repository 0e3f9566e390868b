"""A model small enough to train in milliseconds, with the parameter names of a real one."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.training import loop
from espalier.training.config import CheckpointConfig, OptimizerConfig, TrainConfig
from espalier.training.frozen import Frozen
from espalier.training.loop import Result
from espalier.training.run import RunDirectory
from espalier.training.start import find_origin
from espalier.training.step import Objective
from espalier.training.trainable import Trainable
from sharding.mesh import MeshConfig, build_mesh

VOCAB, WIDTH, LENGTH, ROWS = 32, 16, 8, 16


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    """Toy programs run for microseconds and compile for seconds. To be imported by the test files they concern."""
    settings = {
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (str(tmp_path_factory.mktemp("programs")), None),
        "jax_persistent_cache_min_compile_time_secs": (0, 1),
        "jax_persistent_cache_min_entry_size_bytes": (-1, 0),
    }
    for name, (value, _) in settings.items():
        jax.config.update(name, value)
    yield
    MADE.clear()
    for name, (_, default) in settings.items():
        jax.config.update(name, default)


MADE: dict[Any, tuple[Any, Any]] = {}
"""What `made_once` made → (its arguments, so that no other object gets their ids; what was made)."""


def made_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, a pure function, called once for all arguments that are equal: its jitted functions stay traced.

    Equal are arrays of one shape, type and sharding, hashables that compare equal, and else the same object.
    """

    def key(leaf):
        if hasattr(leaf, "dtype"):
            return leaf.shape, str(leaf.dtype), getattr(leaf, "sharding", None)
        try:
            hash(leaf)
        except TypeError:
            return id(leaf)
        return leaf

    @functools.wraps(make)
    def once(*arguments):
        leaves, structure = jax.tree.flatten(arguments, is_leaf=lambda part: part is EVAL_BATCHES)
        known = make, structure, *map(key, leaves)
        if known not in MADE:
            # The arrays themselves may be donated; what is made of them depends on none of their values.
            MADE[known] = [leaf for leaf in leaves if not hasattr(leaf, "dtype")], make(*arguments)
        return MADE[known][1]

    return once


def init_params(key):
    """Values that look random; sines compile in a fraction of the time of `jax.random.normal`."""
    start = jax.random.key_data(key).astype(jnp.float32).sum() % 1000

    def draw(number, *shape):
        return jnp.sin(jnp.arange(math.prod(shape)) * 12.9898 + start + number).reshape(shape)

    up = {"kernel": draw(1, 2, WIDTH, 32) / 3, "bias": jnp.zeros((2, 32))}
    return {
        "embeddings": {"token": {"embedding": draw(0, VOCAB, WIDTH)}},
        "layers": {"period": {"0": {"mlp": {"up": up, "down": {"kernel": draw(2, 2, 32, WIDTH) / 4}}}}},
        "head": {"causal_lm": {"kernel": draw(3, VOCAB, WIDTH) / 3}},
    }


def matrix_axes(params):
    axes = jax.tree.map(lambda _: None, params)
    mlp = {"up": {"kernel": ((1,), (2,)), "bias": None}, "down": {"kernel": ((1,), (2,))}}
    return axes | {"layers": {"period": {"0": {"mlp": mlp}}}}


@functools.cache
def objective(noise: float = 0.0) -> Objective:
    """Predict each label; a random part of them, drawn in prepare, counts (so that weights are uneven)."""

    def prepare(batch, key, step, train):
        chosen = jax.random.bernoulli(key, 0.5, batch["labels"].shape) * batch["loss_weights"]
        return batch | {"loss_weights": chosen}, jnp.maximum(chosen.sum(), 1.0)

    def loss(params, batch, key, norms, train):
        x = params["embeddings"]["token"]["embedding"][batch["input_ids"]]
        mlp = params["layers"]["period"]["0"]["mlp"]
        for layer in range(2):
            hidden = jax.nn.relu(x @ mlp["up"]["kernel"][layer] + mlp["up"]["bias"][layer])
            x = x + hidden @ mlp["down"]["kernel"][layer]
        if noise and train:
            x = x * jax.random.bernoulli(key, 1 - noise, x.shape)
        logits = x @ params["head"]["causal_lm"]["kernel"].T
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)[..., 0]
        total, weight = -jnp.sum(picked * batch["loss_weights"]), batch["loss_weights"].sum()
        hits = jnp.sum((logits.argmax(-1) == batch["labels"]) * batch["loss_weights"])
        return total / norms, {"loss": (total, weight), "accuracy": (hits, weight)}

    return Objective(prepare, loss)


def partly_frozen() -> dict[str, Any]:
    """Arguments of `run` with which the embeddings are frozen, and weigh each row before its step."""

    def part(frozen: bool):
        return lambda key: {name: p for name, p in init_params(key).items() if (name == "embeddings") == frozen}

    @jax.jit
    def spread_B(embedding, input_ids):
        return jnp.abs(embedding[input_ids]).mean((1, 2))

    def collect(state, batch, key):
        embedding = state.frozen["embeddings"]["token"]["embedding"]
        return batch | {"spread": spread_B(embedding, batch["input_ids"])}

    def prepare(batch, *rest):
        weights = batch["loss_weights"] * batch["spread"][:, None]
        return plain.prepare(batch | {"loss_weights": weights}, *rest)

    plain = objective()
    return {
        "init_params": part(False),
        "frozen": Frozen(part(True)),
        "matrix_axes": lambda params: jax.tree.map(lambda _: None, params),
        "objective": Objective(prepare, plain.loss, collect=collect),
    }


def batch(step: int, rows: int = ROWS) -> dict:
    """Rows of a little language (next = 3·this + 1) whose ends are padding, so that weights are uneven."""
    random = np.random.default_rng([7, step])
    ids = random.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32)
    weights = (np.arange(LENGTH) < random.integers(1, LENGTH + 1, (rows, 1))).astype(np.float32)
    return {"input_ids": ids, "labels": (3 * ids + 1) % VOCAB, "loss_weights": weights}


EVAL_BATCHES = [batch(10_000 + i) for i in range(3)]


def batches_from(step: int):
    while True:
        yield batch(step)
        step += 1


def config(run_dir, **changes) -> TrainConfig:
    defaults: dict[str, Any] = dict(
        steps=4,
        batch_size=ROWS,
        run_dir=str(run_dir),
        optimizer=OptimizerConfig(learning_rate=0.01),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(),
        log_every=1,
        eval_every=100,
    )
    return TrainConfig(**defaults | changes)


def trainable(config: TrainConfig, **changes) -> Trainable:
    task = Trainable(
        init_params=init_params,
        matrix_axes=matrix_axes,
        objective=objective(),
        batches_from=batches_from,
        eval_batches=EVAL_BATCHES,
        save_tokenizer=lambda folder: None,
        tokens_per_step=config.batch_size * LENGTH,
    )
    return dataclasses.replace(task, **changes)


def run(config: TrainConfig, **changes) -> Result:
    """Train the toy as an entry point would. changes: fields of Trainable, mesh, origin."""
    assert config.run_dir is not None
    directory = RunDirectory(config.run_dir)
    settings = {"steps": config.steps, "seed": config.seed, "batch_size": config.batch_size}
    settings |= {"optimizer": dataclasses.asdict(config.optimizer), "task": "causal_lm", "command": "toy"}
    settings["fingerprints"] = {"train": str(directory.path)}
    origin = find_origin(config, directory)
    directory.check(settings, settings, origin.done if origin else 0)
    origin = changes.pop("origin", origin)
    mesh = changes.pop("mesh", None) or build_mesh(config.mesh)
    task = trainable(config, **changes)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build_optimizer", "schedule", "jit_train_step", "make_evaluate"):
            patch.setattr(loop, name, made_once(getattr(loop, name)))
        return loop.train(config, task, directory, mesh, settings, origin)


def metrics_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
