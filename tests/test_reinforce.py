"""Reinforcement: its gradient against the exact one by enumeration, advantages and rewards by hand, resumed runs."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import LLAMA, close, random_params
from tiny_runs import write_run
from toy import metrics_of, quick_compilation  # noqa: F401

from espalier.data.tokenizer import framed_tokenizer
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.training.config import CheckpointConfig
from espalier.training.step import micro_batches
from finetune.config import FinetuneOptimizer
from finetune.tasks.reinforce import rollouts
from finetune.tasks.reinforce.advantages import advantages, pass_at
from finetune.tasks.reinforce.objective import completion_logprobs, k3, policy_objective
from finetune.tasks.reinforce.prompts import Asked
from finetune.tasks.reinforce.record import PolicyGradient, ReinforceConfig, ReinforceData
from finetune.tasks.reinforce.rewards import Group, Rewards, arithmetic, worked_out
from finetune.train import main
from sharding.mesh import MeshConfig

V, C, T = 5, 3, 2
MODEL = dataclasses.replace(LLAMA, vocab_size=V, num_hidden_layers=1)
ALL = np.array(list(itertools.product(range(V), repeat=C)), np.int32)
REWARD = np.random.default_rng(0).normal(size=len(ALL))
FLOAT = Execution(dtype="float32")


@functools.cache
def params(seed=0):
    return jax.tree.map(lambda leaf: leaf * (1 + 0.1 * seed), random_params(MODEL, ("causal_lm",)))


def every_completion(**changes):
    """A batch of all completions of one prompt of one token, padded on the left."""
    rows = len(ALL)
    segments = np.tile([0, 1, 1, 1, 1], (rows, 1)).astype(np.int32)
    batch = {
        "input_ids": np.concatenate([np.tile([0, 4], (rows, 1)), ALL], axis=1).astype(np.int32),
        "segment_ids": segments,
        "positions": np.tile([0, 0, 1, 2, 3], (rows, 1)).astype(np.int32),
        "completions": ALL,
        "weights": np.ones((rows, C), np.float32),
        "drawn_logprobs": logprobs(params()),
        "fresh": np.ones(rows, np.int32),
    }
    names = ("advantages", "rewards", "valid", "counted", "solved", "any_solved", "equal", "cut", "lengths")
    return {name: np.ones(rows, np.float32) for name in names} | batch | changes


@functools.cache
def scorer(temperature=1.0):
    return jax.jit(lambda tree, batch: completion_logprobs(MODEL, tree, batch, temperature, FLOAT))


def logprobs(tree, temperature=1.0):
    rows = len(ALL)
    segments = np.tile([0, 1, 1, 1, 1], (rows, 1)).astype(np.int32)
    ids = np.concatenate([np.tile([0, 4], (rows, 1)), ALL], axis=1).astype(np.int32)
    positions = np.tile([0, 0, 1, 2, 3], (rows, 1)).astype(np.int32)
    batch = {"input_ids": ids, "segment_ids": segments, "positions": positions, "completions": ALL}
    return scorer(temperature)(tree, batch)


@functools.cache
def learner(policy):
    objective = policy_objective(MODEL, policy, execution=FLOAT)
    key = jax.random.key(0)

    def learnt(tree, batch, norms):
        loss = functools.partial(objective.loss, batch=batch, key=key, norms=norms, train=True)
        return jax.value_and_grad(loss, has_aux=True)(tree)

    return objective, jax.jit(learnt)


def gradient(batch, policy=PolicyGradient(), tree=None):  # noqa: B008
    objective, learnt = learner(policy)
    batch, norms = objective.prepare(batch, jax.random.key(0), 0, True)
    return learnt(params() if tree is None else tree, batch, norms)


@functools.cache
def exact(beta=0.0):
    """The gradient of E[reward] - beta KL(π ‖ π_ref), by all completions."""
    reference = logprobs(params(1)).sum(1)

    @jax.jit
    @jax.grad
    def of(tree):
        total = logprobs(tree).sum(1)
        return jnp.sum(jnp.exp(total) * (REWARD.astype(np.float32) - beta * (total - reference)))

    return of(params())


def expected(rewards, baseline="mean", deviation=False):
    """E of the estimator's gradient: A of every pair (G = 2), weighed by its probability."""
    probability = np.exp(np.float64(logprobs(params())).sum(1))
    rows = len(ALL)
    pairs = np.stack(np.meshgrid(rewards, rewards, indexing="ij"), -1).reshape(-1, 2)
    of_pairs = advantages(pairs, np.ones_like(pairs, bool), baseline, deviation)[:, 0].reshape(rows, rows)
    mean = of_pairs @ probability
    weighed = (mean * probability * rows * C).astype(np.float32)
    return jax.tree.map(jnp.negative, gradient(every_completion(advantages=weighed))[1]), of_pairs


