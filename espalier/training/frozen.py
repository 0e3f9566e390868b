"""Parameters that a run uses and does not train: the base under adapters, a reference model.

They have no optimizer state and are written once per run, not with each checkpoint:

    frozen/0/params          the parameters
             config          JSON: origin, in words
             manifest.json   SHA-256 of every file

Each checkpoint names the SHA-256 of that manifest, so that a run never goes on over another base.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax

from espalier.errors import UserError
from espalier.files import sha256_of_file
from espalier.training.adapters import beside, merged
from espalier.training.checkpoint import save_params
from espalier.training.fallback import given_step
from espalier.training.manifest import MANIFEST
from espalier.training.restore import read_data, restore_params, restore_saved, saved_shapes
from espalier.training.run import RunDirectory
from espalier.training.state import combined
from sharding.processes.coordination import from_first, gather


class Source(Protocol):
    """Weights that are there, and which ones."""

    @property
    def revision(self) -> str: ...
    def restore_params(self, abstract: Any) -> Any: ...


@dataclass(frozen=True)
class Frozen:
    """What is frozen in a run, and where it comes from."""

    init: Callable[[jax.Array], Any]
    """key → parameters. Their shapes are needed always, their values where there is no `load`."""
    load: Callable[[Any], Any] | None = None
    """Shapes with shardings → parameters; not called when the run goes on, which has them in its own folder."""
    origin: str = "fresh"
    """Where they come from, in words, with the revision (`training.start.Origin.revision`)."""

    @classmethod
    def of(cls, source: Source, init: Callable[[jax.Array], Any]) -> Frozen:
        """Parameters of the shapes of `init`, read from a run or a Hugging Face model (training.start.Origin)."""
        return cls(init, source.restore_params, source.revision)


def save_frozen(folder: Path, params: Any, origin: str) -> dict[str, str]:
    """Write the frozen parameters of a run that begins; what its checkpoints are to remember: sha256 and origin.

    To be called by all processes. Those of an earlier start that saved no checkpoint are replaced.
    """
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    gather("the folder of frozen parameters is empty")
    save_params(folder, params, {"origin": origin})
    return {"sha256": _sum_of_manifest(folder), "origin": origin}


def restore_frozen(folder: Path, abstract: Any, record: dict[str, str] | None) -> Any:
    """The frozen parameters of a run that goes on, laid out as `abstract` says.

    record: what `save_frozen` returned. UserError where the folder is not there or holds anything else.
    """
    _check(folder, record)
    return restore_saved(folder, abstract)


def restore_complete(
    run_dir: str | Path, abstract: Any = None, step: int | None = None, *, ignore: str | tuple[str, ...] | None = None
) -> Any:
    """The parameters of a run's checkpoint (default: its best where it keeps that, else the newest), trained and frozen
    together; arguments as in `restore_params`.

    With `abstract`, frozen parameters that it does not name are left out (a reference model), and of the two parts
    one of which it names nothing is not read.
    """
    step = given_step(run_dir) if step is None else step
    record, folder = read_data(run_dir, step).get("frozen"), RunDirectory(run_dir).frozen
    if record is None:
        return restore_params(run_dir, abstract, step, ignore=ignore)
    if abstract is None:
        return combined(restore_params(run_dir, step=step), restore_frozen(folder, None, record))
    _check(folder, record)
    saved = saved_shapes(folder, 0)
    trained, frozen = _part(abstract, saved, False), _part(abstract, saved, True)
    read = restore_saved(folder, frozen, ignore="") if frozen else {}
    return combined(restore_params(run_dir, trained, step, ignore=ignore), read) if trained else read


def restore_model(
    run_dir: str | Path, abstract: Any = None, step: int | None = None, *, ignore: str | tuple[str, ...] | None = None
) -> Any:
    """As `restore_complete`, with adapters merged into what they change: the parameters of a plain model."""
    step = given_step(run_dir) if step is None else step
    run = RunDirectory(run_dir)
    if abstract is None or read_data(run_dir, step).get("frozen") is None:
        return merged(restore_complete(run_dir, abstract, step, ignore=ignore))
    adapters = beside(abstract, saved_shapes(run.checkpoints, step) | saved_shapes(run.frozen, 0))
    return merged(restore_complete(run_dir, combined(abstract, adapters), step, ignore=ignore))


def _part(tree: Any, saved: Mapping[str, Any], inside: bool, prefix: str = "") -> dict:
    """The shapes of a nested dict that are in `saved` (path → shape), or those that are not; of a stack of which it has
    the first layers, those, or the others."""
    part = {}
    for name, value in tree.items():
        there = saved.get(prefix + name)
        if isinstance(value, Mapping):
            if inner := _part(value, saved, inside, f"{prefix}{name}/"):
                part[name] = inner
        elif there is not None and (rows := _rows_beyond(value.shape, tuple(there.shape))):
            count = value.shape[0] - rows if inside else rows
            part[name] = jax.ShapeDtypeStruct((count, *value.shape[1:]), value.dtype, sharding=value.sharding)
        elif (there is not None) == inside:
            part[name] = value
    return part


def _rows_beyond(wanted: tuple[int, ...], there: tuple[int, ...]) -> int:
    """How many more rows are wanted than there are."""
    return max(0, wanted[0] - there[0]) if wanted and there and wanted[1:] == there[1:] else 0


def _check(folder: Path, record: dict[str, str] | None) -> None:
    if record is None:
        raise UserError(
            f"the run in {folder.parent} has no frozen parameters and these settings need some; try another --run-dir"
        )
    found = _sum_of_manifest(folder)
    if found != record["sha256"]:
        raise UserError(
            f"{folder} does not hold the frozen parameters of this run (from {record['origin']}; SHA-256 "
            f"{record['sha256'][:12]}, found {found[:12]}); copy the folder back, or train anew with another --run-dir"
        )


def _sum_of_manifest(folder: Path) -> str:
    """SHA-256 as process 0 reads it, for network disks may show a file to one process before another."""
    found = "nothing"
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            found = sha256_of_file(folder / "0" / MANIFEST)
    return from_first("sum of frozen parameters", found)
