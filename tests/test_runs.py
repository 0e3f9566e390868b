"""`runs`: what the files of runs tell, and the table."""

import fcntl
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import threading
import time

import pytest

from espalier import cli
from espalier.commands import runs as command
from espalier.commands.runs import RunsConfig
from espalier.errors import MachineError, UserError
from espalier.runs import run as run_module
from espalier.runs import state as state_module
from espalier.runs.folder import Folder
from espalier.runs.metrics_log import MetricsLog, Series, thinned
from espalier.runs.page import page_of, snapshot
from espalier.runs.run import Run
from espalier.runs.table import table, width
from espalier.training.run import RunDirectory
from espalier.training.tracker import Tracker

CONFIG = {"task": "masked_lm", "steps": 40, "seed": 0, "log_every": 10, "optimizer": {"learning_rate": 0.001}}


def lines(path: pathlib.Path, steps, more: str = "") -> None:
    records = [{"step": step, "loss": 5 - step / 10, "tokens_per_second": 1000.0 + step} for step in steps]
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records) + more)


def made(
    path: pathlib.Path, last: int = 40, *, config: dict | None = None, summary: dict | None = None
) -> pathlib.Path:
    """A run directory as a training leaves it; summary = {}: it did not end."""
    run = RunDirectory(path)
    with run.writing(CONFIG | (config or {})):
        lines(run.metrics, range(10, last + 1, 10))
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": last, "eval/loss": 4.25, "eval/accuracy": 0.5}) + "\n")
    if summary is None or summary:
        run.summary.write_text(json.dumps({"step": last, "finished": last >= 40} | (summary or {})))
    return path


def looked(path: pathlib.Path) -> Run:
    run = Run(path, path.name)
    run.look()
    return run


def aged(path: pathlib.Path, seconds: float) -> None:
    """All files of the run as if they had been written so long ago, in the same order."""
    for file in path.iterdir():
        then = file.stat().st_mtime - seconds
        os.utime(file, (then, then))


def test_only_what_is_new_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines(path, range(1000), '{"step": 1000, "lo')
    log = MetricsLog(path)
    assert log.look() and log.step == 999 and log.last["loss"] == 5 - 99.9
    before = log.bytes_read
    assert before == path.stat().st_size and not log.unreadable, "the end of a line that is being written is no damage"
    with path.open("a") as file:
        file.write('ss": 0.5, "accuracy": NaN, "note": "x"}\n')
    assert log.look() and log.step == 1000 and log.last["loss"] == 0.5 and "accuracy" not in log.last
    assert log.bytes_read - before < 200
    assert list(log.series["loss"].steps) == list(range(1001))
    assert not log.look()


def test_a_log_that_a_resumed_run_cut_is_read_anew(tmp_path):
    run = RunDirectory(tmp_path)
    lines(run.metrics, range(10, 60, 10))
    log = MetricsLog(run.metrics)
    log.look()
    tracker = Tracker(run, total_steps=100, start_step=20, last_step=100, quiet=False)
    tracker.log(30, {"loss": 0.25}, 10)
    tracker.close()
    assert log.look() and list(log.series["loss"].steps) == [10, 20, 30] and log.last["loss"] == 0.25
    # Longer than before, and yet another file.
    run.metrics.write_text("")
    lines(run.metrics, range(1, 90))
    assert log.look() and list(log.series["loss"].steps) == list(range(1, 90))
    run.metrics.unlink()
    assert log.look() and log.series == {} and not log.look()


def test_lines_that_are_no_record_are_counted_and_the_others_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n\x00\x00\x00\n[1]\n{"step": "2"}\n{"step": 3, "loss": 1e999}\n\n')
    log = MetricsLog(path)
    log.look()
    assert log.unreadable == 3 and list(log.series["loss"].values) == [2.0] and log.step == 3


