"""Checkpoints read: states, parameters, configurations, each only where it is what was written.

Orbax keeps no checksum of contents and casts types silently when it restores; both are checked here. Whoever reads,
reads alone: nothing here waits for other processes.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from espalier.errors import UserError
from espalier.training.manifest import complete_steps, fault, verify
from espalier.training.run import RunDirectory
from espalier.training.state import TrainState
from sharding.rules import path_of

# Every failure is raised to the loop; Orbax and its tasks would log pages of traces besides.
for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(lambda record: "orbax" not in record.pathname + record.getMessage())


def restore_saved(folder: str | Path, abstract: Any, ignore: str | tuple[str, ...] | None = None) -> Any:
    """What `save_params` wrote into this folder; arguments as in `restore_params`."""
    return restore_item(_step_folder(Path(folder), 0), "params", abstract, ignore)


def saved_shapes(folder: str | Path, step: int, item: str = "params") -> dict[str, Any]:
    """Path a/b/c → shape and type of what a step in a folder of checkpoints has of an item; reads no arrays."""
    place = _step_folder(Path(folder), step) / item
    return by_path(_saved_tree(place)) if place.is_dir() else {}


def saved_paths(folder: str | Path) -> set[str]:
    """The paths of the parameters that `save_params` wrote into this folder, a/b/c; reads no arrays."""
    return set(by_path(_saved_tree(_step_folder(Path(folder), 0) / "params")))


def restore_state(run_dir: str | Path, abstract: TrainState, step: int | None = None) -> TrainState:
    """The state of a run's checkpoint (default: the newest), laid out as `abstract` says; `frozen` stays as it is."""
    folder = _step_folder(RunDirectory(run_dir).checkpoints, step)
    return replace(_restore_rest(folder, abstract), params=restore_item(folder, "params", abstract.params))


def restore_params(
    run_dir: str | Path,
    abstract_params: Any = None,
    step: int | None = None,
    *,
    ignore: str | tuple[str, ...] | None = None,
) -> Any:
    """The trained parameters of a run's checkpoint (default: the newest); those with the frozen ones:
    `training.frozen.restore_complete`. The optimizer state is not read.

    abstract_params: ShapeDtypeStructs with shardings; None = NumPy arrays, everything there is. UserError lists
    what is missing, unexpected or of another shape or type; parameters whose path begins with `ignore` (or with one of
    several) may be there.
    """
    return restore_item(_step_folder(RunDirectory(run_dir).checkpoints, step), "params", abstract_params, ignore)


def restore_optimizer(run_dir: str | Path, abstract: TrainState, step: int | None = None) -> Any:
    """The optimizer state alone of a run's checkpoint (default: the newest), as `abstract.opt_state` says."""
    return _restore_rest(_step_folder(RunDirectory(run_dir).checkpoints, step), abstract).opt_state


def read_config(run_dir: str | Path, step: int | None = None) -> dict:
    """The configuration in a run's checkpoint (default: the newest where it is sound); reads no arrays."""
    folder = RunDirectory(run_dir).checkpoints
    newest = _step_folder(folder, step)
    steps = [int(newest.name)] if step is not None else reversed(complete_steps(folder))
    sound = next((there for there in steps if fault(folder / str(there), ["config"]) is None), None)
    return _json(newest if sound is None else folder / str(sound), "config")


def read_data(run_dir: str | Path, step: int) -> dict:
    """What stands beside a run's state: where the data goes on, and the interval of the log; {} in a model that was
    imported."""
    folder = _step_folder(RunDirectory(run_dir).checkpoints, step)
    return _json(folder, "data") if (folder / "data").is_dir() else {}


def _step_folder(folder: Path, step: int | None) -> Path:
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}; give the folder of a run that has saved one")
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, steps))}")
    return folder / str(steps[-1] if step is None else step)


def rest_of(state: TrainState) -> dict:
    """What is saved of a state beside the parameters."""
    rest = {"optimizer": state.opt_state, "rates": state.rates, "step": state.step, "key": state.key}
    return rest | {"health": state.health}


def by_path(tree: Any) -> dict[str, Any]:
    """a/b/c → leaf."""
    return {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _restore_rest(folder: Path, abstract: TrainState) -> TrainState:
    """`abstract` with everything but the parameters read."""
    if not (folder / "opt_state").is_dir():
        raise UserError(f"{folder} has weights and no optimizer state: a model that was imported; only start from it")
    wanted, there = by_path(rest_of(abstract)), by_path(_saved_tree(folder / "opt_state"))
    # Checkpoints of earlier versions know nothing of the health of their steps, and begin it anew.
    unknown = {path for path in wanted if path.startswith("health/")} - there.keys()
    named = restore_item(folder, "opt_state", {path: leaf for path, leaf in wanted.items() if path not in unknown})
    for path in unknown:
        named[path] = jax.device_put(np.zeros(wanted[path].shape, wanted[path].dtype), wanted[path].sharding)
    rest = jax.tree.unflatten(jax.tree.structure(rest_of(abstract)), [named[path] for path in wanted])
    rest["opt_state"] = rest.pop("optimizer")
    return replace(abstract, **rest)


def restore_item(folder: Path, item: str, abstract: Any, ignore: str | tuple[str, ...] | None = None) -> Any:
    """An item of a checkpoint, `params` or `opt_state` (flat); arguments as in `restore_params`."""
    verify(folder, item, together=True)
    saved, handler = _saved_tree(folder / item), _reader()
    if abstract is None:
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        args = ocp.args.PyTreeRestore(restore_args=as_arrays)
    else:
        wanted = by_path(abstract)
        ignored = {path for path in by_path(saved) if ignore is not None and path.startswith(ignore)} - wanted.keys()
        there = {path: leaf for path, leaf in by_path(saved).items() if path not in ignored}
        _compare(folder / item, there, wanted)
        layout = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=layout, partial_restore=ignore is not None)
    try:
        return handler.restore(epath.Path(folder / item), args=args)
    finally:
        handler.close()


def _reader() -> ocp.PyTreeCheckpointHandler:
    """Without a Checkpointer around it, which would wait for the other processes: whoever reads, reads alone."""
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=by_all())


def _saved_tree(item: Path) -> Any:
    """Shapes and types of what was saved."""
    with contextlib.closing(_reader()) as handler:
        return handler.metadata(epath.Path(item)).tree


def _compare(where: Path, saved: dict, wanted: dict) -> None:
    faults = [f"{path} is missing" for path in wanted if path not in saved]
    faults += [f"{path} is not expected" for path in saved if path not in wanted]
    for path in (path for path in wanted if path in saved):
        there, here = ((tuple(leaf.shape), np.dtype(leaf.dtype).name) for leaf in (saved[path], wanted[path]))
        if there != here:
            faults.append(f"{path} is {there[1]} {there[0]}, wanted {here[1]} {here[0]}")
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(
            f"{where} does not fit this model: {'; '.join(faults[:8])}{more}; use the settings of the run that wrote it"
        )


def _json(folder: Path, item: str) -> dict:
    verify(folder, item)
    handler = ocp.JsonCheckpointHandler()
    try:
        return dict(handler.restore(epath.Path(folder / item)))
    finally:
        handler.close()


def by_all() -> ocp.options.MultiprocessingOptions:
    """Options that make Orbax wait through the coordinator, with a time-out, and not by a collective without one."""
    count = jax.process_count()
    return ocp.options.MultiprocessingOptions(active_processes=set(range(count)) if count > 1 else None)
