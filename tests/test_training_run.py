"""What a run keeps on disk beside its checkpoints: config.json, metrics.jsonl, the lines on the screen."""

import json
import sys
import types
from typing import Any

import pytest

from espalier.errors import UserError
from espalier.training import tracker as tracker_module
from espalier.training.identity import identity
from espalier.training.run import RunDirectory, summarise
from espalier.training.tracker import Tracker

CONFIG = {
    "steps": 10,
    "seed": 0,
    "optimizer": {"learning_rate": 0.1},
    "run_dir": "a",
    "mesh": {"data": 8},
    "files": ("x", "y"),
}


def put(run, config, defaults=CONFIG):
    """As an entry point and the loop do: check, then write."""
    run.check(config, defaults)
    with run.writing(config):
        pass


def begun(path):
    """A run directory in which something was trained."""
    run = RunDirectory(path)
    put(run, CONFIG)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    return run


def test_a_run_is_created_then_resumed(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "new")
    run.check(CONFIG, CONFIG)
    assert list(tmp_path.iterdir()) == []
    put(run, CONFIG)
    assert json.loads(run.config.read_text()) == CONFIG | {"files": ["x", "y"]}
    put(run, CONFIG)
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "config.json"]


def test_execution_may_change(tmp_path):
    run = begun(tmp_path)
    put(run, CONFIG | {"run_dir": "b", "mesh": {"data": 1}, "accumulation": 4})
    assert json.loads(run.config.read_text())["mesh"] == {"data": 1}


@pytest.mark.parametrize(
    ("changes", "differences", "back"),
    [
        ({"seed": 1}, "seed was 0, now 1", "--seed 0"),
        (
            {"optimizer": {"learning_rate": 0.2}},
            "optimizer.learning_rate was 0.1, now 0.2",
            "--optimizer.learning-rate 0.1",
        ),
        ({"tokenizer": "ab12"}, "tokenizer was unset, now ab12", "no --tokenizer"),
        ({"seed": 2, "steps": 20}, "seed was 0, now 2; steps was 10, now 20", "--seed 0 --steps 10"),
        ({"whole_words": True}, "whole_words was False, now True", "--no-whole-words"),
        ({"masking": {"whole": False}}, "masking.whole was True, now False", "--masking.whole"),
        ({"files": ["z"]}, "files was ['x', 'y'], now ['z']", "--files x y"),
    ],
)
def test_identity_may_not_change_and_each_difference_has_its_way_back(tmp_path, changes, differences, back):
    run = RunDirectory(tmp_path / "run")
    there = CONFIG | {"masking": {"whole": True}, "run_dir": "runs/it's"}
    there = there if "tokenizer" in changes else there | {"whole_words": False}
    put(run, there)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "run-2").mkdir()
    with pytest.raises(UserError, match="holds a run with other settings: ") as error:
        run.check(there | changes, there)
    anew = """--run-dir 'runs/it'"'"'s-3'"""
    assert str(error.value).endswith(f": {differences}; to go on with it, give {back}; to train anew, {anew}")
    assert json.loads(run.config.read_text())["seed"] == 0


def test_a_run_with_steps_can_lend_its_weights(tmp_path):
    """What the advice names is what training.start.check_fork and the entry points accept."""
    run = begun(tmp_path)
    asked = CONFIG | {"task": "masked_lm", "command": "./launch.sh mlm debug", "optimizer": {"learning_rate": 0.2}}
    with pytest.raises(UserError) as error:
        run.check(asked, asked, done=5)
    fork = "add --init-from a --init-optimizer --seed 1 --run-dir a-2"
    assert str(error.value).endswith(f"to start from what it has learnt, {fork}")
    with pytest.raises(UserError, match="add --init-from a --run-dir a-2$"):
        run.check(asked | {"task": "sequence_classification"}, asked | {"task": "sequence_classification"}, done=5)
    with pytest.raises(UserError, match="--run-dir a-2$") as error:
        run.check(asked | {"model": {"hidden_size": 8}}, asked | {"model": {"hidden_size": 4}}, done=5)
    assert "--init-from" not in str(error.value)


