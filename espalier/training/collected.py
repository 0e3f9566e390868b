"""What objectives add to batches on the mesh, logged and replayed (`training.step.Objective.collect`).

    collected/<number>.npz   the arrays that were added to the batch of this number: that of its step, counted from 0,
                             where the run passed over none
              log.jsonl      one line a batch: its number as `step`, sha256 of its file, dtypes
              <number>.ahead.npz   what the collection of this batch takes of an earlier step (`Objective.ahead`)

`collect(state, batch, key)` should be a function of its arguments alone, and then a resumed run would compute the same
again. Rollouts may fail to be (a sandbox, a judge, other hardware), so that whatever was added since the oldest
checkpoint on the disk is read back when these steps come again: such a step sees the same batch bit for bit. The log
keeps the sums of all steps. A buffer that `collect` carries from step to step beside its arguments is not covered.

The arrays of a step are written when its metrics are read, while the device works on the next; a step whose arrays did
not get there was never seen by anybody, and is collected anew.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.errors import UserError
from espalier.files import replacing, sha256_of_file, sync
from espalier.training.state import TrainState
from espalier.training.step import COLLECTING
from sharding.mesh import batch_sharding, token_axes
from sharding.processes.coordination import from_first

Added = dict[str, jax.Array]
"""Arrays by their path in the batch, a/b/c."""


class Collector:
    """Calls an objective's `collect` for each step, or reads what it once returned."""

    def __init__(
        self,
        collect: Callable[[TrainState, dict, jax.Array], dict] | None,
        folder: Path,
        mesh: Mesh,
        reading: bool = False,
        steps: int = 1,
        ahead: Callable[[TrainState, int, jax.Array], dict[str, Any]] | None = None,
    ):
        """reading: the folder is another's, and stays as it is. steps: so many in a row share what was collected.
        ahead: that of the objective."""
        self._collect, self._ahead, self._folder, self._mesh = collect, ahead, folder, mesh
        self._reading = reading
        self._log = folder / "log.jsonl"
        self._steps = steps
        self._held: tuple[int, Added] | None = None
        """What the steps from this one on share."""
        self._known: dict[int, dict] = {}
        self._carried: dict[int, dict[str, Any]] = {}
        """What batches to come take of earlier steps."""
        if collect is not None:
            if not reading:
                folder.mkdir(parents=True, exist_ok=True)
            logged = self._readable(mend=not reading) if jax.process_index() == 0 else []
            self._known = {record["step"]: record for record in from_first("batches collected", logged)}
        if ahead is not None:
            there = [_number(path) for path in folder.glob("*.ahead.npz")] if jax.process_index() == 0 else []
            for number in from_first("batches drawn ahead", there):
                self._carried[number] = _arrays(self._path_ahead(number))

    def __call__(self, state: TrainState, batch: dict, step: int) -> tuple[dict, Added]:
        """(the batch with what is added, what of it has yet to be written). step: the number of the batch."""
        if self._collect is None:
            return batch, {}
        first = step - step % self._steps
        # Batches may be passed over, the first of those that share something among them.
        known = next((number for number in range(first, first + self._steps) if number in self._known), None)
        if known is not None:
            return self._replayed(batch, known), {}
        if self._held is not None and self._held[0] == first:
            return _nested(_flat(batch) | self._held[1]), {}
        carried = {"ahead": self._carried.pop(first)} if first in self._carried else {}
        full, before = self._collect(state, batch | carried, _key(state, first)), _flat(batch)
        found = _flat(full)
        assert before.keys() <= found.keys(), f"collect took away {sorted(before.keys() - found.keys())}"
        added = {path: array for path, array in found.items() if array is not before.get(path)}
        self._held = (first, added) if self._steps > 1 else None
        if self._ahead is not None:
            self._draw_ahead(state, first + self._steps)
        return full, added

    def write(self, step: int, added: Added) -> None:
        """Write what was added to the batch of a step; waits for it."""
        if not added:
            return
        everywhere = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        arrays = jax.device_get(everywhere(added))
        if jax.process_index() == 0:
            with replacing(self._path(step), "wb") as file:
                np.savez(file, **arrays)
            dtypes = {path: array.dtype.name for path, array in arrays.items()}
            record = {"step": step, "sha256": sha256_of_file(self._path(step)), "dtypes": dtypes}
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
                sync(log)

    def forget(self, step: int) -> None:
        """Delete the arrays of the steps before this one: no checkpoint is left that would lead to them."""
        step -= step % self._steps
        if self._collect is not None and jax.process_index() == 0:
            for path in self._folder.glob("*.npz"):
                if 0 <= _number(path) < step:
                    path.unlink()

    def _draw_ahead(self, state: TrainState, number: int) -> None:
        assert self._ahead is not None
        arrays = self._ahead(state, number, _key(state, number))
        if not arrays:
            return
        self._carried = {number: arrays}
        if jax.process_index() == 0 and not self._reading:
            with replacing(self._path_ahead(number), "wb") as file:
                np.savez(file, **arrays)

    def _readable(self, mend: bool) -> list[dict]:
        """The records whose arrays are still there. mend: lines that a kill cut short are taken out of the log."""
        text = self._log.read_text(encoding="utf-8") if self._log.exists() else ""
        records = {line: record for line in text.splitlines() if (record := _record(line))}
        if mend and "".join(f"{line}\n" for line in records) != text:
            with replacing(self._log) as log:
                log.writelines(f"{line}\n" for line in records)
        return [record for record in records.values() if self._path(record["step"]).exists()]

    def _replayed(self, batch: dict, step: int) -> dict:
        path, record = self._path(step), self._known[step]
        if sha256_of_file(path) != record["sha256"]:
            raise UserError(f"{path} is not as it was written; delete it, and the batch of its step is collected anew")
        with np.load(path) as file:
            arrays = {name: file[name].view(jnp.dtype(dtype)) for name, dtype in record["dtypes"].items()}
        full = _nested(_flat(batch) | arrays)
        axes = _flat(token_axes(full))

        def placed(name: str, array: np.ndarray) -> jax.Array:
            layout = batch_sharding(array.shape, self._mesh, axes[name])
            return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

        return _nested(_flat(batch) | {name: placed(name, array) for name, array in arrays.items()})

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.npz"

    def _path_ahead(self, number: int) -> Path:
        return self._folder / f"{number}.ahead.npz"


def _key(state: TrainState, number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), number), COLLECTING)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Of a file whose sum stands nowhere but in itself: that of a zip archive."""
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            return dict(file)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it, and its batch is drawn by the parameters of its own step"
        ) from None


def _number(path: Path) -> int:
    """Of the batch that a file belongs to; -1 = it is none of ours."""
    number = path.name.removesuffix(".npz").removesuffix(".ahead")
    return int(number) if number.isdecimal() else -1


def _record(line: str) -> dict | None:
    try:
        record: Any = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"step", "sha256", "dtypes"} <= record.keys() else None


def _flat(batch: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, part in batch.items():
        flat |= _flat(part, f"{prefix}{name}/") if isinstance(part, dict) else {prefix + name: part}
    return flat


def _nested(flat: dict[str, Any]) -> dict:
    batch: dict = {}
    for path, part in flat.items():
        *outer, name = path.split("/")
        inner = batch
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[name] = part
    return batch
