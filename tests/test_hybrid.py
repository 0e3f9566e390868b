"""Rows of both kinds in one batch: who sees whom, what is hidden, the loss by brute force, meshes and micro-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective_contract import EIGHT, after, assert_same
from tiny_models import LLAMA, batch_of, close, random_params
from toy import quick_compilation  # noqa: F401

from espalier.commands.plan.objectives import objective_of
from espalier.commands.plan.planner import make_plan
from espalier.commands.plan.settings import PRESETS, PlanSettings
from espalier.models.attention import XLA, attend
from espalier.models.attention_backend import Use
from espalier.models.attention_cudnn import CUDNN
from espalier.models.attention_spec import AttentionSpec, Places
from espalier.models.attention_triton import TRITON, triton_attention
from espalier.models.config import Execution
from espalier.models.heads import causal_lm_head
from espalier.models.splash import SPLASH
from espalier.models.transformer import apply, stack
from espalier.models.vocabulary import logits
from mlm.config import MaskingConfig
from mlm.hybrid import causal_rows, hybrid_objective
from mlm.loss import masked_lm_objective
from mlm.masking import Vocabulary, from_before, mask_batch

V, T, B, MASK = LLAMA.vocab_size, 16, 8, 4
BOTH = dataclasses.replace(LLAMA, causal=False)
F32 = Execution(dtype="float32")
VOCABULARY = Vocabulary(MASK, np.arange(V) >= 5, np.full(V, 2, np.uint8))
ALL_HIDDEN = MaskingConfig(rate=0.3, mask_fraction=1.0, random_fraction=0.0)
SHARE = 3 / 8


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(LLAMA, ("causal_lm",)))


def rows(seed=0):
    """Packed rows as causal LM has them: two documents each, the second cut by the end of the row or padded."""
    batch = batch_of(LLAMA, [[5 + row % 4, 7, *([-1] if row % 2 else [])] for row in range(B)], T, seed)
    ids, segments = batch["input_ids"], batch["segment_ids"]
    ids[:] = np.where(segments > 0, np.maximum(ids, 5), 0)
    follows = np.zeros((B, T), bool)
    follows[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    batch["labels"] = np.where(follows, np.roll(ids, -1, axis=1), 1).astype(np.int32)
    batch["loss_weights"] = (segments > 0).astype(np.float32)
    batch["label_bytes"] = np.full((B, T), 3, np.int32)
    return batch


def objective(masking=ALL_HIDDEN, share=SHARE):
    def rate(step, train):
        return jnp.float32(masking.rate)

    return hybrid_objective(LLAMA, masking, VOCABULARY, rate=rate, causal_share=share, execution=F32)


def test_rows_of_each_kind_are_what_a_model_of_that_kind_makes_of_them(params):
    batch = rows()
    flags = np.arange(B) % 3 == 0
    mixed = apply(LLAMA, params, batch | {"bidirectional": jnp.asarray(flags)}, execution=F32)
    causal, both = (apply(model, params, batch, execution=F32) for model in (LLAMA, BOTH))
    close(mixed, jnp.where(flags[:, None, None], both, causal), 1e-6)
    real = batch["segment_ids"] > 0
    assert float(jnp.abs(both - causal)[real].max()) > 0.1


def test_gradients_reach_exactly_what_may_be_seen(params):
    """Of the states of every token with respect to every vector that goes in."""
    batch = rows()
    segments = batch["segment_ids"][:2]
    flags = jnp.array([False, True])
    x_BTD = jax.random.normal(jax.random.key(0), (2, T, LLAMA.hidden_size), jnp.float32)

    def states(x_BTD):
        return stack(LLAMA, params, x_BTD, segments, batch["positions"][:2], execution=F32, bidirectional_B=flags)

    def of_token(t):
        return jax.grad(lambda x_BTD: (states(x_BTD)[:, t] * jnp.arange(1.0, LLAMA.hidden_size + 1)).sum())(x_BTD)

    reached_TBS = np.abs(np.stack(jax.lax.map(of_token, jnp.arange(T)))).max(-1) > 0
    seen_BTS = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)
    seen_BTS[0] &= np.arange(T)[None] <= np.arange(T)[:, None]
    itself_BTS = np.eye(T, dtype=bool)[None].repeat(2, 0)
    np.testing.assert_array_equal(reached_TBS.transpose(1, 0, 2) | itself_BTS, seen_BTS | itself_BTS)


def test_a_hidden_token_is_not_in_what_goes_in_and_the_state_before_it_predicts_it():
    batch, key = rows(), jax.random.key(3)
    prepared, _ = objective().prepare(batch, key, 0, True)
    both = np.asarray(prepared["bidirectional"])
    assert both.sum() == B - round(SHARE * B)
    weights, ids = (np.asarray(prepared[name]) for name in ("loss_weights", "input_ids"))
    hidden = ids == MASK
    np.testing.assert_array_equal(hidden.any(1), both)
    begins = np.pad(batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1], ((0, 0), (1, 0)), constant_values=True)
    assert not (hidden & begins).any(), "nothing before it could predict the first token of a piece"
    np.testing.assert_array_equal(weights[both, :-1], hidden[both, 1:])
    np.testing.assert_array_equal(weights[~both], batch["loss_weights"][~both])
    np.testing.assert_array_equal(ids[~hidden], batch["input_ids"][~hidden])
    np.testing.assert_array_equal(
        prepared["labels"][both, :-1][hidden[both, 1:]], batch["input_ids"][both, 1:][hidden[both, 1:]]
    )
    # Another token in its place changes nothing but the label.
    other = batch | {"input_ids": np.where(hidden, batch["input_ids"] % (V - 5) + 5, batch["input_ids"])}
    again, _ = objective().prepare(other, key, 0, True)
    np.testing.assert_array_equal(again["input_ids"], ids)


def brute_force(params, prepared):
    """Each row by itself through a model of its kind, every score over the vocabulary, in float64."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for row in range(B):
        both = bool(prepared["bidirectional"][row])
        model = BOTH if both else LLAMA
        names = ("input_ids", "segment_ids", "positions")
        x_BTD = apply(model, params, {name: prepared[name][row : row + 1] for name in names}, execution=F32)
        head = causal_lm_head(model, params, x_BTD, F32)
        scores_TV = np.asarray(logits(*head, vocab_size=V), np.float64)[0]
        logp_TV = scores_TV - np.log(np.exp(scores_TV).sum(-1, keepdims=True))
        for t in range(T):
            weight = float(prepared["loss_weights"][row, t])
            sums[both][0] -= weight * logp_TV[t, int(prepared["labels"][row, t])]
            sums[both][1] += weight
    return sums


