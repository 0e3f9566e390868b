"""Checksums of tensors: the same on every mesh, other for every bit; their log is that of an uninterrupted run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import NamedSharding, PartitionSpec
from toy import quick_compilation  # noqa: F401

from espalier.errors import UserError
from espalier.training.checksums import checksum, logged
from espalier.training.config import CheckpointConfig
from espalier.training.run import RunDirectory
from sharding.mesh import MeshConfig, build_mesh

ONE = MeshConfig(1, 1, 1)


def permuted(x: int) -> int:
    """The finalizer of MurmurHash3, in integers of Python."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16


def by_hand(array: np.ndarray) -> list[int]:
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    bits = [int(value) for value in array.view(kind).reshape(-1)]
    hashes = [permuted(value ^ permuted(place)) for place, value in enumerate(bits)]
    return [sum(bits) % 2**32, sum(hashes) % 2**32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_the_sums_are_those_by_hand_on_every_mesh(dtype):
    values = (np.random.default_rng(0).normal(size=(8, 4, 6)) * 3).astype(jnp.dtype(dtype))
    expected, compiled = by_hand(values), jax.jit(checksum)
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for axes in ((), ("data",), (("data", "tensor"), "fsdp"), (None, "fsdp", "tensor")):
        placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*axes)))
        assert compiled(placed).tolist() == expected, axes


def test_every_flipped_bit_and_every_swap_changes_them():
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    values[0, 1] = -values[0, 0]
    flipped = np.repeat(values.reshape(1, -1), 35 * 32, axis=0).view(np.uint32)
    flipped[np.arange(35 * 32), np.arange(35 * 32) // 32] ^= np.uint32(1) << np.arange(35 * 32, dtype=np.uint32) % 32
    pairs = [(a, b) for a in range(35) for b in range(a)]
    swapped = np.repeat(values.reshape(1, -1), len(pairs), axis=0)
    for row, (a, b) in zip(swapped, pairs, strict=True):
        row[[a, b]] = row[[b, a]]
    all_sums = jax.jit(jax.vmap(lambda row: checksum(row.reshape(5, 7))))
    expected = np.asarray(checksum(jnp.asarray(values)))
    assert (np.asarray(all_sums(flipped.view(np.float32))) != expected).all()
    sums = np.asarray(all_sums(swapped))
    assert (sums[:, 0] == expected[0]).all() and (sums[:, 1] != expected[1]).all()


def lines(folder) -> list[tuple[int, bool, dict]]:
    return [(line.step, line.began is not None, line.sums) for line in logged(RunDirectory(folder))]


def test_the_log_of_an_interrupted_run_is_that_of_an_uninterrupted_one(tmp_path, capsys):
    """Also of one that goes on from before what it logged, on another mesh, and where the last line was cut short."""
    common = dict(steps=8, checksum_every=2, checkpoint=CheckpointConfig(every=3))
    toy.run(toy.config(tmp_path / "whole", mesh=ONE, **common))
    whole = lines(tmp_path / "whole")
    assert [(step, began) for step, began, _ in whole] == [(0, True), *((step, False) for step in (2, 4, 6, 8))]
    assert {"params/head/causal_lm/kernel", "optimizer/mu/head/causal_lm/kernel"} <= whole[0][2].keys()

    def killed(step):
        for number, batch in enumerate(toy.batches_from(step), step):
            if number == 5:
                raise RuntimeError("killed")
            yield batch

    with pytest.raises(RuntimeError, match="killed"):
        toy.run(toy.config(tmp_path / "parts", mesh=ONE, **common), batches_from=killed)
    with (tmp_path / "parts/checksums.jsonl").open("a") as file:
        file.write('{"step": 4, "su')
    toy.run(toy.config(tmp_path / "parts", mesh=ONE, **common))
    parts = lines(tmp_path / "parts")
    assert [line for line in parts if not line[1]] == whole[1:]
    assert [step for step, began, _ in parts if began] == [0, 3]

    toy.run(toy.config(tmp_path / "none", mesh=ONE, **common | {"checksum_every": 0}))
    assert not (tmp_path / "none/checksums.jsonl").exists()
    assert "did not come back" not in capsys.readouterr().out
    said = json.loads((tmp_path / "whole/checksums.jsonl").read_text().splitlines()[0])
    assert said["began"]["jax"] == jax.__version__ and said["log_every"] == 1


def test_a_negative_interval_is_refused(tmp_path):
    with pytest.raises(UserError, match="checksum_every=-1 must be at least 0"):
        toy.config(tmp_path, checksum_every=-1)
