"""Interrupted equals uninterrupted, bit by bit; runs start, pause, fork and fail as they should."""

import dataclasses
import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

import espalier.training.loop
from espalier.errors import UserError
from espalier.goodput import read_sessions
from espalier.training.config import CheckpointConfig, OptimizerConfig
from espalier.training.introduction import About
from espalier.training.manifest import complete_steps
from espalier.training.restore import read_config, restore_params
from espalier.training.run import RunDirectory
from espalier.training.start import check_fork, find_origin
from espalier.training.step import count_tokens
from sharding.mesh import MeshConfig

ONE = MeshConfig(1, 1, 1)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def without_timing(records):
    return [{k: v for k, v in record.items() if k not in ("tokens_per_second", "mfu")} for record in records]


def signalled(at, number):
    """The toy's batches; a signal arrives while that of step `at` is fetched."""

    def batches_from(step):
        for batch in toy.batches_from(step):
            if step == at:
                signal.raise_signal(number)
            yield batch
            step += 1

    return batches_from


@pytest.mark.parametrize(
    ("mesh", "name", "accumulation"),
    [(MeshConfig(), "adamw", 1), (MeshConfig(1, 4, 2), "muon", 2)],
)
def test_two_and_two_steps_equal_four(tmp_path, mesh, name, accumulation):
    drawn = []

    def batches_from(step):
        while True:
            drawn.append(step)
            yield toy.batch(step)
            step += 1

    common = dict(mesh=mesh, accumulation=accumulation, optimizer=OptimizerConfig(name=name, warmup=2), eval_every=2)
    more = dict(batches_from=batches_from, objective=toy.objective(noise=0.1))
    whole = toy.run(toy.config(tmp_path / "whole", **common), **more)
    assert drawn == [0, 1, 2, 3]
    half = toy.run(toy.config(tmp_path / "parts", stop_at=2, **common), **more)
    assert (half.step, half.finished) == (2, False)
    parts = toy.run(toy.config(tmp_path / "parts", **common), **more)
    assert drawn == [0, 1, 2, 3] * 2
    assert_equal(parts.state, whole.state)
    assert (parts.step, parts.finished, parts.loss, parts.eval) == (4, True, whole.loss, whole.eval)
    assert parts.tokens == whole.tokens == 4 * toy.ROWS * toy.LENGTH
    assert without_timing(toy.metrics_of(tmp_path / "parts")) == without_timing(toy.metrics_of(tmp_path / "whole"))
    sessions = read_sessions(tmp_path / "parts" / "sessions.jsonl")
    assert [(one.start, one.step, one.end) for one in sessions] == [(0, 2, "ended"), (2, 4, "ended")]
    # What takes less than half a millisecond is written as 0.
    assert all(one.seconds[part] >= 0 for one in sessions for part in ("compile", "training", "save", "data"))
    assert all(one.seconds["start"] > 0 for one in sessions)


CONSTANT = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup=2)
WSD = OptimizerConfig(learning_rate=0.01, schedule="wsd", warmup=2, decay_fraction=0.5)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (dict(steps=4, optimizer=CONSTANT), dict(steps=8, optimizer=CONSTANT)),  # finished
        (dict(steps=8, optimizer=WSD, stop_at=4), dict(steps=12, optimizer=WSD)),  # before its decay
        (dict(steps=4, optimizer=CONSTANT), dict(steps=8, optimizer=WSD)),  # the decay is added
    ],
)  # fmt: skip
def test_a_run_that_is_extended_equals_one_that_was_longer_from_the_start(tmp_path, capsys, first, then):
    noisy = dict(objective=toy.objective(noise=0.1))
    begun = toy.run(toy.config(tmp_path / "parts", **first), **noisy)
    assert begun.step == 4
    parts = toy.run(toy.config(tmp_path / "parts", **then), **noisy)
    said = capsys.readouterr().out
    assert "up to step 4 the schedule is the same" in said and "resumed at step 4" in said
    whole = toy.run(toy.config(tmp_path / "whole", **then), **noisy)
    assert_equal(parts.state, whole.state)
    assert (parts.step, parts.finished, parts.loss, parts.eval) == (then["steps"], True, whole.loss, whole.eval)
    losses, expected = (
        [record for record in without_timing(toy.metrics_of(tmp_path / name)) if "loss" in record]
        for name in ("parts", "whole")
    )
    assert losses == expected and len(losses) == then["steps"]
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["steps"] == then["steps"]
    assert read_config(tmp_path / "parts")["steps"] == then["steps"]


