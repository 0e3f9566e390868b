"""A trace of the steps that were named, and nothing else changed by it."""

import gzip
import json
import signal

import numpy as np
import pytest
import toy
from test_training_loop import signalled
from toy import quick_compilation  # noqa: F401

from espalier.errors import UserError


def traced(folder) -> set[int]:
    """Numbers of the steps in the trace that was written last."""
    found = max(folder.rglob("*perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(found) as file:
        events = json.load(file)["traceEvents"]
    return {int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {})}


def test_the_steps_that_were_named_are_traced_and_losses_stay(tmp_path, capsys):
    toy.run(toy.config(tmp_path / "run", profile="2:3"))
    assert traced(tmp_path / "run" / "profile") == {2, 3}
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    said = capsys.readouterr().out
    assert "profile of steps 2 to 3: open " in said and "ui.perfetto.dev" in said
    toy.run(toy.config(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "profile").exists()
    ours, plain = ([r["loss"] for r in toy.metrics_of(tmp_path / name) if "loss" in r] for name in ("run", "plain"))
    np.testing.assert_array_equal(ours, plain)


def test_a_signal_ends_the_trace_and_the_same_command_traces_what_is_left(tmp_path, capsys):
    settings = dict(profile="2:3")
    stopped = toy.run(toy.config(tmp_path, **settings), batches_from=signalled(1, signal.SIGTERM))
    assert stopped.step == 2 and traced(tmp_path / "profile") == {2}
    assert "profile of steps 2 to 2: open " in capsys.readouterr().out
    toy.run(toy.config(tmp_path, **settings))
    assert traced(tmp_path / "profile") == {3}
    capsys.readouterr()
    toy.run(toy.config(tmp_path, **settings))
    assert "no profile: steps 2 to 3 are done" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    toy.run(toy.config(tmp_path, stop_at=1))
    (tmp_path / "profile").write_text("a file where the folder would be")
    assert toy.run(toy.config(tmp_path, profile="2:3")).finished
    assert f"no profile is written to {tmp_path / 'profile'}: " in capsys.readouterr().out


@pytest.mark.parametrize("window", ["", "3", "3:2", "0:2", "a:b", "1:2:3"])
def test_what_is_no_window_is_refused(window, tmp_path):
    with pytest.raises(UserError, match="must be two steps, the first and the last, such as 10:15"):
        toy.config(tmp_path, profile=window)


def test_a_window_behind_the_end_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="this run ends at step 4; name steps from 1 to 4"):
        toy.run(toy.config(tmp_path / "run", profile="5:9"))
    assert list(tmp_path.iterdir()) == []
