"""A training that is killed and interrupted everywhere ends with the bits of one that was left alone (kills.py)."""

import random
import signal
import subprocess
import sys

import pytest
from command import ROOT, Command, write_text
from kills import chain, undisturbed

ALONE = (
    ("start", signal.SIGINT),
    ("start", signal.SIGKILL),
    ("tokenizing", signal.SIGKILL),
    ("tokenizing", signal.SIGTERM),
    ("compile", signal.SIGKILL),
    ("step", signal.SIGKILL),
    ("evaluation", signal.SIGHUP),
    ("save", signal.SIGKILL),
    ("clearing", signal.SIGKILL),
    ("commit", signal.SIGKILL),
    ("step", signal.SIGTERM),
    ("evaluation", signal.SIGKILL),
    ("save", signal.SIGKILL),
    ("commit", signal.SIGKILL),
    ("compile", signal.SIGINT),
    ("step", signal.SIGKILL),
    ("clearing", signal.SIGKILL),
    ("end", signal.SIGKILL),
)
THE_SECOND_OF_TWO = ("step", signal.SIGKILL), ("save", signal.SIGKILL)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "count, places",
    [(1, ALONE[:9]), (1, ALONE[9:]), (2, THE_SECOND_OF_TWO)],
    ids=["alone", "alone, later", "the second of two"],
)
def test_killed_and_interrupted_at_each_place(tmp_path, count, places):
    text = write_text(tmp_path / "text.txt")
    expected = undisturbed(Command(tmp_path / "alone", text, count))
    done = chain(Command(tmp_path / "killed", text, count), places, random.Random(0), expected)
    assert [(kill.place, kill.number) for kill in done] == [*places]
    # A moment may pass by unseen, most do not.
    assert sum(kill.hit for kill in done) >= len(places) // 2, done


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("flags", [("--kills", 100), ("--kills", 30, "--signals", "SIGTERM", "SIGINT", "SIGHUP")])
def test_by_the_hundred(tmp_path, flags):
    command = [sys.executable, ROOT / "tests" / "faults" / "kills.py", tmp_path / "runs", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("equal in bits")
