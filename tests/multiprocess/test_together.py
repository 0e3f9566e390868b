"""Two and four processes with two devices each compute what one process does with all of them."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.training.config import CheckpointConfig
from espalier.training.manifest import complete_steps
from espalier.training.optimizer import build_optimizer
from espalier.training.restore import read_data
from espalier.training.run import RunDirectory
from espalier.training.start import find_origin, first_state
from sharding.mesh import MeshConfig, build_mesh

pytestmark = pytest.mark.timeout(400)

TWO = {
    "data": dict(data=4),
    "fsdp": dict(data=1, fsdp=4),
    "tensor": dict(data=1, tensor=4),
    "sequence": dict(data=1, sequence=4),
    "replica": dict(replica=2, data=1, fsdp=2),
}
FOUR = {
    "replica": dict(replica=4, data=1, fsdp=2),
    "everything": dict(data=1, fsdp=2, sequence=2, tensor=2),
}
"""Meshes over the devices of all processes; `data` and `fsdp` alone give each process rows of its own."""


def job(run_dir, mesh, **more) -> str:
    return json.dumps({"run_dir": str(run_dir), "mesh": mesh, "steps": 3} | more)


def state_in(path) -> list[np.ndarray]:
    with np.load(path) as arrays:
        return [arrays[name] for name in arrays.files]


def alone(run_dir, mesh, **changes):
    """The same in this process; returns the leaves of the final state."""
    config = toy.config(run_dir, mesh=MeshConfig(**mesh), **{"steps": 3} | changes)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(toy.run(config).state)]


def losses(run_dir) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in toy.metrics_of(run_dir) if "loss" in record]


def assert_close(state, expected_state):
    """As for any two layouts (tests/test_sharding_layouts.py): ‖Δ‖ ≤ 1e-5 ‖p‖ + 1e-6 √n for every leaf."""
    for got, expected in zip(state, expected_state, strict=True):
        difference = np.linalg.norm(got.astype(float) - expected.astype(float))
        assert difference <= 1e-5 * np.linalg.norm(expected.astype(float)) + 1e-6 * np.sqrt(expected.size)


def test_processes_go_back_together(run, tmp_path):
    """Batches 4 and 5 are bad and the last checkpoint is of step 3: both take the batches 0, 1, 2, 6, 7, … ."""
    bad = {"poison": [4, 5], "bad_steps": {"in_a_row": 2}}
    run(2, "worker.py", job(tmp_path / "two", TWO["fsdp"], **{"steps": 6, "every": 3} | bad))
    order = (0, 1, 2, 6, 7, 8, 9, 10)

    def batches_from(step):
        yield from (toy.batch(number) for number in order[step:])

    config = toy.config(tmp_path / "one", mesh=MeshConfig(**TWO["fsdp"]), steps=6)
    one = toy.run(config, batches_from=batches_from)
    assert_close(state_in(tmp_path / "two" / "final.npz"), [np.asarray(leaf) for leaf in jax.tree.leaves(one.state)])
    assert read_data(tmp_path / "two", 6)["skipped"]["windows"] == [[3, 3]]


def assert_same(run_dir, expected_dir, expected_state):
    assert_close(state_in(run_dir / "final.npz"), expected_state)
    assert [step for step, _ in losses(run_dir)] == [step for step, _ in losses(expected_dir)]
    np.testing.assert_allclose(*([loss for _, loss in losses(x)] for x in (run_dir, expected_dir)), rtol=1e-6)


@pytest.mark.parametrize("count, meshes", [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_processes_compute_what_one_does(run, tmp_path, count, meshes):
    together = run(count, "worker.py", *(job(tmp_path / name, mesh) for name, mesh in meshes.items()))
    assert "step 3/3" in together.out(0)
    for number in range(1, count):
        assert together.out(number) == "", "only process 0 speaks"
    for name, mesh in meshes.items():
        assert_same(tmp_path / name, tmp_path / f"{name}-alone", alone(tmp_path / f"{name}-alone", mesh))
        rows = [json.loads((tmp_path / name / f"rows-{number}.json").read_text()) for number in range(count)]
        everything = sorted(sum(rows, []))
        if name in ("data", "fsdp", "replica"):
            assert everything == list(range(toy.ROWS)), f"{name}: each row is loaded by one process alone"
            assert all(len(part) == toy.ROWS // count for part in rows)
        else:
            assert set(everything) == set(range(toy.ROWS))


def test_what_is_frozen_and_collected_is_that_of_one_process(run, tmp_path):
    """Two processes write the frozen part and the collected values, read them when they go on, and train the same."""
    mesh, frozen = TWO["fsdp"], tmp_path / "run" / "frozen" / "0" / "manifest.json"
    run(2, "worker.py", *(job(tmp_path / "run", mesh, frozen=True, **more) for more in ({"stop_at": 2}, {})))
    config = toy.config(tmp_path / "alone", mesh=MeshConfig(data=1, fsdp=4), steps=3)
    state = toy.run(config, **toy.partly_frozen()).state
    assert_same(tmp_path / "run", tmp_path / "alone", [np.asarray(leaf) for leaf in jax.tree.leaves(state)])
    assert read_data(tmp_path / "run", 3)["frozen"]["sha256"] == hashlib.sha256(frozen.read_bytes()).hexdigest()
    logs = [(tmp_path / name / "collected" / "log.jsonl").read_text().splitlines() for name in ("run", "alone")]
    assert [[json.loads(line)["step"] for line in log] for log in logs] == [[0, 1, 2]] * 2


def test_a_checkpoint_of_any_number_of_processes_goes_on_in_any_other(run, tmp_path):
    """Saved by 1, 2 and 4 processes after 2 of 4 steps; restored bit by bit, and the steps that follow are the same."""
    meshes = {1: dict(data=2, fsdp=2), 2: dict(data=1, fsdp=4), 4: dict(data=2, fsdp=2, tensor=2)}
    half = {count: tmp_path / f"half-{count}" for count in meshes}
    saved = {1: alone(half[1], meshes[1], steps=4, stop_at=2)}
    whole = alone(tmp_path / "whole", meshes[1], steps=4)

    def first_half(count):
        return job(half[count], meshes[count], steps=4, stop_at=2)

    def goes_on(source, target):
        folder = tmp_path / f"from-{source}-in-{target}"
        # The toy's fingerprint is its folder.
        shutil.copytree(half[source], folder)
        settings = json.loads((folder / "config.json").read_text())
        settings["fingerprints"]["train"] = str(folder)
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    run(4, "worker.py", first_half(4))
    saved[4] = state_in(half[4] / "final.npz")
    # Two processes go on from four in the group that saves its own half after that: starting one is what costs.
    for target, sources, then in ((2, [4], [2]), (4, [1, 2], [])):
        folders = {source: goes_on(source, target) for source in sources}
        jobs = [job(folder, meshes[target], steps=4) for folder in folders.values()]
        group = run(target, "worker.py", *jobs, *map(first_half, then))
        saved |= {count: state_in(half[count] / "final.npz") for count in then}
        for source, folder in folders.items():
            assert "resumed at step 2\n" in group.out(0)
            for got, expected in zip(state_in(folder / "start.npz"), saved[source], strict=True):
                np.testing.assert_array_equal(got, expected)
            assert_same(folder, tmp_path / "whole", whole)
            assert complete_steps(folder / "checkpoints") == [2, 4]
    folder = goes_on(4, 1)
    for got, expected in zip(restored_state(folder, meshes[1]), saved[4], strict=True):
        np.testing.assert_array_equal(got, expected)
    assert_close(alone(folder, meshes[1], steps=4), whole)


def restored_state(run_dir, mesh) -> list[np.ndarray]:
    """What a run in this process goes on from."""
    config = toy.config(run_dir, steps=4, mesh=MeshConfig(**mesh), checkpoint=CheckpointConfig(every=100))
    origin = find_origin(config, RunDirectory(run_dir))
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    optimizer = build_optimizer(config.optimizer, shapes, toy.matrix_axes(shapes))
    state = first_state(config, toy.init_params, optimizer, build_mesh(config.mesh), origin)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
