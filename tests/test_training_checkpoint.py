"""Checkpoints come back bit by bit on any mesh, and damage, misfits and failed saves are said aloud."""

import dataclasses
import hashlib
import json
import re
import shutil
import threading
import time
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier import progress
from espalier.errors import UserError
from espalier.training import checkpoint
from espalier.training.checkpoint import Checkpoints
from espalier.training.config import CheckpointConfig, OptimizerConfig
from espalier.training.manifest import complete_steps
from espalier.training.optimizer import build_optimizer
from espalier.training.restore import read_config, restore_optimizer, restore_params, restore_state
from espalier.training.state import new_state, shard_state
from sharding.mesh import MeshConfig, build_mesh

CONFIG = {"model": {"hidden_size": 16}, "files": ["a", "b"]}


def layout(mesh_config=None, name: Literal["adamw", "muon"] = "muon"):
    """The abstract state on a mesh, and a jitted function step → a state full of random bits."""
    config = OptimizerConfig(name=name)
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    optimizer = build_optimizer(config, shapes, toy.matrix_axes(shapes))
    mesh = build_mesh(mesh_config or MeshConfig(1, 4, 2))
    empty = jax.eval_shape(
        lambda: new_state(toy.init_params(jax.random.key(0)), optimizer.init, config, jax.random.key(5))
    )
    abstract = shard_state(empty, mesh)

    def fill(step):
        random = np.random.default_rng(step)

        def leaf(a):
            if not a.ndim:
                return jax.device_put(np.asarray(step, a.dtype), a.sharding)
            return jax.device_put(random.normal(size=a.shape).astype(a.dtype), a.sharding)

        return jax.tree.map(leaf, abstract)

    return abstract, fill


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with checkpoint 3, written from 8 devices, and the state in it."""
    folder = tmp_path_factory.mktemp("saved")
    _, fill = layout()
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(fill(3), CONFIG, {"step": 3})
    checkpoints.close()
    return folder, fill(3)


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("mesh", [MeshConfig(1, 4, 2), MeshConfig(1, 1, 1), MeshConfig(4, 2, 1)])
def test_a_state_comes_back_bit_by_bit_on_any_mesh(saved, mesh):
    folder, state = saved
    abstract, _ = layout(mesh)
    restored = restore_state(folder, abstract)
    assert_equal(restored, state)
    jax.tree.map(
        lambda leaf, a: leaf.sharding.is_equivalent_to(a.sharding, leaf.ndim) or pytest.fail(), restored, abstract
    )


def test_params_and_config_alone_suffice_to_use_the_model(copied, saved):
    for unneeded in ("opt_state", "data"):
        shutil.rmtree(copied / "checkpoints" / "3" / unneeded)
    abstract, _ = layout(MeshConfig(1, 8, 1))
    assert_equal(restore_params(copied, abstract.params), saved[1].params)
    as_numpy = restore_params(copied)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(as_numpy))
    assert_equal(as_numpy, saved[1].params)
    assert read_config(copied) == CONFIG | {"format_version": 1}


def test_the_optimizer_state_alone(saved):
    abstract, _ = layout()
    assert_equal(restore_optimizer(saved[0], abstract), saved[1].opt_state)


def test_misfits_are_listed(saved):
    abstract, _ = layout()
    wanted = dict(abstract.params)
    wanted["embeddings"] = {"token": {"embedding": jax.ShapeDtypeStruct((99, 16), jnp.float32)}}
    wanted["head"] = {
        "causal_lm": {"kernel": jax.ShapeDtypeStruct((32, 16), jnp.int32)},
        "extra": wanted["head"]["causal_lm"]["kernel"],
    }
    del wanted["layers"]
    with pytest.raises(UserError) as error:
        restore_params(saved[0], wanted)
    for words in (
        r"embeddings/token/embedding is float32 (32, 16), wanted float32 (99, 16)",
        r"head/causal_lm/kernel is float32 (32, 16), wanted int32 (32, 16)",
        "head/extra is missing",
        "layers/period/0/mlp/up/kernel is not expected",
    ):
        assert words in str(error.value)


def test_another_optimizer_does_not_fit(saved):
    abstract, _ = layout(name="adamw")
    with pytest.raises(
        UserError, match="opt_state does not fit.*optimizer/mu/embeddings/token/embedding is missing.*and .. more"
    ):
        restore_state(saved[0], abstract)


def test_leaves_are_found_by_their_names_not_their_order(tmp_path):
    """A state whose fields are not in alphabetical order: Orbax returns them sorted."""

    class Moments(NamedTuple):
        second: jax.Array
        first: jax.Array

    _, fill = layout()
    state = dataclasses.replace(fill(5), opt_state=Moments(jnp.full(3, 2.0), jnp.full(3, 1.0)))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, CONFIG, {})
    checkpoints.close()
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    restored = restore_state(tmp_path, abstract).opt_state
    assert (restored.first == 1).all() and (restored.second == 2).all()


def test_a_parameter_that_the_model_lacks_is_named(saved):
    abstract, _ = layout()
    part = {name: abstract.params[name] for name in ("embeddings", "layers")}
    with pytest.raises(UserError, match="head/causal_lm/kernel is not expected"):
        restore_params(saved[0], part)


def test_one_flipped_bit_is_found(copied):
    files = [path for path in (copied / "checkpoints" / "3" / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=f"checkpoint .*3 is damaged: params/.*{largest.name} is not as it was written"):
        restore_params(copied)


def test_a_lost_file_is_found(copied):
    next((copied / "checkpoints" / "3" / "params").rglob("manifest.ocdbt")).unlink()
    with pytest.raises(UserError, match="is damaged.*manifest.ocdbt"):
        restore_params(copied)


def test_a_checkpoint_without_manifest_does_not_count(copied):
    folder = copied / "checkpoints"
    shutil.copytree(folder / "3", folder / "9")
    (folder / "9" / "manifest.json").unlink()
    (folder / "9.unfinished").touch()
    shutil.copytree(folder / "9", folder / "8")
    (folder / "2.removed").mkdir()
    said = []
    checkpoints = Checkpoints(folder, announce=said.append)
    assert checkpoints.latest() == 3
    assert said == [
        "warning: checkpoint 8 has no manifest.json any more and is set aside as 8.damaged",
        "removed checkpoint 9: it was not written to its end",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["3", "8.damaged"]
    _, fill = layout()
    checkpoints.save(fill(7), CONFIG, {"step": 7})
    checkpoints.close()
    assert complete_steps(folder) == [3, 7]


def test_what_is_not_there_is_named(saved, tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}/checkpoints"):
        restore_params(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 4 .*there are 3"):
        restore_params(saved[0], step=4)


def test_a_newer_format_is_refused(copied):
    file = copied / "checkpoints" / "3" / "manifest.json"
    held = json.loads(file.read_text())
    newer = {name: value for name, value in held.items() if name != "seal"} | {"format_version": 99}
    seal = hashlib.sha256(json.dumps(newer, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    file.write_text(json.dumps(newer | {"seal": seal}))
    for read in (restore_params, read_config):
        with pytest.raises(UserError, match="format version 99 and this code reads 1"):
            read(copied)


def test_the_newest_stay_and_steps_only_grow(tmp_path):
    _, fill = layout(name="adamw")
    said = []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2), announce=said.append)
    for step in (1, 2, 3):
        checkpoints.save(fill(step), CONFIG, {"step": step})
    with pytest.raises(ValueError, match="step 2 is not after 3"):
        checkpoints.save(fill(2), CONFIG, {})
    assert checkpoints.latest() == 3
    checkpoints.close()
    assert complete_steps(tmp_path) == [2, 3]
    assert len(said) == 3 and re.fullmatch(r"saved step 1 \(0\.\d MB, \d+\.\d s\)", said[0])


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    abstract, fill = layout()
    state, expected = fill(5), jax.device_get(fill(5))
    overwrite = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0 + 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, CONFIG, {})
    for _ in range(20):
        state = overwrite(state)
    checkpoints.close()
    assert_equal(jax.device_get(restore_state(tmp_path, abstract)), expected)


def test_a_save_that_is_waited_for_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.25)
    monkeypatch.setattr(checkpoint, "write_manifest", slow(checkpoint.write_manifest))
    _, fill = layout()
    state = fill(5)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, CONFIG, {})
    checkpoints.close()
    size = progress.amount(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    waited = re.match(rf"saving step 5 … ([\d.]+ k)B of {size}B\nsaved step 5 \(", capsys.readouterr().out)
    assert waited and float(waited[1].split()[0]) > 0.5 * float(size.split()[0])


def slow(function):
    def later(*arguments):
        time.sleep(0.5)
        return function(*arguments)

    return later


def test_a_failed_save_is_raised_at_the_next_look(tmp_path, monkeypatch):
    _, fill = layout()
    checkpoints = Checkpoints(tmp_path)
    wait = checkpoints._manager.wait_until_finished

    def full():
        wait()
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("RESOURCE_EXHAUSTED: write: No space left on device")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)
    checkpoints.save(fill(1), CONFIG, {})
    with pytest.raises(OSError, match="checkpoint 1 could not be written: no space left") as error:
        for _ in range(3000):
            checkpoints.check()
            time.sleep(0.01)
    assert error.value.errno == 28
    assert checkpoints.latest() is None
    checkpoints.close()
