"""What makes a run what it is: with which settings it may go on, and what to do where it may not."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from espalier.errors import UserError
from espalier.training.config import (
    EXECUTION_FIELDS,
    FINGERPRINTED_FIELDS,
    USER_CODE_FIELDS,
    OptimizerConfig,
    SparsityConfig,
)
from espalier.training.optimizer import schedule, warmup_steps
from espalier.training.sparsity import density_at

RATE_FIELDS = ("schedule", "warmup", "decay_fraction", "final_fraction")
SCHEDULE_FIELDS = frozenset(("steps", "epochs", *(f"optimizer.{name}" for name in RATE_FIELDS)))
"""Paths that a resumed run may change as long as every step that it has done would have been the same."""
SIDES = {"data.validation_files": "validation", "data.validation": "validation", "data.tokenizer": "tokenizer"}
SIDES = {path: SIDES.get(path, "train") for path in FINGERPRINTED_FIELDS}
"""Which fingerprint knows what a path names."""
PRETRAINING = ("masked_lm", "causal_lm")
"""Heads that are trained on packed text."""
LISTED = 4
"""Values of a list that are shown."""

Schedule = Callable[[dict, np.ndarray], Any]
"""(settings of a run as JSON values, int32 steps [S]) → what depends on its length, at each of these steps: [S]."""


def check_same_run(folder: Path, there: dict, here: dict, done: int, schedules: Sequence[Schedule] = ()) -> str | None:
    """What changes, in words, if the run in `folder` goes on with the settings `here`; UserError if it may not.

    there: its settings until now. done: its steps until now. schedules: what follows from its length beside the
    learning rate. Its length and its schedule may change where the steps done would have been the same.
    """
    _check_user_code(folder, there, here)
    changed = dict(_differences(identity(there), identity(here)))
    if not changed:
        return None
    # How text was named is of interest only where the text is another.
    sides = {name.removeprefix("fingerprints.") for name in changed}
    named = {name: pair for name, pair in _differences(there, here) if SIDES.get(name) in sides}
    listed = "; ".join(_shown(name, *pair) for name, pair in (changed | named).items())
    if not changed.keys() <= SCHEDULE_FIELDS:
        raise UserError(
            f"{folder} holds a run with other settings: {listed}{_ways(folder, there, here, done, changed)}"
        )
    if here["steps"] < done:
        raise UserError(
            f"{folder} holds a run with other settings: {listed}; it has done {done} steps: give --steps {done} or "
            "more, or another --run-dir"
        )

    def same_so_far(settings: dict) -> bool:
        steps = np.arange(done, dtype=np.int32)
        return all(
            np.array_equal(values(there, steps), values(settings, steps))
            for values in (learning_rates, densities, *schedules)
        )

    if same_so_far(here):
        return f"{folder}: {listed}; it goes on, for up to step {done} the schedule is the same"
    counted = warmup_steps(_rates(there), there["steps"])
    if _rates(here).warmup < 1 and counted <= here["steps"]:
        optimizer = here.get("optimizer", {}) | {"warmup": counted}
        if same_so_far(here | {"optimizer": optimizer}):
            raise UserError(
                f"{folder} holds a run with other settings: {listed}, and the warm-up is a part of the steps; with "
                f"--optimizer.warmup {counted}, as many steps as it took, the run goes on"
            )
    raise UserError(
        f"{folder} holds a run with other settings: {listed}; the schedule of the {done} steps that it has done would "
        f"have been another{_ways(folder, there, here, done, changed)}"
    )


def identity(config: dict) -> dict:
    """The part of a configuration that makes a run what it is.

    Without EXECUTION_FIELDS, and without the paths of what its fingerprints know by content. Code of the user's own is
    compared by itself.
    """
    return without(config, EXECUTION_FIELDS, FINGERPRINTED_FIELDS | USER_CODE_FIELDS)


def without(config: Any, names: frozenset[str], paths: frozenset[str] = frozenset(), prefix: str = "") -> Any:
    """The configuration without these names at any depth and these dotted paths."""
    if isinstance(config, dict):
        return {
            key: without(value, names, paths, f"{prefix}{key}.")
            for key, value in config.items()
            if key not in names and prefix + key not in paths
        }
    return config


def completed(there: dict, defaults: dict) -> dict:
    """`there` with the defaults of fields that it lacks, at any depth."""
    added = {key: value for key, value in defaults.items() if key not in there}
    nested = {
        key: completed(value, defaults[key])
        for key, value in there.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    }
    return there | added | nested


def differences(there: dict, here: dict) -> Iterator[str]:
    """`key was value there, now value here` for every leaf that differs."""
    return (_shown(name, *pair) for name, pair in _differences(there, here))


def _check_user_code(folder: Path, there: dict, here: dict) -> None:
    """UserError where code of the user's own is not what the run began with."""
    was, now = (config.get("user_code") or {} for config in (there, here))
    anew = f"to train anew, give --run-dir {_free(folder, here)}"
    for what in sorted(was.keys() | now.keys()):
        before, after = was.get(what), now.get(what)
        if not before or not after or before["name"] != after["name"]:
            shown = [f"{code['name']} of {code['file']}" if code else "none of yours" for code in (before, after)]
            raise UserError(
                f"{folder} holds a run with another {what}: it began with {shown[0]}, now it is {shown[1]}; to go on "
                f"with it, name what it began with; {anew}"
            )
        if before["sha256"] != after["sha256"]:
            raise UserError(
                f"{after['file']} has changed since the run in {folder} began with its {what} {after['name']}: SHA-256 "
                f"was {before['sha256'][:12]}, now {after['sha256'][:12]}; to go on, undo the change; {anew}"
            )