def test_the_gradient_is_the_exact_one_by_enumeration():
    """Leave-one-out is unbiased, r - mean gives (G - 1) / G of it; with k1 in the reward, that of E[r] - β KL."""
    assert abs(np.exp(logprobs(params()).sum(1)).sum() - 1) < 1e-5
    close(expected(REWARD, "leave-one-out")[0], exact())
    close(expected(REWARD, "none")[0], exact())
    close(expected(REWARD, "mean")[0], jax.tree.map(lambda g: g / 2, exact()))
    gap = np.asarray(logprobs(params()) - logprobs(params(1))).sum(1)
    close(expected(REWARD - 0.3 * gap, "leave-one-out")[0], exact(0.3))


def test_divided_by_the_deviation_a_pair_is_one_half_up_or_down():
    """GRPO with two samples: (r - mean) / s = ± 1/√2, whatever the rewards are; brute force for longer groups."""
    _, of_pairs = expected(REWARD, deviation=True)
    apart = REWARD[:, None] - REWARD[None]
    np.testing.assert_allclose(of_pairs, apart / 2 / (abs(apart) / math.sqrt(2) + 1e-6), rtol=1e-6)
    far = abs(apart) > 0.1
    np.testing.assert_allclose(of_pairs[far], np.sign(apart[far]) / math.sqrt(2), rtol=1e-4)
    rewards = np.random.default_rng(1).normal(size=(6, 5))
    found = advantages(rewards, np.ones((6, 5), bool), "mean", True)
    for row, values in zip(found, rewards, strict=True):
        np.testing.assert_allclose(row, (values - values.mean()) / (values.std(ddof=1) + 1e-6), rtol=1e-5)


def test_advantages_leave_out_what_has_no_reward_and_equal_rewards_give_exactly_none():
    rewards = np.array([[1.0, 3.0, np.nan, 5.0], [0.1, 0.1, 0.1, 0.1], [np.nan] * 4])
    valid = np.isfinite(rewards)
    np.testing.assert_array_equal(advantages(rewards, valid, "mean", False)[0], [-2, 0, 0, 2])
    np.testing.assert_array_equal(advantages(rewards, valid, "leave-one-out", False)[0], [-3, 0, 0, 3])
    for deviation in (False, True):
        assert not advantages(rewards, valid, "mean", deviation)[1:].any()
    assert pass_at(np.array([0, 2, 4]), 4, 2) == pytest.approx((0 + (1 - 1 / 6) + 1) / 3)


def test_estimators_of_the_divergence_against_the_exact_one():
    own, other = (np.float64(logprobs(params(seed))) for seed in (0, 1))
    probability = np.exp(own.sum(1))
    divergence = probability @ (own - other).sum(1)
    # Σ_tokens E[k3] is the divergence, too: each token's is that of its conditional distribution.
    assert probability @ np.asarray(k3(own, other)).sum(1) == pytest.approx(divergence, rel=1e-4)
    assert (np.asarray(k3(own, other)) >= 0).all() and divergence > 1e-3


