"""Checksums of every tensor of a state, logged every N steps: by them `replay` finds where a run left its way.

    checksums.jsonl   {"step": 20, "sums": {"params/layers/…": "0123456789abcdef", "optimizer/…": …, "frozen/…": …}}
                      {"step": 20, "began": {"jax": "0.10.0", …}, "log_every": 10, "sums": {…}}

The second kind says with what a session began, and where: two of one step that differ are a state that did not come
back from the disk as it was. Steps that a resumed run does anew are cut from the file, as from metrics.jsonl.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier.files import replacing
from espalier.training.run import RunDirectory
from espalier.training.state import TrainState
from sharding.rules import path_of

Sums = dict[str, str]
"""Path → checksum, 16 hexadecimal digits."""
NAMED = 3
"""Tensors that a message names."""


class Line(NamedTuple):
    """A line of checksums.jsonl."""

    step: int
    """Steps done."""
    sums: Sums
    began: dict[str, Any] | None = None
    """On what a session computes (`surroundings`) that began here; None = one that went on."""
    log_every: int | None = None
    """Of that session."""


def checksum(array: jax.Array) -> jax.Array:
    """uint32 [2]: the sum of the bits of all values, and the sum of a hash of bits and place, both modulo 2³².

    Sums of integers that wrap around are the same in any order, so that they do not depend on how the array is split
    over a mesh. Each hash is a permutation (the finalizer of MurmurHash3, Appleby 2011): one value that is another
    changes both sums, and values that changed places the second.
    """
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        kind = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    hashed = _permuted(bits ^ _permuted(place))
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(hashed, dtype=jnp.uint32)])


def _permuted(x: jax.Array) -> jax.Array:
    """A permutation of the numbers of 32 bits in which each bit depends on all."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))


class Summed:
    """state → the checksums of parameters, optimizer state and frozen parameters, in one compiled program."""

    def __init__(self, mesh: Mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._sums = jax.jit(lambda leaves: jnp.stack([*map(checksum, leaves)]), out_shardings=everywhere)

    def __call__(self, state: TrainState) -> Computing:
        """Begins to compute them; the state may be donated afterwards."""
        named = tensors(state)
        return Computing([*named], self._sums([*named.values()]))


class Computing(NamedTuple):
    """Checksums that a device may still be computing."""

    paths: list[str]
    sums: jax.Array

    def read(self) -> Sums:
        """Waits for them."""
        values = jax.device_get(self.sums)
        return {path: f"{int(a):08x}{int(b):08x}" for path, (a, b) in zip(self.paths, values, strict=True)}


def tensors(state: TrainState) -> dict[str, jax.Array]:
    """What is summed, by path: params/…, optimizer/…, frozen/…."""
    parts = {"params": state.params, "optimizer": state.opt_state, "frozen": state.frozen}
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parts)}


def surroundings(mesh: Mesh, settings: Mapping[str, Any]) -> dict[str, Any]:
    """On what a session computes: where all of this is the same, so are the bits of every step.

    settings: of the run, JSON values.
    """
    device = mesh.devices.flat[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return {
        "jax": jax.__version__,
        "devices": f"{mesh.size} × {device.device_kind}{cores}",
        "processes": jax.process_count(),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "accumulation": settings.get("accumulation"),
        "execution": settings.get("execution"),
    }


class ChecksumLog:
    """Writes checksums.jsonl of a session from its first state on. A context: at its end the last line is written.

    A line is written one step later than its state, so that the device is never waited for. All processes call it
    alike; the first writes. every: steps between lines; 0 = none.
    """

    def __init__(
        self,
        run: RunDirectory,
        every: int,
        mesh: Mesh,
        state: TrainState,
        *,
        settings: Mapping[str, Any],
        log_every: int,
        say: Callable[[str], None],
    ):
        self._run, self._every, self._say = run, every, say
        self._first = jax.process_index() == 0
        self._summed = Summed(mesh)
        self._began = {"began": surroundings(mesh, settings), "log_every": log_every}
        self.begin(state)

    def begin(self, state: TrainState) -> None:
        """Log from this state on, and forget what comes after it."""
        self._pending: tuple[dict[str, Any], Computing] | None = None
        step = int(state.step)
        kept = cut(self._run, step) if self._first else []
        self._left = next((line.sums for line in reversed(kept) if line.step == step), None)
        if self._every:
            self._pending = {"step": step} | self._began, self._summed(state)

    def after(self, state: TrainState, step: int) -> None:
        """To be called after every step, before the state is donated to the next."""
        if not self._every:
            return
        self._write()
        if step % self._every == 0:
            self._pending = {"step": step}, self._summed(state)

    def __enter__(self) -> ChecksumLog:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        # After an error the device may give nothing any more; and a session without a step has not begun.
        if kind is None and self._pending and "began" not in self._pending[0]:
            self._write()

    def _write(self) -> None:
        if self._pending is None:
            return
        (line, computing), self._pending = self._pending, None
        sums = computing.read()
        if not self._first:
            return
        with self._run.checksums.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"sums": sums}) + "\n")
        if "began" in line and self._left and (others := differing(self._left, sums)):
            self._say(
                f"checkpoint {line['step']} did not come back as the run left it: {some(others)}; its files are as "
                "they were written, so that they were damaged before; an older one may be sound: "
                f"./launch.sh replay {self._run.path}"
            )


def cut(run: RunDirectory, step: int) -> list[Line]:
    """Drop the lines after `step`, sessions that began there (none of their steps stays) and half a line at the end."""
    if not run.checksums.exists():
        return []
    kept = [(text, line) for text, line in _lines(run) if line.step < step or line.step == step and not line.began]
    with replacing(run.checksums) as file:
        file.writelines(text + "\n" for text, _ in kept)
    return [line for _, line in kept]


def logged(run: RunDirectory) -> list[Line]:
    """The lines of checksums.jsonl, in their order; none where there is no such file."""
    return [line for _, line in _lines(run)] if run.checksums.exists() else []


def differing(there: Sums, here: Sums) -> list[str]:
    """The tensors that are not the same, in the order of the state."""
    return [path for path in {**there, **here} if there.get(path) != here.get(path)]


def some(paths: list[str]) -> str:
    """The first tensors of a list, in words."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more


def _lines(run: RunDirectory) -> Iterator[tuple[str, Line]]:
    for text in run.checksums.read_text(encoding="utf-8").split("\n"):
        try:
            record = json.loads(text)
            yield text, Line(record["step"], record["sums"], record.get("began"), record.get("log_every"))
        except (ValueError, KeyError, TypeError):
            continue