def test_the_way_that_a_refused_extension_names_is_a_way(tmp_path):
    toy.run(toy.config(tmp_path / "run"))
    with pytest.raises(UserError) as error:
        toy.run(toy.config(tmp_path / "run", steps=6))
    assert toy.metrics_of(tmp_path / "run")[-1]["step"] == 4
    flags = str(error.value).rpartition(" add ")[2].split()
    named = dict(zip(flags, flags[1:], strict=False))
    fork = toy.config(
        named["--run-dir"],
        init_from=named["--init-from"],
        init_optimizer="--init-optimizer" in flags,
        seed=int(named["--seed"]),
        steps=int(named["--steps"]),
    )
    result = toy.run(fork)
    assert (result.step, int(result.state.opt_state.count)) == (2, 6)


def losses_seen(monkeypatch) -> dict[int, dict[str, float]]:
    """Step → metrics, as the loop reads them one step after the other."""
    seen, log = {}, espalier.training.loop.Tracker.log

    def spy(self, step, metrics, *rest):
        seen[step] = metrics
        log(self, step, metrics, *rest)

    monkeypatch.setattr(espalier.training.loop.Tracker, "log", spy)
    return seen


def test_what_is_logged_is_the_mean_since_the_last_line_on_the_grid(tmp_path, monkeypatch):
    seen = losses_seen(monkeypatch)
    result = toy.run(toy.config(tmp_path, steps=8, log_every=3, mesh=ONE))
    records = {record["step"]: record for record in toy.metrics_of(tmp_path) if "loss" in record}
    assert len(seen) == 8 and len({metrics["loss"] for metrics in seen.values()}) == 8
    assert list(records) == [1, 3, 6, 8]
    for step, interval in ((1, [1]), (3, [1, 2, 3]), (6, [4, 5, 6]), (8, [7, 8])):
        for name in ("loss", "accuracy", "gradient_norm"):
            assert records[step][name] == np.mean([seen[one][name] for one in interval]), (step, name)
        assert records[step]["learning_rate"] == seen[step]["learning_rate"]
    assert result.loss == seen[8]["loss"]


def test_an_interrupted_log_is_that_of_an_uninterrupted_run(tmp_path, monkeypatch):
    """Pauses cut intervals, also twice, at a first step, and where a checkpoint is older than what was logged."""
    common = dict(steps=10, log_every=4, mesh=ONE)

    def trained(folder):
        return without_timing(record for record in toy.metrics_of(folder) if "loss" in record)

    toy.run(toy.config(tmp_path / "whole", **common))
    whole = trained(tmp_path / "whole")
    assert [record["step"] for record in whole] == [1, 4, 8, 10]
    for stops in ([1, 2, 6], [8]):
        folder = tmp_path / "-".join(map(str, stops))
        for stop in stops:
            toy.run(toy.config(folder, stop_at=stop, **common))
        toy.run(toy.config(folder, **common))
        assert trained(folder) == whole, stops

    def killed(step):
        for number, batch in enumerate(toy.batches_from(step), step):
            if number == 9:
                raise RuntimeError("killed")
            yield batch

    often = dict(common, checkpoint=CheckpointConfig(every=3))
    with pytest.raises(RuntimeError, match="killed"):
        toy.run(toy.config(tmp_path / "killed", **often), batches_from=killed)
    toy.run(toy.config(tmp_path / "killed", **often))
    assert trained(tmp_path / "killed") == whole


def test_the_interval_of_a_log_may_change_at_a_pause(tmp_path, monkeypatch):
    seen = losses_seen(monkeypatch)
    toy.run(toy.config(tmp_path, steps=9, log_every=4, stop_at=6, mesh=ONE))
    toy.run(toy.config(tmp_path, steps=9, log_every=3, mesh=ONE))
    records = {record["step"]: record["loss"] for record in toy.metrics_of(tmp_path) if "loss" in record}
    loss = lambda *steps: np.mean([seen[step]["loss"] for step in steps])  # noqa: E731
    assert records == {1: loss(1), 4: loss(1, 2, 3, 4), 6: loss(5, 6), 9: loss(7, 8, 9)}


