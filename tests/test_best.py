"""The best checkpoint is kept, given to whoever uses the run, and known to a run that goes on; a run ends early."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.errors import UserError
from espalier.training.best import Best, is_low
from espalier.training.config import CheckpointConfig, EarlyStopping
from espalier.training.fallback import given_step
from espalier.training.frozen import restore_complete
from espalier.training.manifest import complete_steps
from espalier.training.restore import restore_params
from espalier.training.run import RunDirectory, summarise
from espalier.training.start import find_origin

SCORES = {1: 0.3, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.2, 6: 0.9, 7: 0.1, 8: 0.1}


def scored(run_dir, first: int = 1, **changes):
    """A run whose evaluation after step n measures SCORES[n]."""
    scores = iter([SCORES[step] for step in SCORES if step >= first])
    settings = dict(steps=8, eval_every=1, keep_best="score", checkpoint=CheckpointConfig(every=100, keep=1))
    config = toy.config(run_dir, **settings | changes)
    return toy.run(config, finalize_eval=lambda metrics: metrics | {"score": next(scores)}, eval_batches=[toy.batch(9)])


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


@pytest.mark.parametrize("pauses", [(), (2,), (3, 4)])
def test_a_run_ends_when_nothing_gets_better_and_gives_its_best(tmp_path, pauses, capsys):
    patient = dict(early_stopping=EarlyStopping(patience=3))
    for pause, start in zip(pauses, (0, *pauses), strict=False):
        assert not scored(tmp_path, start + 1, stop_at=pause, **patient).finished
    result = scored(tmp_path, (0, *pauses)[-1] + 1, **patient)
    assert (result.step, result.finished, result.stopped_by) == (5, True, None)
    # The first of equals.
    assert result.best == {"step": 2, "metric": "score", "value": 0.5, "ended": True}
    assert result.eval["score"] == 0.5
    assert complete_steps(tmp_path / "checkpoints") == [2, 5]
    same(result.state.params, restore_params(tmp_path, step=2))
    said = capsys.readouterr().out
    assert "ended at step 5: 3 evaluations brought nothing better" in said and "score 0.5 at step 2" in said

    # Whoever uses the run gets the best; the run itself goes on from where it was.
    assert given_step(tmp_path) == 2 and complete_steps(tmp_path / "checkpoints")[-1] == 5
    same(restore_complete(tmp_path), restore_params(tmp_path, step=2))
    other = find_origin(toy.config(tmp_path / "x", init_from=str(tmp_path)), RunDirectory(tmp_path / "x"))
    assert other.step == 2
    again = scored(tmp_path, 6, **patient)
    assert again.best == result.best and again.step == 5
    same(again.state.params, result.state.params)
    summary = summarise(RunDirectory(tmp_path), again)
    assert summary["best"]["step"] == 2 and summary["finished"]

    # More patience: it goes on, and finds better.
    longer = scored(tmp_path, 6, early_stopping=EarlyStopping(patience=4))
    assert longer.best == {"step": 6, "metric": "score", "value": 0.9, "ended": False} and longer.step == 8
    same(longer.state.params, restore_params(tmp_path, step=6))
    assert complete_steps(tmp_path / "checkpoints") == [6, 8]
    plain = toy.run(toy.config(tmp_path / "plain", steps=8, stop_at=6), eval_batches=[toy.batch(9)])
    same(longer.state.params, plain.state.params)


def test_without_it_the_last_step_is_given(tmp_path):
    scored(tmp_path, steps=4, stop_at=3)
    assert given_step(tmp_path) == 2
    last = scored(tmp_path, 4, steps=4, keep_best=None)
    assert last.best is None and not (tmp_path / "best.json").exists() and given_step(tmp_path) == 4
    same(last.state.params, restore_params(tmp_path, step=4))
    # A best that is no longer there counts nothing.
    (tmp_path / "best.json").write_text(json.dumps({"step": 77}))
    assert given_step(tmp_path) == 4


def test_a_metric_that_is_not_measured_is_named_and_the_run_goes_on_with_another(tmp_path):
    with pytest.raises(UserError, match="no 'f1'; they have accuracy, loss, score") as error:
        scored(tmp_path, steps=2, keep_best="f1")
    assert "\n" not in str(error.value)
    assert scored(tmp_path, 2, steps=2).best["step"] == 2


def test_low_losses_and_high_scores_are_better_unless_said_otherwise():
    assert is_low("loss") and is_low("bits_per_byte") and is_low("rationale_kl") and not is_low("macro_f1")
    config = toy.config("nowhere", early_stopping=EarlyStopping(patience=2))

    def best(values, config=config):
        found = Best(config)
        for step, value in enumerate(values):
            found.saw(step, {found.metric: value})
        return found.step, found.exhausted

    assert best([3.0, 2.0, math.nan, 2.5]) == (1, True)
    assert best([math.nan, 2.0, 2.1]) == (1, False)
    high = dataclasses.replace(config, early_stopping=EarlyStopping(patience=2, metric="loss", mode="max"))
    assert best([3.0, 2.0, 4.0], high) == (2, False)
    with pytest.raises(UserError, match="two metrics; name one"):
        dataclasses.replace(high, keep_best="accuracy")
    with pytest.raises(UserError, match="patience=0 must be at least 1"):
        EarlyStopping(patience=0)
