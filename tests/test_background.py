"""Training goes on at its speed while a checkpoint is written: what is written is a copy, by threads that give way."""

import contextlib
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.training import background, checkpoint
from espalier.training.config import CheckpointConfig
from sharding.mesh import MeshConfig, build_mesh


@pytest.mark.parametrize("axes", [MeshConfig(1, 1, 1), MeshConfig(2, 4, 1)])
def test_what_is_held_is_a_copy_laid_out_alike_and_its_source_can_be_donated(axes):
    mesh = build_mesh(axes)
    layout = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    array = jax.device_put(jnp.arange(64.0).reshape(4, 16), layout)
    before = np.array(array)
    held = background.held({"a": array})["a"]
    assert held.sharding == array.sharding and held.dtype == array.dtype
    jax.jit(lambda x: x * 0, donate_argnums=0)(array)
    # The buffers themselves were given away, so that the step makes no new ones.
    assert array.is_deleted()
    np.testing.assert_array_equal(held, before)


def test_the_threads_that_write_give_way_and_no_others_do_unless_the_run_waits_for_them(tmp_path, monkeypatch):
    def levels(names: str | None = None) -> dict[int, int]:
        found = {}
        for task in Path("/proc/self/task").glob("*"):
            with contextlib.suppress(OSError):  # it has ended
                if names is None or (task / "comm").read_text().startswith(names):
                    found[int(task.name)] = os.getpriority(os.PRIO_PROCESS, int(task.name))
        return found

    monkeypatch.setattr(background, "LARGE", 1)
    seen = []
    write = checkpoint.write_manifest

    def looked(folder):
        seen.append((levels()[threading.get_native_id()], set(levels("ts_pool").values())))
        return write(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", looked)
    others = {thread: level for thread, level in levels().items() if thread not in levels("ts_pool")}
    usual = others[threading.get_native_id()]
    toy.run(toy.config(tmp_path, steps=2, checkpoint=CheckpointConfig(every=1)), eval_batches=[toy.batch(9)])
    (own, writers), (last, _) = seen
    assert (own, writers, last) == (background.NICENESS, {background.NICENESS}, usual) and usual < own
    now = levels()
    assert all(now.get(thread, level) == level for thread, level in others.items())
