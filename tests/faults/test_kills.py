"""A training that is killed and interrupted everywhere ends with the bits of one that was left alone (kills.py)."""

import random
import signal
import subprocess
import sys

import pytest
from command import ROOT, Command, write_text
from kills import chain, undisturbed

HERE = (
    # Of a compile and of a step: by the hundred, and tests/e2e/test_kill.py.
    ("start", signal.SIGINT),
    ("tokenizing", signal.SIGKILL),
    ("tokenizing", signal.SIGTERM),
    ("evaluation", signal.SIGHUP),
    ("save", signal.SIGKILL),
    ("clearing", signal.SIGKILL),
    ("commit", signal.SIGKILL),
)


@pytest.mark.timeout(1200)
def test_killed_and_interrupted_at_each_place(tmp_path):
    text = write_text(tmp_path / "text.txt")
    expected = undisturbed(Command(tmp_path / "alone", text))
    done = chain(Command(tmp_path / "killed", text), HERE, random.Random(0), expected)
    assert [(kill.place, kill.number) for kill in done] == [*HERE]
    # A moment may pass by unseen, most do not.
    assert sum(kill.hit for kill in done) >= len(HERE) // 2, done


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("flags", [("--kills", 100), ("--kills", 30, "--signals", "SIGTERM", "SIGINT", "SIGHUP")])
def test_by_the_hundred(tmp_path, flags):
    command = [sys.executable, ROOT / "tests" / "faults" / "kills.py", tmp_path / "runs", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("equal in bits")