def test_the_ratio_is_exactly_one_at_first_and_then_that_of_the_two_policies():
    """Also at a temperature, where both are of the tempered distribution; clipped by hand a step later."""
    plus = np.random.default_rng(2).normal(size=len(ALL)).astype(np.float32)
    policy = PolicyGradient(updates=2, clip=0.05, clip_high=0.1, mismatch=100.0)
    first = np.asarray(logprobs(params()))
    (_, metrics), fresh = gradient(every_completion(advantages=plus, first_logprobs=first + 1), policy)
    assert metrics["clipped"][0] == 0 and metrics["mismatch"][0] == 0
    (_, _), plain = gradient(every_completion(advantages=plus))
    close(fresh, plain)
    # One step behind: exp(new - first), and nothing is gained beyond the bounds.
    late = every_completion(advantages=plus, first_logprobs=first, fresh=np.zeros(len(ALL), np.int32))
    (value, metrics), _ = gradient(late, policy, params(1))
    ratio = np.exp(np.asarray(logprobs(params(1))) - first)
    assert metrics["clipped"][0] == ((ratio < 0.95) | (ratio > 1.1)).sum() > 0

    @jax.jit
    @jax.grad
    def by_hand(tree):
        ratio = jnp.exp(logprobs(tree) - first)
        gain = jnp.minimum(ratio * plus[:, None], jnp.clip(ratio, 0.95, 1.1) * plus[:, None])
        return -gain.mean()

    close(gradient(late, policy, params(1))[1], by_hand(params(1)))
    # What people see is the mean reward, negated.
    assert value == pytest.approx(-1.0)


def test_a_policy_that_is_not_the_one_that_drew_is_dropped_and_corrected():
    drawn = np.asarray(logprobs(params())).copy()
    drawn[:60] -= 0.5
    batch = every_completion(drawn_logprobs=drawn)
    (_, metrics), dropped = gradient(batch)
    assert metrics["dropped"][0] == 60
    weights = np.ones((len(ALL), C), np.float32)
    weights[:60] = 0
    close(dropped, gradient(every_completion(weights=weights))[1])
    (_, _), corrected = gradient(batch, PolicyGradient(mismatch=1.0, correction=1.2))
    by_hand = np.where(np.arange(len(ALL)) < 60, min(math.exp(0.5), 1.2), 1.0).astype(np.float32)
    close(corrected, gradient(every_completion(advantages=by_hand))[1])


@pytest.mark.parametrize("normaliser", ["budget", "tokens", "sequence"])
def test_normalisers_by_hand_and_accumulated_equals_whole(normaliser):
    rows = 12
    lengths = np.arange(rows) % C + 1
    plus = np.random.default_rng(3).normal(size=rows).astype(np.float32)
    batch = {name: array[:rows] for name, array in every_completion().items()}
    batch |= {"weights": (np.arange(C) < lengths[:, None]).astype(np.float32), "advantages": plus}
    policy = PolicyGradient(normaliser=normaliser)
    objective, learnt = learner(policy)
    _, norms = objective.prepare(batch, jax.random.key(0), 0, True)
    (_, metrics), whole = learnt(params(), batch, norms)
    divisor = {"budget": rows * C, "tokens": lengths.sum(), "sequence": rows * lengths[:, None]}[normaliser]

    @jax.jit
    @jax.grad
    def by_hand(tree):
        return -jnp.sum(logprobs(tree)[:rows] * batch["weights"] * plus[:, None] / divisor)

    close(whole, by_hand(params()))
    if normaliser == "tokens":
        parts = micro_batches(batch, 3)
        found = [learnt(params(), jax.tree.map(lambda x, i=i: x[i], parts), norms) for i in range(3)]
        close(jax.tree.map(lambda *leaves: sum(leaves), *(gradient for _, gradient in found)), whole)
        assert sum(float(aux["reward"][1]) for (_, aux), _ in found) == metrics["reward"][1] == rows


