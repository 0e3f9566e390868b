"""The task of a sparse autoencoder with its text at hand: a frozen model, and where the autoencoder begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from espalier import progress
from espalier.features import autoencoder as sparse
from espalier.features.examples import write_examples
from espalier.features.objective import NAME, autoencoder_objective, concluded, stream, takes_part
from espalier.features.saved import write_autoencoder
from espalier.models.counts import flops_per_token
from espalier.models.pretrained import load_weights
from espalier.models.transformer import init_params
from espalier.pretraining.objective import HeldOut, Setup
from espalier.pretraining.text import open_text
from espalier.task import Start, Task, Trained
from espalier.training.frozen import Frozen
from sharding.mesh import place_batch
from sharding.rules import shard_params

if TYPE_CHECKING:
    from espalier.features.record import AutoencoderTask

EXPANSION = 8
"""Features for each number of the stream, where nothing else is said."""
BEGINNING = 8
"""Batches from which scale and mean are taken."""


def open_autoencoder(record: AutoencoderTask, config: Any, start: Start) -> Task:
    """Text and model of a run, with the autoencoder as what is trained."""
    assert start.origin is not None
    width, layers = start.model.hidden_size, start.model.num_hidden_layers
    asked = config.autoencoder
    layer = asked.layer if asked.layer is not None else layers // 2
    count = asked.features or EXPANSION * width
    # What is left open is settled here, so that config.json says it.
    config = replace(config, autoencoder=replace(asked, layer=layer, features=count))
    frozen = _frozen(record, config, start)

    def finish(setup: Setup, text: HeldOut, trained: Trained) -> None:
        params = trained.collected
        if params is None:
            return
        said = {"model_name": config.init_from, "layer": layer, "context_size": config.data.sequence_length}
        write_autoencoder(trained.run.path / NAME, params[NAME], said)
        with progress.waiting("finding what fires each feature"):
            write_examples(trained.run.path, setup, params, text.batches, layer)

    def build(setup: Setup) -> Any:
        return autoencoder_objective(setup, record.text.build(setup).prepare, layer)

    as_text = replace(
        record.text,
        build=build,
        init_params=lambda setup, key: {NAME: sparse.init_autoencoder(key, width, count)},
        frozen=frozen,
        finalize=concluded,
        finish=finish,
        following=lambda run_dir: None,
    )
    task = open_text(as_text, config, start)
    assert task.frozen is not None and task.frozen.load is not None or start.origin.resumed
    length = config.data.sequence_length
    # A third of a training step of the model: forward alone.
    per_token = flops_per_token(task.model, length, 0.0) / 3 + 12.0 * width * count
    what = "random weights" if asked.random else start.origin.name
    told = f"{count:,} features, {asked.k} a token, of what enters layer {layer} of {layers} ({what})"
    return replace(
        task,
        config=config,
        scratch=False,
        load_params=_beginning(task, config, start, layer),
        flops_per_step=config.batch_size * length * per_token,
        data={"autoencoder": told, **task.data},
        summary=lambda step: {**task.summary(step), "parameters": 2 * width * count + width + count},
    )


def _frozen(record: AutoencoderTask, config: Any, start: Start) -> Callable[[Setup], Frozen]:
    """The language model: that of the origin, or one of its architecture with random weights."""
    origin = start.origin
    assert origin is not None

    def of(setup: Setup) -> Frozen:
        def init(key: jax.Array) -> dict:
            return init_params(setup.model, key, heads=(record.head,))

        def fresh(abstract: Any) -> Any:
            layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            return jax.jit(init, out_shardings=layout)(jax.random.key(config.seed))

        if config.autoencoder.random:
            return Frozen(init, fresh, f"random weights in the architecture of {origin.name}, seed {config.seed}")
        if origin.resumed:
            return Frozen(init)
        return Frozen(init, load_weights(origin, setup.model, record.head, init, config.seed), origin.revision)

    return of


def _beginning(task: Task, config: Any, start: Start, layer: int) -> Callable[[Any], Any]:
    """Shapes of what is trained → the parameters to begin with: scale and mean of the stream on the first batches, the
    decoder's bias at their geometric median (Gao et al. 2024, section 2.4)."""
    mesh, frozen = start.mesh, task.frozen
    assert frozen is not None
    setup = Setup(config, task.model, task.tokenizer)

    def load(abstract: Any) -> Any:
        assert frozen.load is not None
        shapes = jax.eval_shape(frozen.init, jax.random.key(0))
        laid = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shard_params(shapes, mesh),
        )
        model = frozen.load(laid)

        @jax.jit
        def seen(params: Any, batch: dict, key: jax.Array):
            batch, _ = task.objective.prepare(batch, key, jnp.int32(0), True)
            x_BTD = stream(setup, params, batch, layer)[0].astype(jnp.float32)
            part_BT = takes_part(batch)
            x_BTD = jnp.where(part_BT[..., None], x_BTD, 0.0)
            return x_BTD, part_BT, part_BT.sum(), x_BTD.sum((0, 1)), jnp.sum(x_BTD**2)

        tokens, first_D, second, median = 0.0, 0.0, 0.0, None
        for number in range(BEGINNING):
            batch = place_batch(task.batch(number), mesh)
            x_BTD, part_BT, count, sum_D, squares = seen(model, batch, jax.random.fold_in(jax.random.key(0), number))
            if median is None:
                median = jax.jit(sparse.geometric_median)(x_BTD, part_BT)
            tokens, first_D, second = tokens + float(count), first_D + sum_D, second + float(squares)
        tokens, width = max(tokens, 1.0), task.model.hidden_size
        scale = max((second / tokens / width) ** 0.5, 1e-12)
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)

        def begun(key: jax.Array, scale: jax.Array, mean_D: jax.Array, median_D: jax.Array) -> dict:
            fresh = task.init_params(key)[NAME]
            known = fresh["statistics"] | {"scale": scale, "mean": mean_D}
            decoder = fresh["decoder"] | {"bias": median_D / scale}
            return {NAME: fresh | {"decoder": decoder, "statistics": known}}

        key = jax.random.key(config.seed)
        return jax.jit(begun, out_shardings=layout)(key, jnp.float32(scale), first_D / tokens, median)

    return load