def test_a_checkpoint_without_an_interval_begins_one(tmp_path, monkeypatch):
    """As versions before this one wrote them."""
    seen = losses_seen(monkeypatch)
    toy.run(toy.config(tmp_path, steps=6, log_every=4, stop_at=2, mesh=ONE))
    monkeypatch.setattr("espalier.training.start.read_data", lambda run_dir, step: {"step": step})
    toy.run(toy.config(tmp_path, steps=6, log_every=4, mesh=ONE))
    records = {record["step"]: record["loss"] for record in toy.metrics_of(tmp_path) if "loss" in record}
    assert list(records) == [1, 2, 4, 6] and records[4] == np.mean([seen[3]["loss"], seen[4]["loss"]])


def test_a_run_introduces_itself_before_its_first_step(tmp_path, capsys):
    about = About({"model": "a toy"}, {"text": "文本/*.txt"}, row="8 tokens", epochs="2 epochs")
    toy.run(toy.config(tmp_path, steps=4, stop_at=2, accumulation=2, mesh=MeshConfig(1, 4, 2)), about=about)
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^  (\S+(?: \S+)*)  +(.+)$", out.partition("step 1/4")[0], re.M))
    assert rows.pop("run") == str(tmp_path)
    assert rows == {
        "start": "from scratch",
        "model": "a toy",
        "devices": "8 × cpu, mesh fsdp=4 × tensor=2",
        "text": "文本/*.txt",
        "batch": "16 rows of 8 tokens, in 2 micro-batches",
        "steps": "4 = 512 tokens, 2 epochs; 2 to come, pausing at 2",
    }
    toy.run(toy.config(tmp_path), about=about)
    out = capsys.readouterr().out
    assert "resumed at step 2\n" in out and "4 = 512 tokens, 2 epochs; 2 to come\n" in out


def test_a_run_goes_on_on_another_mesh(tmp_path):
    toy.run(toy.config(tmp_path, stop_at=2, mesh=MeshConfig(1, 4, 2)))
    moved = toy.run(toy.config(tmp_path, mesh=MeshConfig(2, 1, 1), accumulation=2))
    whole = toy.run(toy.config(tmp_path / "whole"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), moved.state.params, whole.state.params)
    assert moved.loss == pytest.approx(whole.loss, rel=1e-4)


def test_the_start_is_resume_then_init_from_then_scratch(tmp_path, capsys):
    base = toy.run(toy.config(tmp_path / "base"))
    assert "start from scratch" in " ".join(capsys.readouterr().out.split())
    forked = toy.config(tmp_path / "fork", init_from=str(tmp_path / "base"), stop_at=1, seed=5)
    still = OptimizerConfig(learning_rate=0.0)

    weights = toy.run(dataclasses.replace(forked, optimizer=still))
    assert f"start from the weights of {tmp_path}/base at step 4" in " ".join(capsys.readouterr().out.split())
    assert_equal(weights.state.params, base.state.params)
    assert weights.step == 1 and weights.state.opt_state.count == 1

    resumed = toy.run(dataclasses.replace(forked, optimizer=still, stop_at=2))
    assert "resumed at step 1\n" in capsys.readouterr().out
    assert resumed.step == 2

    both = dataclasses.replace(forked, run_dir=str(tmp_path / "both"), init_optimizer=True)
    state = toy.run(both).state
    assert state.opt_state.count == base.state.opt_state.count + 1
    assert state.step == 1


def test_a_fork_does_not_go_through_the_same_batches_again(tmp_path):
    def fork(seed, train):
        config = toy.config(tmp_path / "fork", init_from=str(tmp_path / "base"), init_optimizer=True, seed=seed)
        check_fork(config, find_origin(config, RunDirectory(tmp_path / "fork")), {"train": train})

    toy.run(toy.config(tmp_path / "base", seed=3, stop_at=1))
    text = str(tmp_path / "base")  # the toy's fingerprint
    with pytest.raises(UserError, match="the first batches would be those it began with; try --seed 4"):
        fork(3, text)
    fork(4, text)
    fork(3, "another text")


