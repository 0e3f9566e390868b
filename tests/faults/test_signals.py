"""What signals do that are not sent to one process alone: a closed terminal, a second Ctrl-C, a large state."""

import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from command import ROOT, Command, write_text

WIDE = (
    *("--model.hidden-size", 1024, "--model.num-attention-heads", 8, "--model.num-hidden-layers", 7),
    *("--model.intermediate-size", 4096, "--batch-size", 2, "--eval-rows", 2, "--log-every", 1),
    *("--checkpoint.every", 1000, "--eval-every", 1000, "--steps", 1000),
)
"""88 million parameters: with the moments of AdamW 1.06 GB in float32."""


def complete(command: Command) -> list[int]:
    return sorted(int(path.parent.name) for path in command.run_dir.glob("checkpoints/*/manifest.json"))


@pytest.mark.timeout(600)
def test_a_closed_terminal_is_a_signal_and_no_error(tmp_path):
    """What is said then goes nowhere; the run saves and ends with 128 + 1."""
    command = Command(
        tmp_path, write_text(tmp_path / "text.txt"), more=("--steps", 10_000, "--checkpoint.every", 10_000)
    )
    ours, theirs = pty.openpty()
    arguments, environment = command.arguments(), command.environment()
    # Of a session of its own, whose terminal this is: the system sends SIGHUP when it is closed.
    arguments = ["setsid", "--ctty", "--wait", *arguments]
    process = subprocess.Popen(
        arguments, env=environment, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, process_group=0
    )
    os.close(theirs)
    said = b""
    while b"step 2/" not in said:
        said += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(120) == 128 + signal.SIGHUP, said
    (saved,) = complete(command)
    log = command.run_dir / "log.txt"
    # Where libraries said nothing, it is not there.
    assert saved >= 2 and not (log.exists() and "Traceback" in log.read_text())


def test_a_command_that_ended_in_time_is_not_cut_off_later(tmp_path):
    """What was asked of one command in a process does nothing to the next one there."""
    program = """
        import signal, time
        from espalier import signals

        signals.GRACE = 0.2
        for _ in range(2):
            signals.begin()
            try:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0.1)
            except signals.Interrupted:
                time.sleep(0.1)
                signals.end()
        time.sleep(0.5)
        # One that ended before anything had begun.
        signals.begin(early=True)
        signals.end()
        with signals.saving(lambda number: True):
            signal.raise_signal(signal.SIGTERM)
        print("went on")
    """
    ran = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("went on\n", "", 0)


def test_an_interrupt_that_a_callback_swallows_ends_the_command_all_the_same(tmp_path):
    """Else a short run would go on to its end, with exit code 0, and a long one for the seconds of grace."""
    program = """
        import signal
        from espalier import library_log, signals

        class Callback:
            def __del__(self):
                signal.raise_signal(signal.SIGTERM)
                print("not reached")

        signals.begin()
        library_log.begin()
        Callback()
        print("went on")
    """
    ran = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ESPALIER_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("", "interrupted by SIGTERM\n", 128 + signal.SIGTERM)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_gigabyte_is_saved_in_time(tmp_path):
    """Within 25 s, and what the disk takes for as many bytes; a second Ctrl-C does not wait for it."""
    command = Command(tmp_path, write_text(tmp_path / "text.txt"), more=WIDE)
    started = command.start()
    assert started.line(lambda line: line.startswith("step 2/"), 900), started.told()
    began = time.monotonic()
    started.send(signal.SIGTERM)
    assert started.ended(120) == [128 + signal.SIGTERM], started.told()
    seconds = time.monotonic() - began
    (saved,) = complete(command)
    size = sum(path.stat().st_size for path in (command.run_dir / "checkpoints").rglob("*") if path.is_file())
    disk = seconds_of_disk(tmp_path / "raw", size)
    told = f"{size / 1e9:.2f} GB saved and left in {seconds:.1f} s; the disk takes {disk:.1f} s for as many bytes"
    print(told)
    assert re.search(rf"paused at step {saved} of 1000", "".join(started.out[0])) and size > 0.9e9
    assert seconds < 25, told

    started = command.start()
    assert started.line(lambda line: line.startswith(f"step {saved + 1}/"), 900), started.told()
    started.send(signal.SIGINT)
    assert started.sees(lambda: any((command.run_dir / "checkpoints").glob("*orbax-checkpoint-tmp*")))
    began = time.monotonic()
    started.send(signal.SIGINT)
    assert started.ended(60) == [130], started.told()
    print(f"a second Ctrl-C ended it in {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 5 and complete(command) == [saved]


def seconds_of_disk(path, size: int) -> float:
    began = time.monotonic()
    block = os.urandom(2**24)
    with path.open("wb") as file:
        for _ in range(size // len(block) + 1):
            file.write(block)
        os.fsync(file.fileno())
    path.unlink()
    return time.monotonic() - began
