"""Which checkpoint is taken: the newest, or what is sound where that one is damaged.

A run that goes on sets what is damaged aside, never deletes it, and trains again from the newest sound checkpoint. Who
only reads a run leaves its folder as it is and takes another step.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import jax

from espalier import progress
from espalier.errors import UserError
from espalier.training.manifest import complete_steps, fault, is_unfinished, step_folders
from espalier.training.run import RunDirectory
from sharding.processes.coordination import LONG_WAIT, from_first, gather

MODEL = ("params", "config", "data")
"""What whoever uses a model reads of a checkpoint."""


def resumed_step(run: RunDirectory) -> int | None:
    """The newest sound checkpoint of a run that goes on; None = it has none and never had one.

    To be called by all processes. Every file of it is read. Those after it are set aside, and so is the best where it
    is damaged. UserError where a run had checkpoints and none is sound: it does not begin anew over them.
    """
    folder, first = run.checkpoints, jax.process_index() == 0
    # Network disks may show a checkpoint to one host before another.
    there = from_first("own checkpoints", [step for step in step_folders(folder) if not is_unfinished(folder, step)])
    damaged: dict[int, str] = {}
    with progress.waiting("verifying the newest checkpoint"):
        chosen = _newest_sound(folder, there, damaged)
        best = from_first("the best", best_step(run))
        if chosen is not None and best in there and best not in (chosen, *damaged):
            said = fault(folder / str(best), together=True)
            damaged |= {best: said} if said else {}
    aside = from_first("set aside", sorted(path.name for path in folder.glob("*.damaged*")))
    if chosen is None and (damaged or aside):
        listed = [f"{step} ({said})" for step, said in damaged.items()] + aside
        raise UserError(
            f"{run.path} had checkpoints and none of them is sound: {'; '.join(listed)}; copy one back that is, or "
            "begin anew with another --run-dir"
        )
    if damaged:
        assert chosen is not None
        if first:
            _set_all_aside(run, damaged, there, chosen)
        gather("damaged checkpoints are set aside", timeout=LONG_WAIT)
    return chosen


def given_step(run_dir: str | Path, items: Collection[str] = MODEL, together: bool = True) -> int:
    """The step whose parameters a run gives to those who use it: its best where it keeps that, else the newest; where
    that one is damaged, the newest sound one. A line says which, unless it is simply the newest.

    together: all processes of a run ask. UserError where there is no sound checkpoint; changes nothing in the folder.
    """
    run = RunDirectory(run_dir)
    folder = run.checkpoints
    there = complete_steps(folder)
    best = best_step(run)
    if together:
        there, best = from_first("checkpoints to start from", [there, best])
    if not there:
        raise UserError(f"no checkpoint in {folder}; give the folder of a run that has saved one")
    best = best if best in there else None
    damaged: dict[int, str] = {}
    order = [step for step in there if step != best] + ([best] if best is not None else [])
    step = _newest_sound(folder, order, damaged, items, together)
    if step is None:
        raise UserError(f"no checkpoint in {folder} is sound: {_listed(damaged)}; copy one back that is")
    if damaged:
        _tell(f"warning: {run.path}: {_listed(damaged)}; step {step} is taken, the newest sound one")
    elif step != there[-1]:
        _tell(f"{run.path}: step {step} of {there[-1]} is taken, its best")
    return step


def sound_steps(run_dir: str | Path) -> list[int]:
    """All steps of a run that can be read, oldest first; a line names each that cannot."""
    run = RunDirectory(run_dir)
    damaged = {step: fault(run.checkpoints / str(step), MODEL) for step in complete_steps(run.checkpoints)}
    for step, said in damaged.items():
        if said:
            _tell(f"warning: {run.path}: step {step} is left out: {said}")
    return [step for step, said in damaged.items() if not said]


def best_step(run: RunDirectory) -> int | None:
    """The step that best.json names; None where there is none, or it says nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        step = json.loads(run.best.read_text(encoding="utf-8"))["step"]
        return step if isinstance(step, int) else None
    return None


def set_aside(folder: Path, step: int) -> Path:
    """Rename the checkpoint of a step so that it counts no more; its new place."""
    number, target = 1, folder / f"{step}.damaged"
    while target.exists():
        number += 1
        target = folder / f"{step}.damaged-{number}"
    (folder / str(step)).rename(target)
    return target


def _newest_sound(
    folder: Path,
    steps: Collection[int],
    damaged: dict[int, str],
    items: Collection[str] | None = None,
    together: bool = True,
) -> int | None:
    """The last of these steps that is sound; what is wrong with those after it is added to `damaged`."""
    for step in reversed(list(steps)):
        said = fault(folder / str(step), items, together)
        if said is None:
            return step
        damaged[step] = said
    return None


def _set_all_aside(run: RunDirectory, damaged: Mapping[int, str], there: Collection[int], chosen: int) -> None:
    folder = run.checkpoints
    # A run that goes on meanwhile deletes what this process was just reading.
    with run.locked():
        if [step for step in step_folders(folder) if not is_unfinished(folder, step)] != there:
            raise UserError(f"{folder} has changed while it was read; start again")
        for step, said in damaged.items():
            target = set_aside(folder, step)
            progress.say(
                f"warning: checkpoint {step} is damaged ({said}) and set aside as {target.name}; the run goes on from "
                f"step {chosen}"
            )


def _listed(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"step {step} is damaged ({said})" for step, said in damaged.items())


def _tell(line: str) -> None:
    if jax.process_index() == 0:
        progress.say(line)