def test_text_is_known_by_its_fingerprint_not_by_its_path(tmp_path):
    run = RunDirectory(tmp_path)
    config = CONFIG | {"data": {"files": ["a/x.txt"]}, "fingerprints": {"train": "0123456789abcdef"}}
    put(run, config)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    moved = config | {"data": {"files": [f"/moved/{number}.txt" for number in range(99)]}}
    run.check(moved, CONFIG)
    # Names that make no difference are no part of what differs either.
    with pytest.raises(UserError, match=r"other settings: seed was 0, now 1; to go on with it, give --seed 0; "):
        run.check(moved | {"seed": 1}, CONFIG)
    with pytest.raises(UserError) as error:
        run.check(moved | {"fingerprints": {"train": "ff"}}, CONFIG)
    said = (
        "fingerprints.train was 0123456789ab, now ff; data.files was ['a/x.txt'], now ['/moved/0.txt', '/moved/1.txt'"
    )
    assert said in str(
        error.value
    ) and "'/moved/3.txt' … 99 in all]; to go on with it, give --data.files a/x.txt;" in str(error.value)
    with pytest.raises(UserError, match="give the training text that it began with \\(its files have changed\\); "):
        run.check(config | {"fingerprints": {"train": "ff"}}, CONFIG)


WSD = {"schedule": "wsd", "warmup": 2, "decay_fraction": 0.2, "final_fraction": 0.1}
CONSTANT, LINEAR = WSD | {"schedule": "constant"}, WSD | {"schedule": "linear"}


@pytest.mark.parametrize(
    ("there", "done", "changes"),
    [
        (CONSTANT, 10, {"steps": 12}),
        (CONSTANT, 4, {"steps": 4}),
        (WSD, 8, {"steps": 20}),  # the decay begins after step 8
        (WSD, 5, {"steps": 7}),
        (WSD, 0, {"steps": 3}),
        (WSD | {"warmup": 0.2}, 8, {"steps": 20, "optimizer": WSD}),  # 0.2 of 10 steps is 2
        (WSD, 8, {"steps": 9, "optimizer": WSD | {"decay_fraction": 0.0}}),
        (CONSTANT | {"final_fraction": 0.0}, 9, {"optimizer": WSD | {"decay_fraction": 0.1, "final_fraction": 0.0}}),
        (WSD | {"schedule": "cosine", "warmup": 6}, 6, {"steps": 50}),
        (CONSTANT, 7, {"epochs": 3.0, "steps": 21}),
        (LINEAR, 8, {"epochs": 3.0}),  # another name for the same length
    ],
)
def test_the_schedule_may_change_where_it_was_the_same_so_far(tmp_path, capsys, there, done, changes):
    run, there = RunDirectory(tmp_path), CONFIG | {"optimizer": there, "epochs": None}
    put(run, there)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    run.check(there | changes, there, done)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"up to step {done} the schedule is the same" in said
    assert all(f"{name} was" in said for name in changes if name != "optimizer")


