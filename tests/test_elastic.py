"""A run goes on on other devices, another mesh, with other micro-batches: the same bits, batch and next loss."""

import shutil

import jax
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.training import loop
from sharding.mesh import MeshConfig

LAYOUTS = {
    "data=8": dict(mesh=MeshConfig(data=8)),
    "fsdp=4": dict(mesh=MeshConfig(data=1, fsdp=4)),
    "one": dict(mesh=MeshConfig(data=1), accumulation=4),
    "tensor=4": dict(mesh=MeshConfig(data=2, tensor=4)),
    "sequence=4": dict(mesh=MeshConfig(data=1, fsdp=2, sequence=4), accumulation=2),
}
"""On 8, 4, 1, 8 and 8 devices."""


def whole(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def seen(monkeypatch) -> dict[str, list]:
    """The states with which sessions began, and the batches as the mesh has them."""
    seen: dict[str, list] = {"states": [], "batches": []}
    first_state, place_batch = loop.first_state, loop.place_batch

    def spied_state(*arguments):
        state = first_state(*arguments)
        seen["states"].append(whole(state))
        return state

    def spied_batch(*arguments):
        batch = place_batch(*arguments)
        seen["batches"].append(jax.device_get(batch))
        return batch

    monkeypatch.setattr(loop, "first_state", spied_state)
    monkeypatch.setattr(loop, "place_batch", spied_batch)
    return seen


@pytest.mark.parametrize("source", LAYOUTS)
def test_state_batch_and_next_loss_are_the_same_on_every_other_layout(tmp_path, seen, source):
    def next_step(layout: str) -> tuple[list, dict, float]:
        """The third step alone: the state before it, its batch, its loss."""
        toy.run(toy.config(tmp_path, stop_at=3, **LAYOUTS[layout]))
        shutil.rmtree(tmp_path / "checkpoints" / "3")
        loss = next(record["loss"] for record in toy.metrics_of(tmp_path) if record["step"] == 3)
        return seen["states"][-1], seen["batches"][-1], loss

    saved = whole(toy.run(toy.config(tmp_path, stop_at=2, **LAYOUTS[source])).state)
    _, batch, loss = next_step(source)
    for target in LAYOUTS.keys() - {source}:
        state, same_batch, same_loss = next_step(target)
        for got, expected in zip(state, saved, strict=True):
            np.testing.assert_array_equal(got, expected, strict=True)
        jax.tree.map(np.testing.assert_array_equal, same_batch, batch)
        assert same_loss == pytest.approx(loss, rel=1e-6), target


def test_a_run_goes_from_eight_devices_to_four_to_one_and_back(tmp_path, seen):
    """In one run: each session begins with what the one before it left, bit by bit."""
    left = None
    for step, layout in enumerate(("data=8", "fsdp=4", "one", "data=8"), 1):
        state = toy.run(toy.config(tmp_path, stop_at=step, **LAYOUTS[layout])).state
        if left is not None:
            for got, expected in zip(seen["states"][-1], left, strict=True):
                np.testing.assert_array_equal(got, expected, strict=True)
        left = whole(state)
    expected = toy.run(toy.config(tmp_path / "whole", **LAYOUTS["data=8"]))
    losses, uninterrupted = (
        [record["loss"] for record in toy.metrics_of(folder) if "loss" in record]
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert losses[:2] == pytest.approx(uninterrupted[:2], rel=1e-6)
    assert losses == pytest.approx(uninterrupted, rel=1e-4) and expected.finished
