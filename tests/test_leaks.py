"""A run holds as much at its end as after its first steps: memory, objects, threads, open files.

The long one, on a real command, prints its figures: `./launch.sh test -m soak tests/test_leaks.py -s`.
"""

import collections
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.training.config import CheckpointConfig

ROOT = Path(__file__).resolve().parents[1]
ONE_EACH_SAVE = "CheckpointInfo"
"""Orbax's record of a save: a time and a step."""


def open_files(process: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def kinds_of_objects() -> collections.Counter[str]:
    """How many objects of each class there are, but for what abstract classes remember of each class they were asked
    about: one weak reference in each of them, and its callback."""
    gc.collect()
    objects = gc.get_objects()
    kinds = collections.Counter(type(each).__name__ for each in objects)
    remembered = sum(type(each) is types.BuiltinFunctionType and each.__name__ == "_destroy" for each in objects)
    kinds.subtract({"builtin_function_or_method": remembered, "ReferenceType": remembered})
    return kinds


def test_what_a_run_holds_does_not_grow_with_its_steps(tmp_path):
    held = {}

    def batches_from(step: int):
        while True:
            if step in (100, 199):
                for thread in threading.enumerate():
                    if thread.name.startswith("saving step"):
                        thread.join()
                held[step] = kinds_of_objects(), threading.active_count(), open_files()
            yield toy.batch(step % 7)
            step += 1

    settings = dict(steps=200, checkpoint=CheckpointConfig(every=5), eval_every=25, log_every=5)
    toy.run(toy.config(tmp_path, **settings), batches_from=batches_from, eval_batches=[toy.batch(9)])
    (kinds, threads, files), (kinds_then, threads_then, files_then) = held[100], held[199]
    assert threads_then <= threads + 2 and files_then <= files + 2
    grown = {kind: kinds_then[kind] - kinds[kind] for kind in kinds_then if kind != ONE_EACH_SAVE}
    # Fewer of a kind than two a save; there are twenty saves between.
    assert {kind: count for kind, count in grown.items() if count >= 40} == {}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_memory_and_open_files_of_a_command_are_flat(tmp_path, steps=2000):
    """Saves every 20 steps, evaluations every 50, a log every 10; read from outside."""
    run = tmp_path / "run"
    flags = "--checkpoint.every 20 --eval-every 50 --log-every 10".split()
    command = [sys.executable, "-P", "-m", "espalier", "mlm", "debug", "--steps", str(steps), "--run-dir", str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    seen = []
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*command, *flags], env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            time.sleep(0.2)
            try:
                status = dict(
                    line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                )
                step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
                kilobytes, threads = int(status["VmRSS"].split()[0]), int(status["Threads"])
                seen.append((step, kilobytes, threads, open_files(process.pid)))
            except (OSError, ValueError, IndexError, KeyError):
                continue
    assert process.returncode == 0, (tmp_path / "said").read_text()
    early = [of for step, *of in seen if 200 <= step < 400]
    late = [of for step, *of in seen if steps - 200 <= step < steps]
    both = zip(zip(*early, strict=True), zip(*late, strict=True), strict=True)
    for what, (then, now) in zip(("kB", "threads", "open files"), both, strict=True):
        middle = statistics.median(then), statistics.median(now)
        print(f"{what}: {middle[0]:.0f} in steps 200 to 400, {middle[1]:.0f} in the last 200", end="; ")
        print(f"at most {max(then)} and {max(now)}")
        if what == "kB":
            assert max(middle[1] / middle[0], max(now) / max(then)) < 1.02
        else:
            # They come and go with each save.
            assert max(now) <= 1.2 * max(then)
