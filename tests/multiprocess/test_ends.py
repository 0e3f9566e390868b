"""How several processes end: together, within a bounded time, and in one line."""

import json
import signal
import time

import pytest
import toy

from espalier.training.manifest import complete_steps

pytestmark = pytest.mark.timeout(300)


def job(run_dir, **more) -> str:
    return json.dumps({"run_dir": str(run_dir), "mesh": {"data": 4}, "steps": 2000, "pause": 0.05} | more)


def begun(run_dir):
    return lambda: (run_dir / "metrics.jsonl").exists() and len(toy.metrics_of(run_dir)) >= 2


@pytest.mark.parametrize("number, asked", [(1, signal.SIGTERM), (0, signal.SIGINT)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_one_saves_in_all_at_the_same_step(start, tmp_path, number, asked):
    run_dir = tmp_path / "run"
    group = start(2, "worker.py", job(run_dir))
    group.until(begun(run_dir))
    group.processes[number].send_signal(asked)
    group.wait(128 + asked, timeout=90)
    (saved,) = complete_steps(run_dir / "checkpoints")
    assert f"paused at step {saved} of 2000, saved" in group.out(0)
    last = [record["step"] for record in toy.metrics_of(run_dir)][-1]
    assert last == saved


@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_ends_the_other_soon_and_in_one_line(start, tmp_path, killed):
    group = start(2, "worker.py", job(tmp_path / "run"))
    group.until(begun(tmp_path / "run"))
    began = time.monotonic()
    group.processes[killed].kill()
    other = group.processes[1 - killed]
    other.wait(timeout=30)
    assert other.returncode not in (0, None)

    # JAX sees the end of process 0 in the same millisecond; where it is first, it aborts, and the line comes from the
    # process that watches over the log.
    while not group.lines(1 - killed):
        assert time.monotonic() - began < 30, group.told()
        time.sleep(0.05)
    line = group.line(1 - killed)
    assert line.startswith(f"error: process {killed} of 2 died without an error message"), group.told()
    assert killed == 0 or other.returncode == 1
    assert time.monotonic() - began < 30


def test_an_error_of_one_is_told_by_all(start, tmp_path):
    (tmp_path / "file").write_text("")
    group = start(2, "worker.py", each=lambda number: {"arguments": [job(tmp_path / ("run", "file/run")[number])]})
    group.wait([2, 2], timeout=60)
    for number in range(2):
        line = group.line(number)
        assert line.startswith("error: process "), line


def test_a_checkpoint_that_one_cannot_write_ends_all(start, tmp_path):
    group = start(2, "worker.py", job(tmp_path / "run", mesh={"data": 1, "fsdp": 4}, every=3, full=[1]))
    group.wait(1, timeout=90)
    # The standard error of process 1 is a file, of which it cannot write more either.
    line = group.line(0)
    assert line.startswith("error: process 1 of 2: ") and "checkpoint 3 could not be written" in line
    assert complete_steps(tmp_path / "run" / "checkpoints") == []


def test_a_damaged_checkpoint_is_left_by_all_and_told_of_where_none_is_sound(start, run, tmp_path):
    short = job(tmp_path / "run", mesh={"data": 1, "fsdp": 4}, steps=4, stop_at=2, every=1)
    run(2, "worker.py", short)
    folder = tmp_path / "run" / "checkpoints"
    whole = {step: max((folder / step).rglob("d/*"), key=lambda path: path.stat().st_size) for step in ("1", "2")}
    whole = {path: path.read_bytes() for path in whole.values()}
    for path, content in whole.items():
        path.write_bytes(content[:-1])
    group = start(2, "worker.py", short)
    group.wait(2, timeout=60)
    for number in range(2):
        line = group.line(number)
        assert line.startswith("error: process ") and "none of them is sound: 2 (" in line
        assert all(path.name in line for path in whole)
    assert complete_steps(folder) == [1, 2]
    first = next(iter(whole))
    first.write_bytes(whole[first])
    run(2, "worker.py", short)
    assert complete_steps(folder) == [1, 2] and (folder / "2.damaged").is_dir()


def test_processes_with_different_settings_are_refused(start, tmp_path):
    group = start(2, "worker.py", each=lambda number: {"arguments": [job(tmp_path / "run", steps=5 + number, pause=0)]})
    group.wait([2, 2], timeout=60)
    for number in range(2):
        line = group.line(number)
        assert "process 1 has other settings than process 0: steps was 5, now 6" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_directory_that_is_not_shared_is_refused(start, tmp_path):
    group = start(2, "worker.py", job(tmp_path / "run", blind=[1]))
    group.wait([2, 2], timeout=60)
    for number in range(2):
        line = group.line(number)
        assert f"process 1 does not see what process 0 writes to {tmp_path}: " in line and "--run-dir" in line
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".seen*"))


DEBUG = ("mlm.pretrain", "debug", "--distributed.timeout", 3)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--distributed.coordinator", "localhost:1"), "without --distributed.processes and --distributed.process-id"),
        (("--distributed.processes", 2), "without --distributed.coordinator and --distributed.process-id"),
        (
            ("--distributed.coordinator", "localhost:1", "--distributed.processes", 2, "--distributed.process-id", 2),
            "0 to 1",
        ),
        (
            ("--distributed.coordinator", "localhost", "--distributed.processes", 2, "--distributed.process-id", 0),
            "HOST:PORT",
        ),
    ],
)
def test_flags_that_do_not_do_are_refused(call_cli, flags, message):
    (line,) = call_cli(*DEBUG, *flags, code=2).stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_coordinator_that_is_not_there_is_told_of_at_once(run):
    began = time.monotonic()
    flags = ("--distributed.coordinator", "localhost:1", "--distributed.processes", 2, "--distributed.process-id", 1)
    group = run(1, *DEBUG, *flags, codes=2, timeout=60)
    line = group.line(0)
    assert line.startswith("error: ") and "did not answer within 3 s (Connection refused)" in line
    assert time.monotonic() - began < 30


def test_who_does_not_come_or_comes_twice_or_counts_otherwise_is_named(start):
    missing = start(3, *DEBUG[:-1], 10, flags=True)
    missing.processes[1].kill()
    missing.wait([2, -signal.SIGKILL, 2], timeout=60)
    twice = start(3, *DEBUG, each=lambda number: {"environment": {"JAX_PROCESS_ID": str(min(number, 1))}})
    counts = start(2, *DEBUG, each=lambda number: {"environment": {"JAX_NUM_PROCESSES": str(2 + number)}})
    for group, processes, message in (
        (missing, (0, 2), "process 1 of 3 did not connect within 10 s"),
        (twice, (0, 1, 2), "process 1 of 3 was started twice"),
        (counts, (0, 1), "process 0 was started as one of 2 processes and process 1 as one of 3"),
    ):
        group.wait([-signal.SIGKILL if number not in processes else 2 for number in range(len(group.processes))])
        for number in processes:
            line = group.line(number)
            assert line.startswith("error: ") and message in line, group.told()
