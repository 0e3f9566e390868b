"""Bad steps change nothing, are counted, and lead back to the last checkpoint where they do not end."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from labelled_words import config_for, make_runs, sentences, write_jsonl
from toy import quick_compilation  # noqa: F401

from espalier.data.tokenizer import load_tokenizer
from espalier.training import bad_steps, checkpoint
from espalier.training.bad_steps import NonFiniteLoss, Window, batch_number
from espalier.training.checkpoint import save_params
from espalier.training.config import BadSteps, CheckpointConfig
from espalier.training.manifest import complete_steps
from espalier.training.replay import replay
from espalier.training.restore import read_config, read_data, restore_params
from espalier.training.run import RunDirectory
from espalier.training.start import RunOrigin
from espalier.training.step import Objective
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh

ONE = MeshConfig(1, 1, 1)
POISON = toy.VOCAB - 1
"""A token that makes the loss of its batch what its weight says."""


def loss_of(params, batch, *rest):
    loss, sums = toy.objective().loss(params, batch, *rest)
    return loss + jnp.sum(batch["poison"]) * loss, sums


POISONED = Objective(toy.objective().prepare, loss_of)
BAD = BadSteps(in_a_row=2)


def poisoned(numbers, value=np.nan):
    """The toy's batches; those of these numbers have a poison. The numbers of all that are drawn are in `drawn`."""

    def batches_from(number):
        while True:
            batches_from.drawn.append(number)
            yield batch_of(number)
            number += 1

    def batch_of(number):
        poison = np.zeros(toy.ROWS, np.float32)
        poison[0] = value if number in numbers else 0
        return toy.batch(number) | {"poison": poison}

    batches_from.drawn, batches_from.batch_of = [], batch_of
    return batches_from


EVAL_BATCHES = [batch | {"poison": np.zeros(toy.ROWS, np.float32)} for batch in toy.EVAL_BATCHES]


def run(folder, numbers=(), value=np.nan, batches_from=None, **changes):
    settings = {"steps": 8, "checkpoint": CheckpointConfig(every=3, keep=9), "bad_steps": BAD, "mesh": ONE} | changes
    named = {"objective": POISONED, "batches_from": batches_from or poisoned(numbers, value)}
    documents = lambda number: [f"text:{number}"]  # noqa: E731
    return toy.run(toy.config(folder, **settings), **named, documents=documents, eval_batches=EVAL_BATCHES)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_a_bad_step_leaves_parameters_and_optimizer_as_they_were(tmp_path, value, capsys):
    """A loss that is NaN or infinite, and a finite one with a gradient that is not."""
    before = run(tmp_path / "before", stop_at=4).state
    after = run(tmp_path / "after", [4], value, stop_at=5)
    assert_equal((after.state.params, after.state.opt_state), (before.params, before.opt_state))
    assert (int(after.state.step), after.skipped_batches, after.finished) == (5, 1, False)
    assert after.loss is not None and np.isfinite(after.loss)
    assert "step 5 is skipped: its loss is" in capsys.readouterr().out
    assert [(record["step"], record["batch"], record["documents"]) for record in skipped(tmp_path / "after")] == [
        (5, 4, ["text:4"])
    ]


@pytest.mark.parametrize("mesh", [ONE, MeshConfig(1, 4, 2)])
def test_a_skipped_step_is_not_in_the_means_of_the_log(tmp_path, mesh):
    run(tmp_path / "one", [1], log_every=4, mesh=mesh)
    run(tmp_path / "every", [1], log_every=1, mesh=mesh)
    every = {record["step"]: record for record in toy.metrics_of(tmp_path / "every")}
    assert "loss" not in every[2] and every[2]["skipped"] == 1
    record = next(record for record in toy.metrics_of(tmp_path / "one") if record["step"] == 4)
    assert record["skipped"] == 1
    assert record["loss"] == pytest.approx(np.mean([every[step]["loss"] for step in (1, 3, 4)]), rel=1e-12)
    assert "skipped" not in toy.metrics_of(tmp_path / "one")[-1]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_that_pauses_around_skipped_batches_logs_the_same(tmp_path, stop):
    def logged(folder):
        timing = ("tokens_per_second", "mfu")
        steps = [record for record in toy.metrics_of(folder) if "eval/loss" not in record]
        return [{k: v for k, v in record.items() if k not in timing} for record in steps]

    whole = run(tmp_path / "whole", [1, 3], log_every=4)
    run(tmp_path / "parts", [1, 3], log_every=4, stop_at=stop)
    parts = run(tmp_path / "parts", [1, 3], log_every=4)
    assert_equal(parts.state, whole.state)
    assert (
        (parts.skipped_batches, parts.tokens) == (whole.skipped_batches, whole.tokens) == (2, 6 * toy.ROWS * toy.LENGTH)
    )
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert skipped(tmp_path / "parts") == skipped(tmp_path / "whole")