def test_an_evaluation_that_a_signal_prevented_is_made_up_for(tmp_path):
    stopped = toy.run(toy.config(tmp_path, eval_every=2), batches_from=signalled(1, signal.SIGTERM))
    assert (stopped.step, stopped.eval, stopped.stopped_by) == (2, {}, signal.SIGTERM)
    toy.run(toy.config(tmp_path, eval_every=2))
    whole = toy.run(toy.config(tmp_path / "whole", eval_every=2))
    assert whole.stopped_by is None
    evaluations = [
        [(r["step"], r["eval/loss"]) for r in toy.metrics_of(folder) if "eval/loss" in r]
        for folder in (tmp_path, tmp_path / "whole")
    ]
    assert evaluations[0] == evaluations[1] and [step for step, _ in evaluations[0]] == [2, 4]


def test_what_is_refused_leaves_nothing(tmp_path):
    """A warm-up longer than the run; a vocabulary that eight devices cannot share."""

    def narrow(key):
        return toy.init_params(key) | {"head": {"causal_lm": {"kernel": jnp.zeros((12, toy.WIDTH))}}}

    with pytest.raises(UserError, match="longer than the run"):
        toy.run(toy.config(tmp_path / "run", optimizer=OptimizerConfig(warmup=9)))
    with pytest.raises(UserError, match="head/causal_lm/kernel"):
        toy.run(toy.config(tmp_path / "run", mesh=MeshConfig(1, 1, 8)), init_params=narrow)
    assert list(tmp_path.iterdir()) == []


def test_the_schedule_of_a_fork_begins_anew(tmp_path):
    toy.run(toy.config(tmp_path / "base"))
    optimizer = OptimizerConfig(learning_rate=0.1, warmup=4)
    fork = toy.config(tmp_path / "fork", init_from=str(tmp_path / "base"), init_optimizer=True, optimizer=optimizer)
    toy.run(fork)
    rates = [record["learning_rate"] for record in toy.metrics_of(tmp_path / "fork") if "loss" in record]
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.075, 0.1], rtol=1e-6)


def test_given_weights_are_laid_out_as_asked(tmp_path):
    def load_params(abstract):
        draw = lambda a: jax.device_put(np.full(a.shape, 0.5, a.dtype), a.sharding)  # noqa: E731
        return jax.tree.map(draw, abstract)

    result = toy.run(
        toy.config(tmp_path, stop_at=1, optimizer=OptimizerConfig(learning_rate=0.0)), load_params=load_params
    )
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(jax.device_get(result.state.params)))


def test_evaluations_and_saves_come_when_they_should(tmp_path):
    config = toy.config(tmp_path, steps=7, eval_every=3, checkpoint=CheckpointConfig(every=2, keep=9), log_every=4)
    result = toy.run(config, finalize_eval=lambda m: m | {"perplexity": float(np.exp(m["loss"]))})
    records = toy.metrics_of(tmp_path)
    assert [r["step"] for r in records if "eval/loss" in r] == [3, 6, 7]
    assert [r["step"] for r in records if "loss" in r] == [1, 4, 7]
    assert complete_steps(tmp_path / "checkpoints") == [2, 4, 6, 7]
    assert result.eval["perplexity"] == pytest.approx(np.exp(result.eval["loss"]))
    assert records[-1]["eval/perplexity"] == result.eval["perplexity"]
    assert {"learning_rate", "gradient_norm", "tokens_per_second"} <= records[-2].keys()


def test_the_host_reads_the_step_before_the_one_it_started(tmp_path, monkeypatch):
    """Step n+1 is handed to the device before anybody waits for step n."""
    order = []

    def batches_from(step):
        for batch in toy.batches_from(step):
            order.append(f"feed {step + 1}")
            yield batch
            step += 1

    log = espalier.training.loop.Tracker.log

    def spy(self, step, *rest):
        order.append(f"read {step}")
        log(self, step, *rest)

    monkeypatch.setattr(espalier.training.loop.Tracker, "log", spy)
    toy.run(toy.config(tmp_path, steps=3), batches_from=batches_from)
    assert order == ["feed 1", "feed 2", "read 1", "feed 3", "read 2", "read 3"]


def test_the_state_is_donated(tmp_path, monkeypatch):
    first = []
    start = espalier.training.loop.first_state

    def spy(*arguments):
        state = start(*arguments)
        first.append(state)
        return state

    monkeypatch.setattr(espalier.training.loop, "first_state", spy)
    toy.run(toy.config(tmp_path, stop_at=1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first[0].params, first[0].opt_state)))


