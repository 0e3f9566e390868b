"""Real processes, really killed: what they leave behind goes on as if nothing had happened."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from quick import xla_flags

from espalier.goodput import goodput, read_sessions

TESTS = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
import time
import numpy as np
import jax
import toy
from espalier.training import checkpoint
from espalier.training.config import CheckpointConfig

run_dir, pause = sys.argv[1], float(sys.argv[2])
if "hang" in sys.argv:  # at the last moment of the first save
    checkpoint.write_manifest = lambda folder: time.sleep(1000)

def batches_from(step):
    for batch in toy.batches_from(step):
        time.sleep(pause)
        yield batch

config = toy.config(run_dir, steps=40, checkpoint=CheckpointConfig(every=10), eval_every=20)
result = toy.run(config, batches_from=batches_from)
leaves = jax.tree.leaves(jax.device_get(result.state))
np.savez(run_dir + "/final.npz", *leaves)
"""


@pytest.fixture
def start(tmp_path):
    """start(run directory, seconds a step): a process that trains the toy for 40 steps."""
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "XLA_FLAGS": xla_flags(2),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    started = []

    def start(run_dir, pause, *more):
        command = [sys.executable, "-c", PROGRAM, str(run_dir), str(pause), *more]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out, err


def wait_for(process, condition):
    for _ in range(2400):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("the process did not come so far within two minutes")


def complete(run_dir):
    return sorted(int(path.parent.name) for path in run_dir.glob("checkpoints/*/manifest.json"))


def final(run_dir):
    with np.load(run_dir / "final.npz") as arrays:
        return [arrays[name] for name in arrays.files]


def losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


@pytest.fixture
def whole(start, tmp_path):
    finish(start(tmp_path / "whole", 0))
    return tmp_path / "whole"


def test_killed_and_terminated_runs_go_on_bit_by_bit(start, tmp_path, whole):
    run_dir = tmp_path / "killed"
    process = start(run_dir, 0.1)
    wait_for(process, lambda: complete(run_dir))
    process.kill()
    finish(process, code=-signal.SIGKILL)
    before = complete(run_dir)[-1]

    process = start(run_dir, 0, "hang")
    half = run_dir / "checkpoints" / str(before + 10)
    wait_for(process, half.exists)
    process.kill()
    finish(process, code=-signal.SIGKILL)
    assert half.exists() and complete(run_dir)[-1] == before and not (run_dir / "final.npz").exists()

    process = start(run_dir, 0.1)
    wait_for(process, lambda: losses(run_dir)[-1][0] <= before)
    wait_for(process, lambda: losses(run_dir)[-1][0] > before)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process, code=0)
    assert f"removed checkpoint {before + 10}: it was not written to its end" in out
    assert f"resumed at step {before}\n" in out
    assert "SIGTERM: saving; press Ctrl-C again" in err
    stopped = complete(run_dir)[-1]
    assert f"paused at step {stopped} of 40, saved; the same command goes on from here" in out
    (run_dir / "final.npz").unlink()

    out, _ = finish(start(run_dir, 0))
    assert f"resumed at step {stopped}\n" in out
    for got, expected in zip(final(run_dir), final(whole), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert losses(run_dir) == losses(whole)
    assert not list(run_dir.glob("checkpoints/*tmp*"))

    sessions = read_sessions(run_dir / "sessions.jsonl")
    assert [(one.start, one.end) for one in sessions] == [(0, ""), (before, ""), (before, "ended"), (stopped, "ended")]
    found = goodput(sessions)
    assert found is not None and (found.killed, found.unrecorded) == (2, 0)
    assert found.lost_steps == sum(max(0, one.step - before) for one in sessions[:2])
    assert 0 < found.seconds["training"] < found.total