def test_mean_and_deviation_are_those_of_the_last_steps():
    norms = np.random.default_rng(3).lognormal(size=260).astype(np.float32)
    health, finite = bad_steps.new_health(), jnp.float32(1.0)
    step = jax.jit(lambda health, norm: bad_steps.judged(health, finite, norm, 0.0)[1])
    for number, norm in enumerate(norms):
        health = step(health, norm)
        if number < bad_steps.WINDOW:
            seen = norms[: number + 1].astype(np.float64)
            np.testing.assert_allclose(health["norm_mean"], seen.mean(), rtol=1e-5)
            np.testing.assert_allclose(health["norm_variance"], seen.var(), rtol=1e-4, atol=1e-6)
    # From then on each earlier step weighs 1 % less.
    weights = np.full(260, 0.01) * 0.99 ** np.arange(260)[::-1]
    weights[:100] = 0.99**160 / 100
    mean = np.sum(weights * norms) / weights.sum()
    np.testing.assert_allclose(weights.sum(), 1)
    np.testing.assert_allclose(health["norm_mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(health["norm_variance"], np.sum(weights * (norms - mean) ** 2), rtol=1e-4)


def test_a_norm_beyond_the_deviations_is_bad_once_they_are_known():
    health = bad_steps.new_health() | {"norm_mean": jnp.float32(2.0), "norm_variance": jnp.float32(0.25)}
    for good_before, norm, deviations, expected in (
        (100, 4.9, 6.0, True),
        (100, 5.1, 6.0, False),
        (99, 5.1, 6.0, True),
        (100, 1e30, 0.0, True),
    ):
        now = health | {"good": jnp.int32(good_before)}
        good, after = bad_steps.judged(now, jnp.float32(1.0), jnp.float32(norm), deviations)
        assert bool(good) is expected
        assert int(after["bad_in_a_row"]) == (not expected)
        if not expected:
            assert_equal(after, now | {"bad_in_a_row": 1})


def test_a_spike_is_skipped_where_deviations_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_steps, "WINDOW", 4)
    kept = run(tmp_path / "kept", [6], 1e4, bad_steps=BadSteps(), steps=9)
    guarded = run(tmp_path / "guarded", [6], 1e4, bad_steps=BadSteps(deviations=20.0), steps=9)
    assert (kept.skipped_batches, guarded.skipped_batches) == (0, 1)


def test_many_in_a_row_lead_back_past_the_batches_since_the_checkpoint(tmp_path, capsys):
    """Batches 4 and 5 are bad, the last checkpoint is of step 3: batches 3, 4 and 5 are passed over."""
    source = poisoned([4, 5])
    done = run(tmp_path / "run", batches_from=source)
    out = capsys.readouterr().out
    assert "2 bad steps in a row: back to step 3, past the 3 batches since then" in out

    clean = poisoned([])

    def without(number):
        return (clean.batch_of(n) for n in (0, 1, 2, 6, 7, 8, 9, 10, 11, 12) if n >= number)

    assert_equal(done.state, run(tmp_path / "clean", batches_from=without).state)
    assert done.finished and complete_steps(tmp_path / "run" / "checkpoints") == [3, 6, 8]
    assert [record["step"] for record in toy.metrics_of(tmp_path / "run") if "loss" in record] == list(range(1, 9))
    assert [record["batch"] for record in skipped(tmp_path / "run") if record["why"].startswith("passed")] == [3, 4, 5]
    assert (done.tokens, done.skipped_batches) == (8 * toy.ROWS * toy.LENGTH, 3)
    # batch(step) is a function of what the checkpoint holds.
    windows = [Window(*window) for window in read_data(tmp_path / "run", 8)["skipped"]["windows"]]
    assert windows == [Window(3, 3)]
    assert [batch_number(step, windows) for step in range(8)] == [0, 1, 2, 6, 7, 8, 9, 10]


def test_a_replay_passes_over_the_same_batches(tmp_path):
    """From before the checkpoint to which the run went back, over a bad step of its own."""
    changes = {"checkpoint": CheckpointConfig(every=2, keep=9), "checksum_every": 1, "steps": 9}
    run(tmp_path, [4, 5, 9], **changes)
    config = toy.config(tmp_path, mesh=ONE, bad_steps=BAD, **changes)
    task = toy.trainable(config, objective=POISONED, batches_from=poisoned([4, 5, 9]), eval_batches=EVAL_BATCHES)
    origin = RunOrigin(tmp_path, 2, read_config(tmp_path, 2), resumed=True)
    found = replay(config, task, RunDirectory(tmp_path), build_mesh(ONE), origin, 9, read_config(tmp_path))
    assert found.difference is None and (found.checksums, found.losses) == (9, 6)


@pytest.mark.parametrize("dies", [7, 9])
def test_a_run_that_is_killed_after_it_went_back_ends_alike(tmp_path, dies):
    """Before the next checkpoint (it goes back once more) and after it (it does not)."""
    numbers = [4, 5, 9]
    whole = run(tmp_path / "whole", numbers, steps=10)

    def dying(number):
        for batch in poisoned(numbers)(number):
            if number == dies:
                raise KeyboardInterrupt
            yield batch
            number += 1

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", batches_from=dying, steps=10)
    again = run(tmp_path / "killed", numbers, steps=10)
    assert_equal(again.state, whole.state)
    assert (again.skipped_batches, again.tokens) == (whole.skipped_batches, whole.tokens)
    assert read_data(tmp_path / "killed", 10)["skipped"] == read_data(tmp_path / "whole", 10)["skipped"]


def test_without_a_checkpoint_it_begins_anew_past_them(tmp_path):
    source = poisoned([1, 2])
    done = run(tmp_path, batches_from=source)
    assert done.finished and read_data(tmp_path, 8)["skipped"] == {"steps": 0, "windows": [[0, 3]]}
    assert source.drawn[-8:] == list(range(3, 11))


def test_the_third_time_at_one_checkpoint_ends_the_run(tmp_path):
    with pytest.raises(NonFiniteLoss, match="for the third time since step 3.* try a lower") as error:
        run(tmp_path, range(3, 100), steps=60)
    assert "\n" not in str(error.value)
    assert complete_steps(tmp_path / "checkpoints") == [3]
    assert {record["batch"] for record in skipped(tmp_path)} == {3, 4, 5, 6, 7, 8}


def test_twice_at_one_checkpoint_and_later_again(tmp_path):
    """Two windows that begin at step 3, and one at step 6: each checkpoint has its own count."""
    done = run(tmp_path, [4, 5, 6, 7, 13, 14], steps=12)
    assert done.finished
    assert read_data(tmp_path, 12)["skipped"]["windows"] == [[3, 3], [3, 2], [6, 4]]


def test_no_checkpoint_is_written_while_steps_are_bad(tmp_path):
    """Step 3, at which a save and an evaluation are due, is bad: both wait for step 4."""
    run(tmp_path, [2], eval_every=3)
    assert complete_steps(tmp_path / "checkpoints") == [4, 6, 8]
    assert [record["step"] for record in toy.metrics_of(tmp_path) if "eval/loss" in record] == [4, 6, 8]


def test_a_run_that_ends_in_bad_steps_goes_back(tmp_path):
    done = run(tmp_path, [6, 7])
    assert done.finished and read_data(tmp_path, 8)["skipped"]["windows"] == [[6, 2]]


def test_checkpoints_of_earlier_versions_know_no_health(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    rest = checkpoint.rest_of
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "rest_of", lambda state: {k: v for k, v in rest(state).items() if k != "health"})
        run(tmp_path / "old", stop_at=3)
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    again = run(tmp_path / "old")
    assert_equal((again.state.params, again.state.opt_state), (whole.state.params, whole.state.opt_state))
    assert int(again.state.health["good"]) == 5


def test_a_word_that_makes_the_loss_nan(tmp_path, capsys):
    """Its embedding is not finite: whole commands, down to the names of the examples that hold it."""
    there = make_runs(tmp_path)
    word = load_tokenizer(there.encoder / "tokenizer").convert_tokens_to_ids("plane")
    params, config = restore_params(there.encoder), read_config(there.encoder)
    params["embeddings"]["token"]["embedding"][word] = np.inf
    shutil.rmtree(there.encoder / "checkpoints")
    save_params(there.encoder / "checkpoints", params, config)
    rows = [json.loads(line) for line in pathlib.Path(there.train).read_text().splitlines()]
    poison = [number for number, row in enumerate(rows) if "plane" in row["sentence"]]
    assert 0 < len(poison) < 12
    validation = [row for row in sentences(20) if "plane" not in row["sentence"]]
    write_jsonl(pathlib.Path(there.validation), validation)

    changes = {"batch_size": 4, "steps": 12, "epochs": None, "mesh": ONE}
    once = main(config_for(there, tmp_path / "once", **changes))
    found = skipped(tmp_path / "once")
    names = {f"train:{number}" for number in poison}
    assert 0 < once["skipped_batches"] == len(found)
    assert all(names & {*record["documents"]} for record in found)
    assert names <= {name for record in found for name in record["documents"]}
    assert np.isfinite(once["eval"]["loss"])
    assert "skipped batches" in (tmp_path / "once" / "report.html").read_text()

    capsys.readouterr()
    once_more = {"bad_steps": BadSteps(in_a_row=1), "checkpoint": CheckpointConfig(every=1)}
    back = main(config_for(there, tmp_path / "back", **once_more, **changes))
    assert "1 bad step in a row: back to step" in capsys.readouterr().out
    assert back["step"] == 12 and back["skipped_batches"] > 0
    with pytest.raises(NonFiniteLoss, match="for the first time"):
        main(config_for(there, tmp_path / "ends", bad_steps=BadSteps(in_a_row=1, rollbacks=1), **changes))