@pytest.mark.parametrize(
    ("there", "done", "changes", "words"),
    [
        (WSD, 10, {"steps": 20}, "schedule of the 10 steps that it has done would have been another"),
        (LINEAR, 4, {"steps": 20}, "add --init-from a --init-optimizer --seed 1 --run-dir a-2 --steps 16"),
        (WSD | {"schedule": "cosine"}, 10, {"steps": 20, "epochs": 4.0}, "--run-dir a-2 --epochs 2"),
        (CONSTANT, 8, {"steps": 7}, "it has done 8 steps: give --steps 8 or more, or another --run-dir"),
        (WSD | {"warmup": 0.3}, 8, {"steps": 20}, "with --optimizer.warmup 3, as many steps as it took"),
        (CONSTANT, 8, {"optimizer": CONSTANT | {"warmup": 4}}, "give --optimizer.warmup 2;"),
    ],
)  # fmt: skip
def test_a_schedule_that_would_have_been_another_is_refused_with_a_way(tmp_path, there, done, changes, words):
    run = RunDirectory(tmp_path)
    there = CONFIG | {"optimizer": there, "epochs": None, "task": "causal_lm", "command": "./launch.sh clm debug"}
    put(run, there)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError) as error:
        run.check(there | changes, there, done)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_a_task_derives_from_the_length_counts_too(tmp_path):
    from mlm.masking import mask_rates

    run = RunDirectory(tmp_path)
    there = CONFIG | {"optimizer": CONSTANT, "masking": {"rate": 0.3, "final_rate": None}}
    put(run, there)
    run.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    run.check(there | {"steps": 20}, there, 5, [mask_rates])
    falling = there | {"masking": {"rate": 0.3, "final_rate": 0.15}}
    put(RunDirectory(tmp_path / "falling"), falling)
    (tmp_path / "falling" / "metrics.jsonl").write_text("{}\n")
    run = RunDirectory(tmp_path / "falling")
    with pytest.raises(UserError, match="schedule of the 5 steps"):
        run.check(falling | {"steps": 20}, falling, 5, [mask_rates])
    run.check(falling | {"steps": 20}, falling, 1, [mask_rates])


def test_a_field_younger_than_the_run_has_its_default_there(tmp_path):
    run = begun(tmp_path)
    config = CONFIG | {"optimizer": {"learning_rate": 0.1, "new": 1}, "newer": 2}
    run.check(config, config)
    with pytest.raises(UserError, match="newer was 2, now 3; optimizer.new was 1, now 4"):
        run.check(config | {"newer": 3, "optimizer": {"learning_rate": 0.1, "new": 4}}, config)


def test_settings_may_be_corrected_until_something_was_trained(tmp_path):
    run = RunDirectory(tmp_path)
    put(run, CONFIG)
    run.checkpoints.mkdir()
    run.metrics.touch()
    put(run, CONFIG | {"seed": 1})
    assert json.loads(run.config.read_text())["seed"] == 1


def test_one_process_at_a_time(tmp_path):
    run = RunDirectory(tmp_path)
    with run.writing(CONFIG):
        with pytest.raises(UserError, match="another process is training in .*; wait for it"):
            put(RunDirectory(tmp_path), CONFIG | {"steps": 11})
        assert json.loads(run.config.read_text())["steps"] == 10
    put(run, CONFIG)


def test_folders_of_other_things_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files and no run"):
        RunDirectory(tmp_path).check(CONFIG, CONFIG)
    with pytest.raises(UserError, match="thesis.txt is a file"):
        RunDirectory(tmp_path / "thesis.txt").check(CONFIG, CONFIG)
    with pytest.raises(UserError, match="gs://bucket/run: a run directory is a local path"):
        RunDirectory("gs://bucket/run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": ')
    with pytest.raises(UserError, match="config.json is damaged"):
        RunDirectory(tmp_path).check(CONFIG, CONFIG)


def test_identity_at_any_depth():
    assert identity({"a": {"cache": 1, "b": {"mesh": 1, "c": 2}}, "debug": True}) == {"a": {"b": {"c": 2}}}


def test_a_session_without_a_step_keeps_the_figures(tmp_path):
    def result(**changes):
        values: dict[str, Any] = dict(step=4, loss=2.0, eval={"loss": 3.0}, tokens=8, tokens_per_second=5.0)
        values |= dict(
            first_step_seconds=1.0, mfu=None, data_wait=None, seconds=2.0, finished=True, stopped_by=None, best=None
        )
        values["skipped_batches"] = 0
        return types.SimpleNamespace(**values | changes)

    run = RunDirectory(tmp_path)
    first = summarise(run, result(), metrics={"accuracy": 1.0})
    again = summarise(
        run, result(loss=None, tokens_per_second=None, first_step_seconds=None), metrics={"accuracy": 1.0}
    )
    assert again == first and json.loads(run.summary.read_text())["tokens_per_second"] == 5.0


class Clock:
    """Stands in for `time`: moves only when told."""

    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracker_module, "time", clock)
    return clock


