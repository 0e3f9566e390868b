"""Where a run starts: resume → init_from → scratch, in this order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from espalier.contracts import Origin
from espalier.errors import UserError
from espalier.files import sha256_of_file
from espalier.training.config import TrainConfig
from espalier.training.fallback import MODEL, given_step, resumed_step
from espalier.training.frozen import Frozen, restore_frozen, restore_model, save_frozen
from espalier.training.manifest import MANIFEST
from espalier.training.optimizer import Optimizer
from espalier.training.restore import read_config, read_data, restore_optimizer, restore_state, saved_shapes
from espalier.training.run import RunDirectory
from espalier.training.state import TrainState, new_state, shard_state
from espalier.training.tracker import Interval
from sharding.rules import shard_params


class RunOrigin(NamedTuple):
    """A checkpoint of a run."""

    run_dir: Path
    step: int
    config: dict
    """As saved in that checkpoint."""
    resumed: bool

    @property
    def name(self) -> str:
        return f"{self.run_dir} at step {self.step}"

    @property
    def revision(self) -> str:
        run = RunDirectory(self.run_dir)
        return f"{run.path} at step {self.step}, SHA-256 {sha256_of_file(run.checkpoints / str(self.step) / MANIFEST)}"

    @property
    def tokenizer_folder(self) -> Path:
        return RunDirectory(self.run_dir).tokenizer

    @property
    def done(self) -> int:
        return self.step if self.resumed else 0

    def restore_params(self, abstract: Any) -> Any:
        """Of a run of several models: all of them, or the one that it is about (`part` of its configuration)."""
        part = self.config.get("part")
        if not part or part in abstract:
            return restore_model(self.run_dir, abstract, self.step, ignore=None if "head" in abstract else "head/")
        saved = saved_shapes(RunDirectory(self.run_dir).checkpoints, self.step)
        ignored = {f"{name}/" for name in (path.partition("/")[0] for path in saved) if name != part}
        ignored |= set() if "head" in abstract else {f"{part}/head/"}
        return restore_model(self.run_dir, {part: abstract}, self.step, ignore=tuple(sorted(ignored)))[part]


def find_origin(
    config: TrainConfig, run: RunDirectory, open_hub: Callable[[str], Origin] | None = None
) -> Origin | None:
    """Where the run starts, known before any work is done; None = scratch. UserError if it is to start from nothing.

    Its newest checkpoint is verified here, whole, and set aside where it is damaged (`training.fallback`).

    open_hub: opens what --init-from names with hf: before it.
    """
    run.check_shared()
    own = resumed_step(run)
    resumed = own is not None
    if not resumed and not config.init_from:
        return None
    if not resumed and config.init_from and config.init_from.startswith("hf:"):
        assert open_hub is not None
        if config.init_optimizer:
            raise UserError(f"{config.init_from} has weights and no optimizer state; leave out --init-optimizer")
        return open_hub(config.init_from)
    folder = run.path if resumed else Path(config.init_from or "").expanduser()
    items = (*MODEL, "opt_state") if config.init_optimizer else MODEL
    step = given_step(folder, items) if own is None else own
    return RunOrigin(folder, step, read_config(folder, step), resumed)


class Beginning(NamedTuple):
    """Where a session starts, before anything of it is read."""

    step: int
    words: str
    interval: Interval | None
    """Of the log that goes on."""
    tokens: int | None
    """Trained on so far; None where the checkpoint does not say."""
    skipped: dict[str, Any] | None = None
    """As training.bad_steps.SkippedSteps.carried."""


def beginning(origin: Origin | None, load_params: Callable[[Any], Any] | None = None) -> Beginning:
    """Where `first_state` will start from."""
    if isinstance(origin, RunOrigin) and origin.resumed:
        # Checkpoints of earlier versions have neither.
        data = read_data(origin.run_dir, origin.step)
        words, skipped = f"resumed at step {origin.step}", data.get("skipped")
        return Beginning(origin.step, words, data.get("interval"), data.get("tokens"), skipped)
    if origin is None and load_params is None:
        return Beginning(0, "from scratch", None, 0)
    return Beginning(0, f"from the weights of {origin.name if origin else 'another model'}", None, 0)


def first_state(
    config: TrainConfig,
    init_params: Callable[[jax.Array], Any],
    optimizer: Optimizer,
    mesh: Mesh,
    origin: Origin | None,
    load_params: Callable[[Any], Any] | None = None,
    frozen: Frozen | None = None,
) -> TrainState:
    """The state to go on from, laid out on the mesh. Writes nothing.

    load_params: parameter shapes with shardings → parameters; default: those of the origin. frozen: what the model
    needs and the run does not train.
    """
    base = _frozen_params(frozen, config, mesh, origin)
    return dataclasses.replace(_trained_state(config, init_params, optimizer, mesh, origin, load_params), frozen=base)


def _frozen_params(frozen: Frozen | None, config: TrainConfig, mesh: Mesh, origin: Origin | None) -> Any:
    own = origin if isinstance(origin, RunOrigin) and origin.resumed else None
    record = read_data(own.run_dir, own.step).get("frozen") if own else None
    if frozen is None:
        if own and record:
            raise UserError(
                f"the run in {own.name} has frozen parameters (from {record['origin']}) and these settings have "
                "none; give the settings that it was begun with, or another --run-dir"
            )
        return {}
    shapes = _abstract_frozen(frozen, mesh)
    if own:
        return restore_frozen(RunDirectory(own.run_dir).frozen, shapes, record)
    if frozen.load is not None:
        return frozen.load(shapes)
    layout = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(frozen.init, out_shardings=layout)(jax.random.fold_in(run_keys(config.seed)[0], 1))


def _abstract_frozen(frozen: Frozen, mesh: Mesh) -> Any:
    shapes = jax.eval_shape(frozen.init, jax.random.key(0))
    laid = zip(jax.tree.leaves(shapes), jax.tree.leaves(shard_params(shapes, mesh)), strict=True)
    leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for leaf, where in laid]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _trained_state(
    config: TrainConfig,
    init_params: Callable[[jax.Array], Any],
    optimizer: Optimizer,
    mesh: Mesh,
    origin: Origin | None,
    load_params: Callable[[Any], Any] | None,
) -> TrainState:
    around, scratch = _makers(config, init_params, optimizer)
    abstract = abstract_state(config, init_params, optimizer, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    if isinstance(origin, RunOrigin) and origin.resumed:
        return restore_state(origin.run_dir, abstract, origin.step)
    if load_params is not None:
        params = load_params(abstract.params)
    elif origin is not None:
        params = origin.restore_params(abstract.params)
    else:
        # It runs once: on CPUs, optimising it would take several times as long as running it.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(scratch, out_shardings=layout, compiler_options=quick)()
    state = jax.jit(around, out_shardings=layout, donate_argnums=0)(params)
    if config.init_optimizer and isinstance(origin, RunOrigin):
        state = dataclasses.replace(state, opt_state=restore_optimizer(origin.run_dir, abstract, origin.step))
    return state


def keep_frozen(run: RunDirectory, params: Any, frozen: Frozen, origin: Origin | None) -> dict[str, str]:
    """Write the frozen parameters of a run that begins; what each of its checkpoints is to remember of them."""
    if isinstance(origin, RunOrigin) and origin.resumed:
        return read_data(origin.run_dir, origin.step)["frozen"]
    return save_frozen(run.frozen, params, frozen.origin)


def abstract_state(
    config: TrainConfig, init_params: Callable[[jax.Array], Any], optimizer: Optimizer, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of the state on this mesh; UserError where an axis does not divide a parameter."""
    return shard_state(jax.eval_shape(_makers(config, init_params, optimizer)[1]), mesh)


def check_fork(config: TrainConfig, origin: Origin | None, fingerprints: dict[str, str]) -> None:
    """UserError if the run would go through the batches of the run that it continues once more, in the same order."""
    if not config.init_optimizer or origin is None or origin.resumed:
        return
    there = origin.config
    if (there.get("seed"), there.get("fingerprints", {}).get("train")) == (config.seed, fingerprints["train"]):
        raise UserError(
            f"--init-optimizer goes on from {origin.name}, and with its text and its seed {config.seed} the first "
            f"batches would be those it began with; try --seed {config.seed + 1}"
        )


def _makers(config: TrainConfig, init_params: Callable[[jax.Array], Any], optimizer: Optimizer):
    """(parameters → the state at step 0 around them, () → the same with fresh ones)."""

    def around(params):
        return new_state(params, optimizer.init, config.optimizer, run_keys(config.seed)[1])

    def scratch():
        return around(init_params(run_keys(config.seed)[0]))

    return around, scratch


def run_keys(seed: int) -> jax.Array:
    """The key of the parameters and the key of the run (data masks, dropout)."""
    return jax.random.split(jax.random.key(seed))
