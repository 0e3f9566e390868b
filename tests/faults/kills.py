"""Kills and other signals at chosen places of a training, seen from outside only, and what must be equal afterwards.

    python tests/faults/kills.py FOLDER --kills 100
    python tests/faults/kills.py FOLDER --kills 30 --signals SIGTERM SIGINT SIGHUP --processes 4

(one of ten of the first to the second of two processes) starts the same command again and again in a few run
directories, sends the signal each time, lets it end at last, and compares parameters, optimizer state and metrics.jsonl
with those of a run that was left alone: bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
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
    folder, names = command.run_dir / "checkpoints", _names(command)
    return {int(name): os.path.exists(folder / name / "manifest.json") for name in names if name.isdigit()}


def _names(command: Command) -> list[str]:
    try:
        return os.listdir(command.run_dir / "checkpoints")
    except FileNotFoundError:
        return []


def _writing(started: Started) -> bool:
    return any(".orbax-checkpoint-tmp" in name for name in _names(started.command))


def _committing(started: Started) -> bool:
    there = _folders(started.command)
    return bool(there) and not there[max(there)]


def _clearing(started: Started) -> bool:
    return any(name.endswith(".removed") for name in _names(started.command))


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
    number: int
    seconds: float
    """Until all processes had ended."""


def kill_at(command: Command, name: str, draw: random.Random, number: int = signal.SIGKILL) -> Kill | None:
    """Start the command and send the signal there, to one of its processes; None where it ended well before that."""
    place = PLACES[name]
    place.prepare(command)
    started = command.start()
    victim = draw.randrange(command.count) if number != signal.SIGKILL else command.count - 1
    try:
        if number != signal.SIGKILL:
            started.sees(lambda: catches(started.processes[victim].pid, number))
        if not place.reach(started, draw):
            started.whole()
            return None
        hit, began = place.hit(started), time.monotonic()
        complete = _folders(command).get(STEPS, False)
        started.send(number, victim)
        codes = started.ended(300)
        seconds = time.monotonic() - began
        if number == signal.SIGKILL:
            assert codes[victim] == -number and (command.count == 1 or 0 not in codes), started.told()
            _named(started, victim)
            hit = place.hit(started)
        else:
            _ended_by(started, victim, number, complete, codes)
        return Kill(name, hit, number, seconds)
    finally:
        started.kill()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal: Python has, from its first moment, for Ctrl-C alone."""
    with contextlib.suppress(OSError):
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1 and caught >> (number - 1) & 1)
    return False


def _named(started: Started, victim: int) -> None:
    """Those that were not killed said who was, on one line; before all were connected, they wait for it in vain."""
    for number, lines in enumerate(started.err):
        if number != victim and _said(started, "  run "):
            told = [line for line in lines if f"process {victim} of {started.command.count}" in line]
            assert len(told) == 1 == len([line for line in lines if line.strip()]), started.told()


def _ended_by(started: Started, victim: int, number: int, complete: bool, codes: list[int]) -> None:
    """All ended by the signal, with one line each at most, saved where a step was made.

    complete: all steps had been saved before it; then they may have been at their end.
    """
    told = started.told()
    if complete and codes == [0] * len(codes):
        return
    assert codes == [128 + number] * len(codes), f"{codes} {told}"
    for at, lines in enumerate(started.err):
        said = [line for line in lines if line.strip()]
        assert len(said) == 1 if at == victim else len(said) <= 1, told
        assert all(signal.Signals(number).name in line or "interrupted" in line for line in said), told
    if any("saving" in line for line in started.err[victim]):
        assert _said(started, "saved; the same command goes on") or _folders(started.command).get(STEPS), told
    else:
        assert complete or not _counted(started), told


class Outcome(NamedTuple):
    """What must be the same however often a run was killed."""

    arrays: dict[str, Any]
    """Of the last checkpoint: parameters and the rest of the state."""
    metrics: list[dict]
    config: dict


def outcome(command: Command) -> Outcome:
    from espalier.training.restore import by_path, restore_item

    folder = command.run_dir / "checkpoints" / str(STEPS)
    arrays = {
        f"{item}/{path}": leaf
        for item in ("params", "opt_state")
        for path, leaf in by_path(restore_item(folder, item, None)).items()
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
    """Nothing half-written stays after the end, but for a part of a tokenizer, hidden in the cache."""
    assert all(_folders(command).values()) and all(name.isdigit() for name in _names(command)), _names(command)
    left = [path for path in command.run_dir.rglob("*") if "tmp" in path.name or path.name.startswith(".config")]
    left += [path for path in command.cache.glob(".tokens-*") if not path.name.endswith(".lock")]
    assert not left, left


def chain(command: Command, kills: Iterable[tuple[str, int]], draw: random.Random, expected: Outcome) -> list[Kill]:
    """Send the command these signals at these places, let it end, and compare."""
    done = []
    for name, number in kills:
        kill = kill_at(command, name, draw, number)
        if kill is None:
            # It was at its end: another run goes on with the places that are left.
            _compare(command, expected)
            shutil.rmtree(command.run_dir)
            kill = kill_at(command, name, draw, number)
        if kill is not None:
            done.append(kill)
    command.start().whole()
    _compare(command, expected)
    return done


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
    parser.add_argument("--signals", nargs="+", default=["SIGKILL"])
    parser.add_argument("--processes", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, draw = options.folder.resolve(), random.Random(options.seed)
    text = write_text(folder / "text.txt")
    os.environ["ESPALIER_CACHE"] = str(folder / "own")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    numbers = [signal.Signals[name] for name in options.signals]
    # Before they are connected, the others can only wait for one that was ended (--distributed.timeout).
    together = [name for name in PLACES if name not in ("start", "end")]
    share = 0 if options.processes == 1 else options.kills if options.processes else options.kills // 10
    groups = (1, [*PLACES], options.kills - share), (options.processes or 2, together, share)
    expected: dict[int, Outcome] = {}
    done: list[tuple[int, Kill]] = []
    for count, places, kills in groups:
        order = [*places * (kills // len(places) + 1)][:kills]
        draw.shuffle(order)
        for at in range(0, kills, 10):
            if count not in expected:
                expected[count] = undisturbed(Command(folder / f"alone-{count}", text, count))
            command = Command(folder / f"{count}-{at}", text, count)
            chosen = [(place, draw.choice(numbers)) for place in order[at : at + 10]]
            done += [(count, kill) for kill in chain(command, chosen, draw, expected[count])]
            print(f"{time.strftime('%X')} {len(done)} kills, all equal", flush=True)
            shutil.rmtree(command.folder)
    for count, places, _ in groups:
        for place in places:
            kills = [kill for group, kill in done if (group, kill.place) == (count, place)]
            if kills:
                there, slowest = sum(kill.hit for kill in kills), max(kill.seconds for kill in kills)
                print(
                    f"{count} processes, {place:12}{len(kills):4}, {there} exactly there, slowest end {slowest:.1f} s"
                )
    print(f"{len(done)} × {'/'.join(options.signals)}: parameters, optimizer state and metrics.jsonl equal in bits")


if __name__ == "__main__":
    main()
