"""Many examples through a model at once: each gets what it gets alone, in its place, by few programs."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.data.examples import Example
from espalier.predict.outputs import ROWS, TOKENS, outputs, row_length
from sharding.mesh import MeshConfig, build_mesh

LENGTHS = [3, 40, 17, 1, 16, 120, 33, 5, 64, 2, 90, 41] * 9


def sums(power: int, params: jax.Array, batch: dict) -> dict[str, jax.Array]:
    """A function of a row that notices other rows, padding and order."""
    real_BT = batch["segment_ids"] != 0
    weighed_BT = jnp.where(real_BT, (batch["input_ids"] * (1 + batch["positions"])) ** power, 0)
    return {"sum": params * weighed_BT.sum(1), "cumulated": jnp.cumsum(weighed_BT, axis=1)}


def examples() -> list[Example]:
    rng = np.random.default_rng(3)
    return [Example(rng.integers(1, 30, length).tolist(), [0] * length) for length in LENGTHS]


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2)])
def test_every_example_gets_what_it_gets_alone(mesh):
    told: list[int] = []
    rows = examples()
    with jax.set_mesh(build_mesh(mesh)) if mesh else contextlib.nullcontext():
        found = outputs(sums, (2,), jnp.float32(2), rows, pad_id=7, said=told.append)
    for example, result in zip(rows, found, strict=True):
        values = [(token * (1 + place)) ** 2 for place, token in enumerate(example.ids)]
        assert result["sum"] == 2 * sum(values)
        np.testing.assert_array_equal(result["cumulated"][: len(values)], np.cumsum(values))
    assert told == sorted(told) and told[-1] == len(rows)


def test_few_shapes_hold_all_lengths():
    """At most half as long again, or 16 tokens for short ones, and never longer than the model takes."""
    shapes = {length: row_length(length, 500) for length in range(1, 501)}
    assert len(set(shapes.values())) <= 10
    assert all(length <= shape <= min(500, max(length + 15, length * 1.5)) for length, shape in shapes.items())
    assert TOKENS // 512 >= 8 and ROWS * 64 == TOKENS