def test_built_in_rewards_by_hand():
    data = ReinforceData(
        reward=("exact", "arithmetic", "regex:b.b", "format:[ab]+", "length:4"), reward_weights=(1, 10, 100, 1000, 0.1)
    )
    rewards = Rewards(data)
    texts = ["3", "so 1, then 3.0", "bob", "ab", "b" * 6, ""]
    found = rewards([Group(Asked("f:1", "1+2=", [1], {}, "1+2"), texts)])
    np.testing.assert_allclose(found[0], [10, 10 - 0.1, 100, 1000, 1100 - 0.05, 0])
    assert arithmetic("it is 1,000", "10*(99+1)") == 1 and arithmetic("no", "1") == 0
    assert worked_out("2**9") is None and worked_out("__import__('os')") is None and worked_out("1/0") is None
    assert worked_out("007") == 7
    for name, message in (("exakt", "is unknown; there are exact"), ("regex:(", "is no regular expression"),
                          ("length:x", "is no number of characters"), ("model:", "names no run")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Rewards(ReinforceData(reward=(name,)))


def test_a_function_of_the_users_that_raises_hangs_or_ends_is_a_line_and_no_reward(tmp_path):
    (tmp_path / "mine.py").write_text("""
import os, time
def reward(prompts, completions, row):
    what = row["what"]
    print(what)
    if what == "raise": return 1 / 0
    if what == "hang": time.sleep(100)
    if what == "end": os._exit(3)
    if what == "short": return [1.0]
    return [float("nan") if what == "nan" else len(text) + len(prompts) for text in completions]
""")
    name = f"{tmp_path}/mine.py:reward"
    rewards = Rewards(ReinforceData(reward=(name,), reward_timeout=1.0, reward_processes=1))
    lines = {}
    # The first call may take as long as loading takes.
    for what in ("good", "raise", "nan", "short", "hang", "good", "end", "good"):
        asked = Asked("f:1", "p", [1], {"what": what}, "")
        found = rewards([Group(asked, ["a", "bcd"])])
        lines[what] = rewards.error
        np.testing.assert_array_equal(found, [[3, 5]] if what == "good" else [[np.nan] * 2])
        if what == "raise":
            with pytest.raises(UserError, match="ZeroDivisionError in line 6 .*correct it"):
                rewards.check(asked)
    rewards.close()
    assert "a reward that is nan" in lines["nan"] and "1 rewards for 2 completions" in lines["short"]
    assert "took longer than 1 s" in lines["hang"] and "its process ended (3)" in lines["end"]
    assert list(rewards.user_code) == [f"reward {name}"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A decoder with random weights, and a file of sums."""
    folder = tmp_path_factory.mktemp("reinforce")
    model = dataclasses.replace(LLAMA, num_hidden_layers=1)
    write_run(folder / "clm", model, ["0123456789 + - ="] * 50, vocabulary=300)
    rows = [{"prompt": f"{a}+{'0' * b}{b}=", "answer": str(a + b)} for a in range(3) for b in range(3)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(started, run, policy=None, **changes):
    file = str(started / "sums.jsonl")
    data = dict(train=file, validation=file, reward=("regex:[0-9a-e]",), validation_samples=2)
    defaults = dict(
        run_dir=str(run), init_from=str(started / "clm"), steps=4, batch_size=8, log_every=1, eval_every=100,
        mesh=MeshConfig(), optimizer=FinetuneOptimizer(learning_rate=1e-2), checkpoint=CheckpointConfig(every=2),
        policy=PolicyGradient(samples=3, max_new_tokens=4, temperature=0.7, cut="scored", updates=2, resample=1)
        if policy is None else policy,
        data=ReinforceData(**data | changes.pop("data", {})),
    )  # fmt: skip
    return ReinforceConfig(**defaults | changes)


def test_a_resumed_run_draws_the_same_again_and_what_is_drawn_is_trained(started, tmp_path, monkeypatch):
    """Paused in the middle of two updates on the same completions; ids in are ids trained, and none is made of text."""
    drawn, real = [], rollouts.continued
    monkeypatch.setattr(rollouts, "continued", lambda *given: drawn.append(real(*given)) or drawn[-1])
    whole = main(config(started, tmp_path / "whole"))
    folder = tmp_path / "whole" / "collected"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 2]
    with np.load(folder / "2.npz") as file:
        kept = dict(file)
    tokens = [np.asarray(each.tokens_BG) for each in drawn]
    there = {tuple(row) for each in tokens for row in each.tolist()}
    shown = np.where(np.arange(4) < kept["lengths"][:, None], kept["completions"], -1)
    assert {tuple(row) for row in shown.tolist()} <= there
    np.testing.assert_array_equal(kept["input_ids"][:, -4:], kept["completions"])
    # No token that is learnt lacks its log-probability: 0 would be certainty.
    assert ((kept["drawn_logprobs"] < 0) == (kept["weights"] > 0)).all()

    paused = tmp_path / "paused"
    main(config(started, paused, stop_at=3))
    resumed = main(config(started, paused))
    records = [json.loads(line) for line in (paused / "collected" / "log.jsonl").read_text().splitlines()]
    assert [record["sha256"] for record in records] == [record["sha256"] for record in log]
    names = ("loss", "reward", "entropy", "mismatch", "clipped", "gradient_norm")
    mine, theirs = (
        [{name: row[name] for name in names} for row in metrics_of(run) if "loss" in row]
        for run in (paused, tmp_path / "whole")
    )
    assert mine == theirs and resumed["eval"] == whole["eval"] and resumed["metrics"] == whole["metrics"]
    assert all(row["mismatch"] < 1e-5 for row in theirs), "drawn and trained at the same temperature"
    assert (paused / "report.html").read_text().count("Rollouts") and whole["metrics"]["prompts"] == 9


def test_sharded_equals_unsharded_and_what_was_cut_off_is_worth_nothing(started, tmp_path):
    policy = PolicyGradient(samples=4, max_new_tokens=4, beta=0.1)
    found = {}
    for name, mesh in (("one", MeshConfig(8)), ("many", MeshConfig(2, 2, 1, 2))):
        run = tmp_path / name
        main(config(started, run, policy, mesh=mesh, steps=1))
        with np.load(run / "collected" / "0.npz") as file:
            found[name] = dict(file), [row for row in metrics_of(run) if "loss" in row][0]
    (one, metrics), (many, split) = found["one"], found["many"]
    np.testing.assert_array_equal(one["completions"], many["completions"])
    for name in ("drawn_logprobs", "reference_logprobs", "advantages"):
        close(one[name], many[name])
    assert metrics["gradient_norm"] == pytest.approx(split["gradient_norm"], rel=1e-3)
    assert metrics["kl"] == 0 and metrics["mismatch"] < 1e-5
    assert not one["rewards"][one["cut"] > 0].any() and one["cut"].any()
    np.testing.assert_array_equal(one["first_logprobs"], one["reference_logprobs"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data=dict(reward=())), "no --data.reward given; there are exact, arithmetic"),
        (dict(data=dict(max_length=8), policy=PolicyGradient(max_new_tokens=10**6)), "no prompt leaves room"),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_written(started, tmp_path, changes, message):
    model = dataclasses.replace(LLAMA, num_hidden_layers=1)
    assert model.max_length is None or changes
    if "no prompt" in message:
        changes = {"data": {"max_length": 8, "template": "{prompt}{prompt}{prompt}{prompt} = {answer}"}}
    with pytest.raises(UserError, match=message) as caught:
        main(config(started, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "config.json").exists()


def test_settings_that_will_not_do_are_refused():
    for settings, message in (
        (dict(samples=1), "needs others to compare with"),
        (dict(clip=1.0), "between 0 and 1"),
        (dict(temperature=0.0), "above 0; try 1"),
        (dict(correction=0.5), "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            PolicyGradient(**settings)
    with pytest.raises(UserError, match="must be one policy; give 0"):
        ReinforceConfig(dropout=0.1)


def test_a_classifier_as_a_reward_gives_the_logarithm_of_its_last_label(started, monkeypatch):
    import espalier
    import espalier.loading
    from espalier.predict.loaded import LoadedModel

    decoder = espalier.load(started / "clm")
    labelled = dataclasses.replace(decoder.config, labels=("bad", "good"))
    model = LoadedModel(
        labelled, random_params(labelled, ("sequence_classification",)), framed_tokenizer(decoder.tokenizer, True),
        "sequence_classification",
    )  # fmt: skip
    monkeypatch.setattr(espalier.loading, "load", lambda run: {"judge": model, "clm": decoder}[run])
    found = Rewards(ReinforceData(reward=("model:judge",)))(
        [Group(Asked("f:1", "1+2=", [1], {}, ""), ["3", "4"]), Group(Asked("f:2", "0=", [1], {}, ""), ["0", "1"])]
    )
    logits = np.asarray(model.logits(["1+2=3", "1+2=4", "0=0", "0=1"]), np.float64)
    by_hand = logits[:, 1] - np.log(np.exp(logits).sum(1))
    np.testing.assert_allclose(found.reshape(-1), by_hand, atol=1e-5)
    with pytest.raises(UserError, match="has the head causal_lm; give a reward model or a classifier"):
        Rewards(ReinforceData(reward=("model:clm",)))
