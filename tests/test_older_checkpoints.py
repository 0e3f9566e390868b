"""A checkpoint of another JAX and Orbax comes back bit by bit in every environment of the tests.

It was written by `python tests/test_older_checkpoints.py OUT.zip` in the oldest environment that is supported, and is
only ever added to: what is restored here is what users have on their disks.
"""

import dataclasses
import pathlib
import sys
import tempfile
import zipfile

import jax
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.training.checkpoint import Checkpoints
from espalier.training.checksums import tensors
from espalier.training.config import OptimizerConfig
from espalier.training.optimizer import build_optimizer
from espalier.training.restore import read_config, read_data, restore_state
from espalier.training.state import new_state, shard_state
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import path_of

FOLDER = pathlib.Path(__file__).resolve().parent / "checkpoints"
STEP, CONFIG = 3, {"model": {"hidden_size": 16}, "files": ["a", "文"]}


def abstract_state(mesh: MeshConfig):
    config = OptimizerConfig(name="muon")
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    optimizer = build_optimizer(config, shapes, toy.matrix_axes(shapes))
    empty = jax.eval_shape(
        lambda: new_state(toy.init_params(jax.random.key(0)), optimizer.init, config, jax.random.key(5))
    )
    return shard_state(empty, build_mesh(mesh))


def expected(path: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Values that every type holds exactly, other ones for each path."""
    count = int(np.prod(shape))
    return ((np.arange(count) * 37 + sum(path.encode())) % 251 / 16).astype(dtype).reshape(shape)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(1, 4, 2)], ids=["one device", "eight devices"])
@pytest.mark.parametrize("archive", sorted(FOLDER.glob("*.zip")), ids=lambda path: path.stem)
def test_it_comes_back_bit_by_bit(tmp_path, archive, mesh):
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path)
    state = restore_state(tmp_path, abstract_state(mesh))
    assert int(state.step) == STEP and read_data(tmp_path, STEP) == {"step": STEP}
    assert {**read_config(tmp_path), "format_version": 1} == CONFIG | {"format_version": 1}
    found = tensors(state)
    assert len(found) > 12
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected(path, leaf.shape, leaf.dtype.name), strict=True, err_msg=path)


def test_there_is_one():
    assert list(FOLDER.glob("*.zip"))


def write(archive: str) -> None:
    """Write such a checkpoint from two devices."""
    abstract = abstract_state(MeshConfig(1, 2, 1))
    parts = {path: expected(path, leaf.shape, leaf.dtype.name) for path, leaf in tensors(abstract).items()}

    def filled(part: str, tree):
        def placed(key_path, leaf):
            return jax.device_put(parts[path_of(key_path)], leaf.sharding)

        return jax.tree_util.tree_map_with_path(placed, {part: tree})[part]

    rest = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    state = dataclasses.replace(
        jax.tree.map(jax.numpy.asarray, rest),
        step=jax.numpy.int32(STEP),
        params=filled("params", abstract.params),
        opt_state=filled("optimizer", abstract.opt_state),
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder) / "checkpoints")
        checkpoints.save(state, CONFIG, {"step": STEP})
        checkpoints.close()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
            for path in sorted(pathlib.Path(folder).rglob("*")):
                if path.is_file():
                    # Of no time, so that the same contents are the same archive.
                    files.writestr(zipfile.ZipInfo(str(path.relative_to(folder))), path.read_bytes())


if __name__ == "__main__":
    write(sys.argv[1])
