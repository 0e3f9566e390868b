"""How completions are drawn for reinforcement: ends at stops, in slots, and one step behind what learns from them."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_reinforce import config, every_completion, gradient, logprobs, params, started  # noqa: F401
from tiny_models import close
from toy import metrics_of, quick_compilation  # noqa: F401

import espalier
from espalier.errors import UserError
from espalier.predict.generate import decoded
from espalier.predict.stops import before_stop
from espalier.training.config import CheckpointConfig
from finetune.tasks.reinforce import rollouts
from finetune.tasks.reinforce.objective import completion_logprobs
from finetune.tasks.reinforce.record import PolicyGradient
from finetune.tasks.reinforce.rewards import Rewards
from finetune.train import main

FEW = dict(samples=3, max_new_tokens=6, temperature=0.7)


def arrays_of(run, number):
    with np.load(run / "collected" / f"{number}.npz") as file:
        return dict(file)


@pytest.fixture
def rewarded(monkeypatch):
    """The texts that rewards were asked for, with the thread that asked."""
    seen, original = [], Rewards.__call__

    def call(self, groups):
        seen.append((threading.current_thread().name, [text for group in groups for text in group.completions]))
        return original(self, groups)

    monkeypatch.setattr(Rewards, "__call__", call)
    return seen


def test_completions_end_at_a_stop_which_is_learnt_and_not_rewarded(started, tmp_path, rewarded):  # noqa: F811
    """The ids that are trained are those that were drawn, the token that completes the stop among them; in slots that
    are filled again they are the same, and what did not end is worth nothing."""
    stops = ("1", "e", "a", "5", "+ ")
    found = {}
    for name, slots in (("all", 0), ("slots", 4)):
        rewarded.clear()
        policy = PolicyGradient(**FEW, stop=stops, slots=slots)
        main(config(started, tmp_path / name, policy, steps=1, data=dict(reward=("length:1",))))
        found[name] = arrays_of(tmp_path / name, 0), next(texts for _, texts in rewarded if len(texts) == 24)
    (kept, texts), (again, same) = found["all"], found["slots"]
    np.testing.assert_array_equal(kept["completions"], again["completions"])
    np.testing.assert_allclose(kept["drawn_logprobs"], again["drawn_logprobs"], atol=1e-5)
    assert texts == same
    model = espalier.load(started / "clm")
    ends = 0
    for row, text in enumerate(texts):
        count = int(kept["lengths"][row])
        prompt, ids = kept["input_ids"][row, :-6].tolist(), kept["completions"][row, :count].tolist()
        whole = decoded(model, prompt, [token for token in ids if token != model.tokenizer.eos_token_id])
        assert not any(stop in text for stop in stops) and text == before_stop(whole, stops)
        stopped = any(stop in whole for stop in stops)
        ended = stopped or model.tokenizer.eos_token_id in ids
        assert kept["cut"][row] == (not ended) and (ended or count == 6)
        assert not stopped or not any(stop in decoded(model, prompt, ids[:-1]) for stop in stops)
        assert kept["weights"][row].sum() == count and (kept["drawn_logprobs"][row, :count] < 0).all()
        ends += stopped and count < 6
        assert kept["cut"][row] == 0 or kept["rewards"][row] == 0
    assert 3 < ends < 24


def test_one_step_behind_the_ratio_is_of_what_learns_and_what_drew():
    """exp(new - sampler) by hand, clipped; in an evaluation and on what was drawn at once it is 1."""
    plus = np.random.default_rng(2).normal(size=125).astype(np.float32)
    policy = PolicyGradient(asynchronous=True, clip=0.05, clip_high=0.1, mismatch=100.0)
    drawn = np.asarray(logprobs(params()))
    (_, metrics), found = gradient(every_completion(advantages=plus), policy, params(1))
    ratio = np.exp(np.asarray(logprobs(params(1))) - drawn)
    assert metrics["clipped"][0] == ((ratio < 0.95) | (ratio > 1.1)).sum() > 0
    assert metrics["mismatch"][0] == pytest.approx(abs(np.log(ratio)).sum(), rel=1e-4)

    @jax.jit
    @jax.grad
    def by_hand(tree):
        ratio = jnp.exp(logprobs(tree) - drawn)
        gain = jnp.minimum(ratio * plus[:, None], jnp.clip(ratio, 0.95, 1.1) * plus[:, None])
        return -gain.mean()

    close(found, by_hand(params(1)))
    (_, metrics), on_policy = gradient(every_completion(advantages=plus), policy)
    assert metrics["clipped"][0] == 0
    close(on_policy, gradient(every_completion(advantages=plus))[1])


def test_completions_of_a_step_were_drawn_before_the_last_one_and_a_resumed_run_has_the_same(
    started,  # noqa: F811
    tmp_path,
    rewarded,
):
    """Their log-probabilities are those of the parameters that the step before began with; paused and killed alike."""
    policy = PolicyGradient(**FEW, cut="scored", asynchronous=True)
    whole = tmp_path / "whole"
    main(config(started, whole, policy))
    main(config(started, tmp_path / "short", policy, checkpoint=CheckpointConfig(every=9)))
    threads = [name for name, texts in rewarded if len(texts) == 24]
    assert [name.startswith("ahead") for name in threads[:4]] == [False, True, True, True]
    model = espalier.load(started / "clm")
    arrays = arrays_of(tmp_path / "short", 1)
    found = completion_logprobs(model.config, model.params, arrays, 0.7, model.execution)
    close(np.where(arrays["weights"] > 0, found, 0), arrays["drawn_logprobs"])
    metrics = [row for row in metrics_of(whole) if "loss" in row]
    assert metrics[0]["mismatch"] < 1e-5 and all(row["mismatch"] > 1e-4 for row in metrics[1:])

    log = [json.loads(line) for line in (whole / "collected" / "log.jsonl").read_text().splitlines()]
    paused = tmp_path / "paused"
    main(config(started, paused, policy, stop_at=3))
    assert (paused / "collected" / "3.ahead.npz").exists() and not (paused / "collected" / "0.npz").exists()
    rewarded.clear()
    ahead = paused / "collected" / "3.ahead.npz"
    sound = ahead.read_bytes()
    half = len(sound) // 2
    for damaged in (sound[:-40], sound[:half], sound[:half] + bytes([sound[half] ^ 1]) + sound[half + 1 :]):
        ahead.write_bytes(damaged)
        with pytest.raises(UserError, match="3.ahead.npz is damaged .*; delete it"):
            main(config(started, paused, policy))
    ahead.write_bytes(sound)
    main(config(started, paused, policy))
    # Nothing is drawn for the step at which it goes on: its completions lay there.
    records = [json.loads(line) for line in (paused / "collected" / "log.jsonl").read_text().splitlines()]
    assert [record["sha256"] for record in records] == [record["sha256"] for record in log]
    names = ("loss", "reward", "entropy", "mismatch", "clipped", "gradient_norm")
    mine, theirs = (
        [{name: row[name] for name in names} for row in metrics_of(run) if "loss" in row] for run in (paused, whole)
    )
    assert mine == theirs


def test_rewards_are_worked_out_while_the_step_trains(started, tmp_path, monkeypatch):  # noqa: F811
    """A reward that waits until the next batch has been drawn and `ahead` has returned would otherwise wait forever."""
    returned, original, drawn = threading.Event(), Rewards.__call__, rollouts.Rollouts.ahead
    waited = []

    def slow(self, groups):
        if threading.current_thread().name.startswith("ahead"):
            waited.append(returned.wait(60))
        return original(self, groups)

    def ahead(self, *given):
        returned.clear()
        found = drawn(self, *given)
        assert not found or not self._asked[1].done()
        returned.set()
        return found

    monkeypatch.setattr(Rewards, "__call__", slow)
    monkeypatch.setattr(rollouts.Rollouts, "ahead", ahead)
    policy = PolicyGradient(**FEW, cut="scored", asynchronous=True)
    main(config(started, tmp_path / "run", policy, steps=3))
    assert waited == [True, True]


def test_settings_that_do_not_go_together_are_refused():
    for settings, message in (
        (dict(asynchronous=True, resample=1), "the policy that would draw once more is gone"),
        (dict(asynchronous=True, correction=2.0), "the ratio corrects already; leave out one of both"),
        (dict(slots=3), "slots=3 hold no group of policy.samples=8"),
        (dict(stop=("",)), "an empty text"),
    ):
        with pytest.raises(UserError, match=message):
            PolicyGradient(**settings)
