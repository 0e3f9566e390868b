"""Kills (SIGKILL) at chosen places of a training, each seen from outside only, and what must be equal afterwards.

    python tests/faults/kills.py FOLDER --kills 100 --seed 0

starts the same command again and again in a few run directories, kills it each time, lets it end at last, and compares
parameters, optimizer state and metrics.jsonl with those of a run that was never killed: bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[depth]) for depth in (0, 1, 2)]

from command import STEPS, Command, Started, write_text

MEASURED = ("tokens_per_second", "mfu")
"""Of a record in metrics.jsonl, what is a speed and never the same twice."""


class Place(NamedTuple):
    """Where a kill happens."""

    reach: Callable[[Started, random.Random], object]
    """Waits until then; false = the command ended before."""
    hit: Callable[[Started], bool] = lambda started: True
    """Whether what is there afterwards shows that it was there."""
    prepare: Callable[[Command], None] = lambda command: None


def _after(seconds: float, draw: random.Random) -> bool:
    time.sleep(draw.uniform(0, seconds))
    return True


def _folders(command: Command) -> dict[int, bool]:
    """Step → whether it has its manifest, of the folders of checkpoints that are there."""
    folder = command.run_dir / "checkpoints"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    return {int(name): os.path.exists(folder / name / "manifest.json") for name in names if name.isdigit()}


def _writing(started: Started) -> bool:
    try:
        return any(".orbax-checkpoint-tmp" in name for name in os.listdir(started.command.run_dir / "checkpoints"))
    except FileNotFoundError:
        return False


def _committing(started: Started) -> bool:
    there = _folders(started.command)
    return bool(there) and not there[max(there)]


def _clearing(started: Started) -> bool:
    there = _folders(started.command)
    return any(not whole and any(other > step and there[other] for other in there) for step, whole in there.items())


def _said(started: Started, words: str) -> bool:
    return any(words in line for line in started.out[0])


def _begun(started: Started) -> bool:
    return started.line(lambda line: line.startswith("  steps "))


def _cold(command: Command) -> None:
    shutil.rmtree(command.cache, ignore_errors=True)


def _step(started: Started, draw: random.Random) -> bool:
    wanted = draw.randint(1, 6)
    return started.line(lambda line: line.startswith("step ") and _counted(started) >= wanted) and _after(0.02, draw)


def _counted(started: Started) -> int:
    return sum(line.startswith("step ") for line in started.out[0])


def _before_evaluation(line: str) -> bool:
    return any(line.startswith(f"step {step}/") for step in range(6, STEPS + 1, 6))


PLACES = {
    "start": Place(lambda started, draw: _after(1.5, draw), lambda started: not _said(started, "  steps ")),
    "tokenizing": Place(
        lambda started, draw: (
            started.line(lambda line: "loading JAX" in line)
            and started.sees(started.command.cache.exists)
            and _after(0.8, draw)
        ),
        lambda started: not _said(started, "  steps "),
        _cold,
    ),
    "compile": Place(
        lambda started, draw: _begun(started) and _after(1.5, draw), lambda started: not _counted(started)
    ),
    "step": Place(_step, lambda started: bool(_counted(started))),
    "evaluation": Place(
        lambda started, draw: started.line(_before_evaluation) and _after(0.1, draw),
        lambda started: not any(line.startswith("evaluation") for line in started.out[0][-1:]),
    ),
    "save": Place(
        lambda started, draw: _begun(started) and started.sees(lambda: _writing(started)) and _after(0.1, draw),
        _writing,
    ),
    "commit": Place(
        lambda started, draw: _begun(started) and started.sees(lambda: _committing(started)) and _after(0.002, draw),
        _committing,
    ),
    "clearing": Place(lambda started, draw: _begun(started) and started.sees(lambda: _clearing(started)), _clearing),
    "end": Place(
        lambda started, draw: started.line(lambda line: line.startswith(f"saved step {STEPS} ")) and _after(2, draw)
    ),
}
"""In "save" the files are being written, in "commit" they are there without a manifest, in "clearing" an older
checkpoint is being deleted, at the "end" the report is drawn."""
ORDER = ("start", "tokenizing", "compile", "step", "evaluation", "save", "clearing", "commit")


class Kill(NamedTuple):
    place: str
    hit: bool
    code: int


def kill_at(command: Command, name: str, draw: random.Random, victim: int = 0) -> Kill | None:
    """Start the command and kill it there; None where it ended well before that."""
    place = PLACES[name]
    place.prepare(command)
    started = command.start()
    try:
        if not place.reach(started, draw):
            started.whole()
            return None
        if command.count == 1:
            started.kill()
        else:
            started.send(signal.SIGKILL, victim)
        codes = started.ended(300)
        assert codes[victim] == -signal.SIGKILL and 0 not in codes, started.told()
        if command.count > 1:
            _named(started, victim)
        return Kill(name, place.hit(started), codes[victim])
    finally:
        started.kill()


def _named(started: Started, victim: int) -> None:
    """Those that were not killed said who was, on one line; before all were connected, they wait for it in vain."""
    for number, lines in enumerate(started.err):
        if number != victim and _said(started, "  run "):
            told = [line for line in lines if f"process {victim} of {started.command.count}" in line]
            assert len(told) == 1 == len([line for line in lines if line.strip()]), started.told()


class Outcome(NamedTuple):
    """What must be the same however often a run was killed."""

    arrays: dict[str, Any]
    """Of the last checkpoint: parameters and the rest of the state."""
    metrics: list[dict]
    config: dict


def outcome(command: Command) -> Outcome:
    from espalier.training import checkpoint

    folder = command.run_dir / "checkpoints" / str(STEPS)
    arrays = {
        f"{item}/{path}": leaf
        for item in ("params", "opt_state")
        for path, leaf in checkpoint._named(checkpoint._restore(folder, item, None)).items()
    }
    records = [json.loads(line) for line in (command.run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in record.items() if name not in MEASURED} for record in records]
    config = json.loads((command.run_dir / "config.json").read_text())
    return Outcome(arrays, metrics, {name: config[name] for name in ("fingerprints", "model", "seed")})


def same(one: Outcome, two: Outcome) -> None:
    """AssertionError unless they are equal in bits."""
    assert one.arrays.keys() == two.arrays.keys()
    for path, leaf in one.arrays.items():
        other = two.arrays[path]
        assert leaf.dtype == other.dtype and leaf.shape == other.shape and leaf.tobytes() == other.tobytes(), path
    assert one.metrics == two.metrics
    assert one.config == two.config


def tidy(command: Command) -> None:
    """Nothing half-written stays after the end."""
    assert all(_folders(command).values())
    left = [path for path in command.run_dir.rglob("*") if "tmp" in path.name or path.name.startswith(".config")]
    left += [path for path in command.cache.glob(".*") if not path.name.endswith(".lock")]
    assert not left, left


def chain(command: Command, places: list[str], draw: random.Random, expected: Outcome) -> list[Kill]:
    """Kill the command at each of these places, let it end, and compare. Returns the kills."""
    kills = []
    for name in places:
        kill = kill_at(command, name, draw, victim=command.count - 1)
        if kill is None:
            # It was at its end: another run goes on with the places that are left.
            _compare(command, expected)
            shutil.rmtree(command.run_dir)
            kill = kill_at(command, name, draw, victim=command.count - 1)
            assert kill is not None, name
        kills.append(kill)
    command.start().whole()
    _compare(command, expected)
    return kills


def _compare(command: Command, expected: Outcome) -> None:
    same(outcome(command), expected)
    tidy(command)


def undisturbed(command: Command) -> Outcome:
    command.start().whole()
    return outcome(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, draw = options.folder.resolve(), random.Random(options.seed)
    text = write_text(folder / "text.txt")
    os.environ["ESPALIER_CACHE"] = str(folder / "own")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    one, two = (undisturbed(Command(folder / f"never-{count}", text, count)) for count in (1, 2))
    # A tenth of the kills hits the second of two processes.
    kinds = [*PLACES] * (options.kills // len(PLACES) + 1)
    order = [*kinds[: options.kills - options.kills // 10]]
    draw.shuffle(order)
    second = [place for place in kinds if place not in ("start", "tokenizing", "end")][: options.kills // 10]
    done: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    jobs = [(1, order[at : at + 9]) for at in range(0, len(order), 9)] + [(2, second)] * bool(second)
    for number, (count, places) in enumerate(jobs):
        command = Command(folder / f"killed-{number}", text, count)
        for kill in chain(command, places, draw, one if count == 1 else two):
            name = kill.place if count == 1 else f"{kill.place}, second of two"
            done[name] += 1
            missed[name] += not kill.hit
        print(f"{time.strftime('%X')} {sum(done.values())} kills, all equal so far", flush=True)
        shutil.rmtree(command.folder)
    for name, kills in sorted(done.items()):
        print(f"{name:28}{kills:4} kills, {kills - missed[name]} of them exactly there")
    print(f"{sum(done.values())} kills: parameters, optimizer state and metrics.jsonl equal in bits")


if __name__ == "__main__":
    main()