@pytest.mark.parametrize("share", [SHARE, 1 / 16])
def test_the_loss_is_the_mean_of_each_kind_by_its_part_of_the_rows(params, share):
    made = objective(MaskingConfig(rate=0.3), share)
    for step in (0, 1):
        prepared, norms = made.prepare(rows(step), jax.random.key(step), step, True)
        value, sums = jax.jit(lambda p, b, n: made.loss(p, b, jax.random.key(0), n, True))(params, prepared, norms)
        found, both = brute_force(params, prepared), np.asarray(prepared["bidirectional"])
        # Half a causal row a step at 1/16: the first step has none, the second one.
        assert (~both).sum() == (3 if share == SHARE else step)
        expected = sum((both == kind).mean() * found[kind][0] / max(found[kind][1], 1) for kind in found)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(expected, rel=1e-5)
        assert float(sums["accuracy"][1]) == found[True][1] + found[False][1]


def test_an_evaluation_takes_every_row_both_ways(params):
    made, batch = objective(), rows()
    prepared, norms = made.prepare(batch, jax.random.key(1), 0, False)
    _, sums = jax.jit(lambda p, b: made.loss(p, b, jax.random.key(0), norms, False))(params, prepared)
    means = {name: float(total / weight) for name, (total, weight) in sums.items()}
    causal = brute_force(params, batch | {"bidirectional": np.zeros(B, bool)})[False]
    hidden, _ = masked(ALL_HIDDEN).prepare(batch, jax.random.key(1), 0, False)
    places = np.zeros((B, T), np.float32)
    np.add.at(places, (np.arange(B)[:, None], hidden["masked_positions"] - 1), hidden["masked_weights"])
    seen = batch | {"input_ids": hidden["input_ids"], "loss_weights": places, "bidirectional": np.ones(B, bool)}
    both = brute_force(params, seen)[True]
    assert means["causal_loss"] == pytest.approx(causal[0] / causal[1], rel=1e-5)
    assert means["masked_loss"] == pytest.approx(both[0] / both[1], rel=1e-5)
    assert means["loss"] == pytest.approx(SHARE * means["causal_loss"] + (1 - SHARE) * means["masked_loss"], rel=1e-5)
    assert means["bits_per_byte"] == pytest.approx(means["causal_loss"] / np.log(2) / 3, rel=1e-5)