def learning_rates(settings: dict, steps: np.ndarray) -> Any:
    """A Schedule: the factor on the peak rates."""
    return schedule(_rates(settings), settings["steps"])(steps)


def densities(settings: dict, steps: np.ndarray) -> Any:
    """A Schedule: the part of the weights that stays."""
    given = SparsityConfig(**settings.get("optimizer", {}).get("sparsity", {}))
    return density_at(given, settings["steps"], steps + 1)


def _rates(settings: dict) -> OptimizerConfig:
    given = settings.get("optimizer", {})
    return OptimizerConfig(**{name: given[name] for name in RATE_FIELDS if name in given})


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted path, (value there, value here)) of every leaf that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            nested = f"{name}.{key}" if name else key
            yield from _differences(there.get(key, "unset"), here.get(key, "unset"), nested)
    elif there != here:
        yield name, (there, here)


def _shown(name: str, there: Any, here: Any) -> str:
    def short(value: Any) -> Any:
        if name.startswith("fingerprints."):
            return value[:12]
        if isinstance(value, list) and len(value) > LISTED:
            return f"[{', '.join(map(repr, value[:LISTED]))} … {len(value)} in all]"
        return value

    return f"{name} was {short(there)}, now {short(here)}"


def _ways(folder: Path, there: dict, here: dict, done: int, changed: dict[str, tuple[Any, Any]]) -> str:
    """What to do where settings are others: what makes them what they were, or a run of its own."""
    flags = (_flag(folder, name, value, there, here) for name, (value, _) in changed.items())
    back = f"; to go on with it, give {' '.join(dict.fromkeys(filter(None, flags)))}"
    anew = f"; to train anew, --run-dir {_free(folder, here)}"
    # What another architecture or other tokens could not take over, and what Python asked for without a command.
    apart = any(
        name.startswith(("model.", "task", "labels", "init_from", "fingerprints.tokenizer")) for name in changed
    )
    if apart or not done or not here.get("command"):
        return back + anew
    return f"{back}{anew}; to start from what it has learnt, add {_fork(folder, there, here, done, changed)}"


def _fork(folder: Path, there: dict, here: dict, done: int, changed: dict) -> str:
    """The flags that start a run of its own from the weights of this one, to be added to the command that was given."""
    flags = ["--init-from", shlex.quote(str(here.get("run_dir") or folder))]
    if here.get("head", here.get("task")) in PRETRAINING and "optimizer.name" not in changed:
        flags += ["--init-optimizer"]
        # As training.start.check_fork demands.
        if here["seed"] == there["seed"] and "fingerprints.train" not in changed:
            flags += ["--seed", str(there["seed"] + 1)]
    if here.get("scratch"):
        flags += ["--no-scratch"]
    flags += ["--run-dir", _free(folder, here)]
    left = here["steps"] - done
    if "steps" in changed and left > 0:
        epochs = here.get("epochs")
        flags += ["--steps", str(left)] if epochs is None else ["--epochs", f"{epochs * left / here['steps']:.4g}"]
    return " ".join(flags)


def _free(folder: Path, here: dict) -> str:
    """A name for another run directory."""
    number = next(number for number in range(2, 10_000) if not folder.with_name(f"{folder.name}-{number}").exists())
    return shlex.quote(f"{here.get('run_dir') or folder}".rstrip("/") + f"-{number}")


def _flag(folder: Path, name: str, value: Any, there: dict, here: dict) -> str | None:
    """What to give so that a setting has this value again; None where that follows from other settings."""
    if name.startswith("fingerprints."):
        side = name.removeprefix("fingerprints.")
        if side == "tokenizer":
            return (
                f"--data.tokenizer {shlex.quote(str(folder / 'tokenizer'))}"
                if "sources" in here.get("data", {})
                else None
            )
        fields = {path: values for path, values in _differences(there, here) if SIDES.get(path) == side}
        named = " ".join(str(_flag(folder, path, values[0], there, here)) for path, values in fields.items())
        return (
            named
            or f"the {'training' if side == 'train' else 'held-out'} text that it began with (its files have changed)"
        )
    if name == "task":
        return f"the command that it was begun with ({there.get('command') or value})"
    if name in ("labels", "model.labels"):
        return None
    outer, _, last = f"--{name.replace('_', '-')}".rpartition(".")
    if isinstance(value, bool):
        dots = f"{outer}." if outer else "--"
        return dots + ("" if value else "no-") + last.removeprefix("--")
    flag = f"--{name.replace('_', '-')}"
    if value is None or value == "unset" or value == []:
        return f"no {flag}"
    if isinstance(value, list):
        if len(value) > LISTED:
            return f"{flag} with the {len(value)} values in {folder / 'config.json'}"
        return f"{flag} {shlex.join(map(str, value))}"
    return f"{flag} {shlex.quote(str(value))}"