def tracked(path, **changes):
    options: dict[str, Any] = dict(total_steps=1000, start_step=0, last_step=1000, log_every=10)
    return Tracker(RunDirectory(path), **options | changes)


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_progress_line_and_the_clock(tmp_path, clock, capsys):
    """10 s for the first step, then 2 steps a second; an evaluation of 50 s counts for nothing."""
    tracker = tracked(tmp_path, flops_per_step=1e9, peak_flops=4e9)
    clock.now += 10
    for step in range(1, 121):
        tracker.log(step, {"loss": 4.3211, "learning_rate": 1e-3}, 500)
        if step == 115:
            with tracker.paused():
                clock.now += 50
        clock.now += 0.5
    with tracker.paused():
        clock.now += 50
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step 1/1000  loss 4.321  first step 10.0 s"
    assert out[-1] == "step 120/1000  loss 4.321  1.0k tok/s  7:20 left  MFU 50 %"
    assert len(out) == 13
    assert tracker.first_step_seconds == pytest.approx(10)
    assert tracker.tokens_per_second == pytest.approx(1000)
    assert tracker.mfu == pytest.approx(0.5)
    assert lines(tmp_path)[-1] == {
        "step": 120,
        "loss": pytest.approx(4.3211),
        "learning_rate": 1e-3,
        "tokens_per_second": pytest.approx(1000),
        "mfu": pytest.approx(0.5),
    }
    tracker.close()


def test_metrics_are_cut_where_the_run_goes_on(tmp_path, capsys):
    first = tracked(tmp_path, log_every=1)
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0}, 500)
    first.evaluation(2, {"loss": 0.5})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    second = tracked(tmp_path, start_step=2, last_step=3)
    second.log(3, {"loss": 3.0}, 500)
    second.close()
    assert [(r["step"], r.get("loss", r.get("eval/loss"))) for r in lines(tmp_path)] == [
        (1, 1),
        (2, 1),
        (2, 0.5),
        (3, 3),
    ]
    assert "evaluation at step 2  loss 0.5" in capsys.readouterr().out


def test_a_terminal_line_is_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    tracker = tracked(tmp_path, log_every=1, last_step=3)
    tracker.log(1, {"loss": 3.0}, 500)
    tracker.log(2, {"loss": 2.0}, 500)
    tracker.say("saved step 2")
    tracker.log(3, {"loss": 1.0}, 500)
    tracker.close()
    shown = capsys.readouterr().out
    assert shown.count("\n") == 2 and shown.count("\r\033[K") == 2
    assert "\r\033[Ksaved step 2\n" in shown


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboardX.proto import event_pb2

    tracker = tracked(tmp_path)
    tracker.log(1, {"loss": 3.5}, 500)
    tracker.evaluation(1, {"loss": 2.5})
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), {}
    while content:
        size = int.from_bytes(content[:8], "little")
        for value in event_pb2.Event.FromString(content[12 : 12 + size]).summary.value:  # pyright: ignore
            found[value.tag] = value.simple_value
        content = content[16 + size :]
    assert found == {"loss": 3.5, "eval/loss": 2.5}


def test_other_processes_write_nothing(tmp_path, capsys):
    tracker = tracked(tmp_path / "none", quiet=True, log_every=1)
    tracker.log(1, {"loss": 1.0}, 500)
    tracker.evaluation(1, {"loss": 1.0})
    tracker.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "none").exists()