def test_thinning_keeps_the_spike_both_ends_and_the_beginning():
    from array import array

    values = array("d", [1.0] * 10_000)
    values[7_123], values[3] = 50.0, -2.0
    steps, kept = thinned(Series(array("d", range(10_000)), values), 300)
    assert len(steps) <= 310 and steps == sorted(set(steps))
    assert steps[:20] == list(range(20)) and steps[-1] == 9_999
    assert dict(zip(steps, kept, strict=True))[7_123] == 50.0 and -2.0 in kept
    short = Series(array("d", [1, 2]), array("d", [3, 4]))
    assert thinned(short, 300) == ([1, 2], [3, 4])


def test_a_held_lock_says_that_it_runs(tmp_path):
    run = RunDirectory(tmp_path / "a")
    with run.writing(CONFIG, 20):
        assert looked(run.path).state == ("running", "no step yet")
        lines(run.metrics, [30])
        assert looked(run.path).state == ("running", "")
        aged(run.path, 900)
        state = looked(run.path).state
        assert state.name == "running" and state.note == "no line for 15 min"
    # Its process is gone, and wrote no end.
    state = looked(run.path).state
    assert state.name == "failed" and "its process is gone" in state.note


def test_asking_does_not_keep_a_training_from_beginning(tmp_path):
    run = RunDirectory(tmp_path)
    with (tmp_path / ".lock").open("a"), (tmp_path / ".lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with run.writing(CONFIG), pytest.raises(UserError, match="another process is training"), run.writing(CONFIG):
            pass


def test_what_ended_a_training_is_kept_until_it_goes_on(tmp_path):
    run = RunDirectory(tmp_path / "a")
    with pytest.raises(MachineError), run.writing(CONFIG):
        lines(run.metrics, [10])
        raise MachineError("at step 11 the loss is nan")
    assert looked(run.path).state == ("failed", "at step 11 the loss is nan")
    with pytest.raises(KeyError), run.writing(CONFIG):
        raise KeyError("x\ny")
    assert looked(run.path).state.note == "KeyError: 'x\\ny'"
    with run.writing(CONFIG):
        assert not run.failure.exists() and looked(run.path).state.name == "running"


@pytest.mark.parametrize(
    ("last", "summary", "state", "words"),
    [
        (40, None, "finished", ""),
        (20, None, "stopped", "paused; the same command without --stop-at goes on"),
        (20, {"stopped_by": 2}, "stopped", "by Ctrl-C"),
        (20, {"finished": True, "best": {"ended": True}}, "finished", "ended early"),
        (20, {"finished": True}, "stopped", ""),  # its steps were raised later
    ],
)
def test_how_it_ended_is_in_the_summary(tmp_path, last, summary, state, words):
    found = looked(made(tmp_path / "a", last, summary=summary)).state
    assert found.name == state and words in found.note
    # Also in a copy whose files have the order of the copying.
    os.utime(tmp_path / "a" / "summary.json", (1, 1))
    assert looked(tmp_path / "a").state.name == state


def test_on_another_machine_its_last_line_tells(tmp_path, monkeypatch):
    path = made(tmp_path / "a", 20, summary={})
    monkeypatch.setattr(state_module.platform, "node", lambda: "elsewhere")
    host = platform.node()
    assert json.loads((path / ".lock").read_text())["host"] != host
    state = looked(path).state
    assert state.name == "running" and state.note.startswith("by its last line, 0 s ago")
    aged(path, 720)
    state = looked(path).state
    assert state.name == "stopped" and state.note.startswith("no line for 12 min; it ran on ")
    (path / ".lock").write_text("")
    assert "where it ran is not known" in looked(path).state.note
    # Lines that come every ten minutes are waited for.
    os.utime(path / "config.json", (0, time.time() - 2000))
    assert looked(path).state.name == "running"


def test_the_time_left_is_that_of_this_session(tmp_path):
    run = RunDirectory(tmp_path / "a")
    with run.writing(CONFIG | {"steps": 100}, 20):
        lines(run.metrics, [10, 20])
        assert looked(run.path).row(time.time())["left"] is None, "this session has not made a step"
        lines(run.metrics, [30, 40])
        now = time.time()
        os.utime(run.config, (now - 40, now - 40))
        os.utime(run.metrics, (now, now))
        # 20 steps in 40 s.
        assert looked(run.path).row(now)["left"] == pytest.approx(120, abs=0.1)
        assert looked(run.path).row(now + 10)["left"] == pytest.approx(110, abs=0.1)
        assert looked(run.path).row(now + 500)["left"] == pytest.approx(100, abs=0.1), "not beyond the next line"
        # A pretraining says how fast it is without the time that it compiled: 2 × 130 tokens a step, 1,040 a second.
        run.config.write_text(json.dumps(CONFIG | {"steps": 100, "batch_size": 2, "data": {"sequence_length": 130}}))
        assert looked(run.path).row(now)["left"] == pytest.approx(60 * 260 / 1040, abs=0.1)


def test_the_time_left_is_that_of_the_steps_that_were_seen(tmp_path, monkeypatch):
    """Neither the wait for the first step nor another session counts."""
    directory, clock = RunDirectory(tmp_path / "a"), [0.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    with directory.writing(CONFIG | {"steps": 100}):
        run = looked(directory.path)
        for seconds, steps in ((500, [10]), (510, [20]), (520, [30])):
            clock[0] = seconds
            lines(directory.metrics, steps)
            run.look()
        # 10 steps in 10 s, and the file was written just now.
        assert run.row(run.log.changed or 0)["left"] == pytest.approx(70)
    run.look()
    with directory.writing(CONFIG | {"steps": 100}, 30):
        for seconds, steps in ((9000, [40]), (9040, [60])):
            clock[0] = seconds
            lines(directory.metrics, steps)
            run.look()
        assert run.row(run.log.changed or 0)["left"] == pytest.approx(80)


def test_the_metric_is_that_of_the_task_or_the_one_the_run_keeps_its_best_by(tmp_path):
    assert looked(made(tmp_path / "mlm")).row(0)["metric"] == "loss"
    classify = {"task": "sequence_classification"}
    row = looked(made(tmp_path / "c", config=classify, summary={"metrics": {"f1": 0.25, "accuracy": 0.75}})).row(0)
    assert (row["metric"], row["value"]) == ("accuracy", 0.75)
    row = looked(made(tmp_path / "f", config=classify | {"keep_best": "f1"}, summary={"metrics": {"f1": 0.25}})).row(0)
    assert (row["metric"], row["value"]) == ("f1", 0.25)
    row = looked(made(tmp_path / "r", 20, config=classify, summary={})).row(0)
    assert (row["metric"], row["value"]) == ("accuracy", 0.5)


def test_runs_are_found_in_subfolders_and_damaged_ones_are_named(tmp_path):
    for name in ("a", "glue/rte/seed-0", "a/pretrained", "中文/底座"):
        made(tmp_path / name)
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "a" / "tokenizer").mkdir()
    hidden = made(tmp_path / ".trash" / "b")
    assert hidden.is_dir()
    disk = made(tmp_path.with_name(f"{tmp_path.name}-disk") / "linked")
    (tmp_path / "disk").symlink_to(disk.parent)
    (disk.parent / "back").symlink_to(tmp_path)
    folder = Folder(tmp_path)
    folder.look()
    names = {"a", "glue/rte/seed-0", "a/pretrained", "中文/底座", "disk/linked"}
    assert set(folder.runs) == names and not folder.problems
    (tmp_path / "a" / "config.json").write_text('{"task": "mas')
    (tmp_path / "glue/rte/seed-0" / "summary.json").write_text("[]")
    with (tmp_path / "中文/底座/metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    folder.look()
    states = {name: run.state.name for name, run in folder.runs.items()}
    assert states["a"] == "damaged" and states["a/pretrained"] == states["中文/底座"] == "finished"
    assert len(folder.problems) == 3 and len(folder.rows()) == 5
    for words in ("a: config.json is damaged", "seed-0: summary.json is damaged", "中文/底座: 1 line of metrics.jsonl"):
        assert any(words in line for line in folder.problems)
    made(tmp_path / "new")
    os.rename(tmp_path / "a" / "pretrained", tmp_path / "moved")
    folder.look()
    assert {"new", "moved"} < set(folder.runs) and "a/pretrained" not in folder.runs
    with pytest.raises(UserError, match="no folder"):
        Folder(tmp_path / "none")


def test_any_value_in_the_files_is_survived(tmp_path):
    """Files of another program or version, with values of any type in the places that are read."""
    for number, value in enumerate((None, True, "x", [1], {"a": [{}]}, -1e308, 10**400, float("nan"))):
        names = ("task", "steps", "model", "early_stopping", "keep_best", "stop_at", "command", "optimizer", "labels")
        path = tmp_path / str(number)
        path.mkdir()
        (path / "config.json").write_text(json.dumps(dict.fromkeys(names, value)))
        names = ("step", "loss", "eval", "metrics", "tokens_per_second", "best", "finished", "stopped_by", "seconds")
        (path / "summary.json").write_text(json.dumps(dict.fromkeys(names, value)))
        (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": value, "eval/x": value}) + "\n")
        (path / "samples.json").write_text(json.dumps({"texts": value, "samples": value}))
        (path / "failure.json").write_text(json.dumps({"error": value}) if number % 2 else "{")
        (path / ".lock").write_text(json.dumps({"host": value, "step": value}))
    folder = Folder(tmp_path)
    folder.look()
    assert len(table(folder.rows()).splitlines()) == 9
    assert "<script" in page_of(snapshot(folder, tmp_path))


def test_the_table_is_straight_with_chinese_names_and_harmless(tmp_path):
    for name in ("a", "中文掩码模型", "x\x1b[31m\n", "long-" * 20 + "end"):
        made(tmp_path / name)
    folder = Folder(tmp_path)
    folder.look()
    text = table(folder.rows())
    head, *rows = text.splitlines()
    assert len(rows) == 4 and "\x1b" not in text
    place = width(head[: head.index("task")])
    for row in rows:
        assert width(row[: row.index("masked_lm")]) == place
        assert row.endswith("finished") and "held-out loss 4.25" in row and "40/40" in row
    assert re.search("…[-a-z]*-end ", text)


def run_command(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    root = pathlib.Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, "-P", "-m", "espalier", "runs", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_reads_runs_of_the_folder_runs_unless_told(tmp_path):
    made(tmp_path / "runs" / "a")
    made(tmp_path / "other" / "b")
    (tmp_path / "other" / "b" / "summary.json").write_text("{")
    found = run_command(cwd=tmp_path)
    assert found.returncode == 0 and found.stderr == "" and len(found.stdout.splitlines()) == 2
    found = run_command("other", "--json", cwd=tmp_path)
    printed = json.loads(found.stdout)
    assert [row["name"] for row in printed["runs"]] == ["b"] and printed["runs"][0]["loss"] == 1.0
    assert found.stderr.startswith("warning: b: summary.json is damaged") and found.stderr.count("\n") == 1
    found = run_command("--html", cwd=tmp_path)
    assert found.stdout.strip() == str(tmp_path / "runs" / "runs.html")
    found = run_command("none", cwd=tmp_path)
    assert found.returncode == 2 and found.stderr.startswith("error: no folder none")


def test_no_heavy_library_is_loaded(tmp_path):
    made(tmp_path / "a", config={"task": "sequence_classification", "labels": ["a"]})
    script = (
        "import sys; from espalier.commands import runs\n"
        f"runs.command([{str(tmp_path)!r}]); runs.command([{str(tmp_path)!r}, '--html'])\n"
        "print(sorted({'jax', 'numpy', 'flax', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.stdout.splitlines()[-1] == "[]", found.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--html", "--serve"], "give one of them"),
        (["--output", "a.html"], "--output is where --html writes to"),
        (["--serve", "--port", "70000"], "port=70000 must lie between"),
    ],
)
def test_contradictions_are_refused_in_one_line(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        command.command([str(tmp_path), *arguments])
    assert words in capsys.readouterr().err


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match="2"):
        cli.run_config(command.main, RunsConfig, prog="runs", argv=[str(tmp_path), "--serve"])
    assert "runs --serve needs uvicorn, which is not installed" in capsys.readouterr().err