def test_a_finished_run_has_nothing_left_to_do(tmp_path, capsys):
    done = toy.run(toy.config(tmp_path))
    lines = toy.metrics_of(tmp_path)
    again = toy.run(toy.config(tmp_path))
    assert "nothing left to train: step 4 of 4 is done" in capsys.readouterr().out
    assert (again.step, again.finished, again.loss, again.eval) == (4, True, None, done.eval)
    assert toy.metrics_of(tmp_path) == lines


def test_a_signal_saves_and_leaves(tmp_path, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped = toy.run(toy.config(tmp_path, steps=50), batches_from=signalled(2, signal.SIGTERM))
    assert (stopped.step, stopped.finished, stopped.eval) == (3, False, {})
    out, err = capfd.readouterr()
    assert "SIGTERM: saving; press Ctrl-C again" in err
    assert "paused at step 3 of 50, saved; the same command goes on from here" in out
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert toy.run(toy.config(tmp_path, steps=50, stop_at=4)).step == 4


def test_a_second_interrupt_leaves_at_once(tmp_path):
    def batches_from(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield from toy.batches_from(step)

    with pytest.raises(KeyboardInterrupt):
        toy.run(toy.config(tmp_path), batches_from=batches_from)


def test_pausing_says_how_to_go_on(tmp_path, capsys):
    toy.run(toy.config(tmp_path, stop_at=2))
    assert (
        "paused at step 2 of 4, saved; the same command without --stop-at goes on from here" in capsys.readouterr().out
    )


def test_weights_of_another_shape_are_refused(tmp_path):
    toy.run(toy.config(tmp_path / "base", stop_at=1))

    def wider(key):
        params = toy.init_params(key)
        return params | {"head": {"causal_lm": {"kernel": jnp.zeros((64, 16))}}}

    with pytest.raises(UserError, match=r"kernel is float32 \(32, 16\), wanted float32 \(64, 16\)"):
        toy.run(toy.config(tmp_path / "fork", init_from=str(tmp_path / "base")), init_params=wider)


def test_speeds_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(espalier.training.loop, "peak_flops", lambda device: 1e9)
    result = toy.run(toy.config(tmp_path, steps=3, mesh=MeshConfig(4, 1, 1)), flops_per_step=1e6)
    assert result.first_step_seconds and result.tokens_per_second
    per_token = 1e6 / (toy.ROWS * toy.LENGTH)
    assert result.mfu == pytest.approx(result.tokens_per_second * per_token / 4e9)
    assert "MFU" in capsys.readouterr().out


def test_tokens_are_those_of_the_batches_that_were_trained_on(tmp_path, monkeypatch):
    """Padding is not counted; what came before a pause is, in older checkpoints as it was expected."""

    def padded(step):
        while True:
            weights = toy.batch(step)["loss_weights"]
            yield toy.batch(step) | {"segment_ids": weights.astype(np.int32)}
            step += 1

    real = [int(toy.batch(step)["loss_weights"].sum()) for step in range(4)]
    assert len(set(real)) > 2
    half = toy.run(toy.config(tmp_path / "new", stop_at=2), batches_from=padded)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    assert half.tokens == sum(real[:2])
    assert toy.run(toy.config(tmp_path / "new"), batches_from=padded).tokens == sum(real)
    assert toy.run(toy.config(tmp_path / "new"), batches_from=padded).tokens == sum(real)
    monkeypatch.setattr("espalier.training.start.read_data", lambda run_dir, step: {"step": step})
    shutil.rmtree(tmp_path / "new")
    (tmp_path / "old").rename(tmp_path / "new")
    older = toy.run(toy.config(tmp_path / "new"), batches_from=padded, tokens_per_step=100)
    assert older.tokens == 200 + sum(real[2:])
    pair = {"query": {"input_ids": np.zeros((2, 3))}, "document": {"input_ids": np.ones((2, 5)), "mask": np.ones(9)}}
    assert count_tokens(pair) == 16


def test_restored_params_are_those_of_the_run(tmp_path):
    result = toy.run(toy.config(tmp_path, stop_at=2))
    assert_equal(restore_params(tmp_path), result.state.params)
