"""A run of the real command that is killed again and again (SIGKILL) and begun again at once: what of its time counts?

    .venv/bin/python tests/soak.py FOLDER [--kills 20] [--seconds 60] [--core 1] [FLAGS of clm debug]

Every session is killed so many seconds after its first step was done. After the last kill the run goes on to a step
that it had not reached, and a run without kills goes there too: both must have the same parameters and the same
optimizer state, bit for bit. Too long for the suite; test_goodput.py has its arithmetic.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from espalier.goodput import Session, goodput, read_sessions, words  # noqa: E402

STEPS = 10**6
"""Of the schedule, which nobody reaches."""


def figure(sessions: list[Session]) -> float:
    """The part of the time outside start and compilation that became training that counts.

    In the denominator: training, steps done again, waits for saves and data, evaluations, and the time between a
    session's last sign of life and the start of the next process, for here nobody paused the run. Not in it: from the
    start of a process to its first batch, and from there to the end of the first step.
    """
    found = goodput(sessions)
    assert found is not None
    seconds = found.seconds
    return seconds["training"] / (found.total + found.between - seconds["start"] - seconds["compile"])


class Runs:
    def __init__(self, folder: pathlib.Path, core: int | None, flags: list[str]):
        self.folder, self.core, self.flags = folder, core, flags
        # Programs are compiled once; start and compilation are left out of the figure all the same.
        cached = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.environment = os.environ | cached | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def begin(self, run: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-P", "-m", "clm.pretrain", "debug", "--run-dir", str(self.folder / run)]
        command += ["--steps", str(STEPS), "--eval-every", str(STEPS), *self.flags, *flags]
        process = subprocess.Popen(
            command,
            env=self.environment,
            cwd=ROOT,
            stdout=(self.folder / f"{run}.txt").open("a"),
            stderr=subprocess.STDOUT,
        )
        if self.core is not None:
            os.sched_setaffinity(process.pid, {self.core})
        return process

    def sessions(self, run: str) -> list[Session]:
        return read_sessions(self.folder / run / "sessions.jsonl")

    def after_its_first_step(self, run: str, process: subprocess.Popen, before: int) -> None:
        while len(found := self.sessions(run)) <= before or found[-1].step == found[-1].start:
            assert process.poll() is None, (self.folder / f"{run}.txt").read_text()[-2000:]
            time.sleep(0.1)

    def ends(self, run: str, *flags: str) -> None:
        code = self.begin(run, *flags).wait()
        assert code == 0, (self.folder / f"{run}.txt").read_text()[-2000:]


def equal(one: pathlib.Path, other: pathlib.Path, step: int) -> int:
    """How many arrays of the two checkpoints are equal bit for bit; AssertionError where one is not."""
    import jax
    import numpy as np

    from espalier.training.restore import restore_item

    count = 0
    for item in ("params", "opt_state"):
        a, b = (restore_item(run / "checkpoints" / str(step), item, None) for run in (one, other))
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--core", type=int)
    given, flags = parser.parse_known_args()
    given.folder.mkdir(parents=True)
    runs, began = Runs(given.folder, given.core, flags), time.time()
    for number in range(given.kills):
        process = runs.begin("killed")
        runs.after_its_first_step("killed", process, number)
        time.sleep(given.seconds)
        process.kill()
        assert process.wait() == -9
        last = runs.sessions("killed")[-1]
        print(f"kill {number + 1} at step {last.step}, {time.time() - began:.0f} s after the beginning", flush=True)
    last = runs.sessions("killed")[-1].step + 20
    for run in ("killed", "whole"):
        runs.ends(run, "--stop-at", str(last))
    sessions = runs.sessions("killed")
    found = goodput(sessions)
    assert found is not None and found.killed == given.kills
    alike = equal(given.folder / "killed", given.folder / "whole", last)
    print(words(found))
    print(json.dumps(found.record))
    print(f"{figure(sessions):.1%} of the time outside start and compilation is training that counts")
    print(f"at step {last} all {alike} arrays equal those of the run without kills, bit for bit")
    print(f"load of the machine over the last 15 minutes: {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