def masked(masking):
    """Masked next-token prediction by itself."""
    return masked_lm_objective(
        *(BOTH, masking, VOCABULARY),
        rate=lambda step, train: jnp.float32(masking.rate),
        execution=F32,
        mask=from_before(mask_batch),
        head="causal_lm",
    )


def test_masked_next_token_prediction_alone_is_brute_force_too(params):
    prepared, norms = masked(ALL_HIDDEN).prepare(rows(), jax.random.key(1), 0, True)
    value, _ = masked(ALL_HIDDEN).loss(params, prepared, jax.random.key(0), norms, True)
    hidden = np.asarray(prepared["input_ids"]) == MASK
    weights = np.zeros((B, T), np.float32)
    weights[:, :-1] = hidden[:, 1:]
    found = brute_force(params, prepared | {"loss_weights": weights, "bidirectional": np.ones(B, bool)})[True]
    assert float(value) == pytest.approx(found[0] / found[1], rel=1e-5) and found[1] == hidden.sum()


def test_meshes_and_micro_batches_equal_one_device(params):
    one = after(objective(), params, rows())
    assert_same(after(objective(), params, rows(), EIGHT, accumulation=2), one)
    assert_same(after(masked(ALL_HIDDEN), params, rows(), EIGHT), after(masked(ALL_HIDDEN), params, rows()))


@pytest.mark.parametrize(("share", "size"), [(1 / 16, 8), (0.3, 5), (1 / 3, 64)])
def test_so_many_rows_are_causal_and_any_row_may_be(share, size):
    steps = 400
    found = np.stack([causal_rows(jax.random.key(step), step, size, share) for step in range(steps)])
    counts = np.cumsum(found.sum(1))
    wanted = share * size * np.arange(1, steps + 1)
    # The share is rounded to a ten-thousandth.
    assert np.abs(counts - wanted).max() <= 1 + 5e-5 * steps * size
    each = found.mean(0)
    assert np.abs(each - share).max() < 5 * np.sqrt(share * (1 - share) / steps)
    far = jax.jit(lambda step: causal_rows(jax.random.key(0), step, size, share).sum())(2**31 - 7)
    assert abs(int(far) - share * size) <= 1


def test_backends_honour_both_kinds_or_refuse():
    places = Places.of_rows(jnp.asarray(rows()["segment_ids"][:2]), jnp.array([True, False]))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    causal, both = (AttentionSpec(kind, None, None, 0.25) for kind in (True, False))
    plain = Places.of_rows(places.q_segments_BT)
    expected = jnp.stack([attend(both, q, k, v, plain)[0], attend(causal, q, k, v, plain)[1]])
    for run in (XLA.run, lambda *inputs: triton_attention(*inputs, interpret=True)):
        close(run(q, k, v, causal, places, 0.0, None), expected, 1e-5)
    use = Use.of(LLAMA, 512, dtype="bfloat16", dropping=False, packed=False, mixed=True, platform="gpu", capability=9.0)
    assert "one mask for all rows" in str(CUDNN.refuses(use)) and "one mask" in str(SPLASH.refuses(use))
    assert TRITON.refuses(use) is None
    assert "drops by the index" in str(TRITON.refuses(dataclasses.replace(use, dropout=0.1)))


def test_a_plan_knows_which_of_them_holds_its_scores():
    """On TPUs, where the kernel has one mask for all rows; and counts the head for what is predicted."""
    plans = {name: make_plan(PRESETS[name](), PlanSettings(chip="v5e", chips=16, search=False)) for name in TURNED}
    assert {name: plan.asked.attention for name, plan in plans.items()} == TURNED
    assert "one mask for all rows" in plans["hybrid"].attention_reason
    assert objective_of(PRESETS["mntp"]()).predicted(PRESETS["mntp"]()) == 0.2


TURNED = {"hybrid": "xla", "mntp": "splash"}
