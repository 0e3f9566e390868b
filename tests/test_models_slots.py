"""Rows in slots that are filled again, against the same rows in one batch and alone."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from tiny_models import GPT, LLAMA, close, random_params, strict_and_quick  # noqa: F401

from espalier.models import decoding, slots
from espalier.models.config import Execution
from espalier.models.decoding import Sampling
from espalier.models.generate import generate
from espalier.models.transformer import apply
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

pytestmark = pytest.mark.corner
PROMPTS = [[7, 3, 9, 11, 2], [5], [8, 8, 1], [4] * 12, [6, 2], [9], [1, 2, 3], [12] * 7, [3, 3], [17, 4], [21]]
G, T = 12, 16


@functools.cache
def model(name):
    config = {"gpt2": GPT, "llama": LLAMA}[name]
    return config, random_params(config, ("causal_lm",))


def ending(name, sampling):
    """With end tokens at which every other row ends, each at another place."""
    config, params = model(name)
    free = generate(config, params, PROMPTS, jax.random.key(1), sampling, shape=(16, T)).tokens_BG
    rows = range(0, len(free), 2 * sampling.samples)
    return dataclasses.replace(sampling, end_ids=tuple(sorted({int(free[row, 5 * row % G]) for row in rows})))


def both(name, sampling, count):
    """(in slots, in one batch, the last that was told of the slots)."""
    given = (*model(name), PROMPTS, jax.random.key(1), sampling)
    parts = list(slots.rows_as_they_end(*given, count, length=T))
    found = {int(row): [array[at] for array in part.drawn] for part in parts for at, row in enumerate(part.rows)}
    rows = decoding.Drawn(*map(np.stack, zip(*(found[row] for row in range(len(PROMPTS))), strict=True)))
    return rows, generate(*given, shape=(16, T)), parts[-1]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(G, temperature=0.0),
        Sampling(G, temperature=0.9, top_k=50, repetition_penalty=1.3),
    ],
    ids=["greedy", "drawn"],
)
def test_a_row_is_the_same_whoever_had_its_slot_before(name, sampling):
    """Its tokens and log-probabilities, of both distributions; each slot serves several rows of several lengths."""
    found, expected, last = both(name, ending(name, sampling), 4)
    np.testing.assert_array_equal(found.tokens_BG, expected.tokens_BG)
    np.testing.assert_array_equal(found.ended_B, expected.ended_B)
    for mine, theirs in zip(found[1:3], expected[1:3], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)
    lengths = (expected.tokens_BG >= 0).sum(1)
    assert lengths.min() < lengths.max() == G and 0 < expected.ended_B.sum() < len(PROMPTS)
    # Greedy list scheduling (Graham 1966): no slot idles while a row waits.
    assert last.turns <= math.ceil(lengths.sum() / 4) + lengths.max() and last.fillings == len(PROMPTS)
    # In batches of four, each as long as its longest row, as many turns or more.
    batches = sum(lengths[begin : begin + 4].max() for begin in range(0, len(PROMPTS), 4))
    assert last.turns < batches


def test_a_cache_that_went_around_is_as_good_as_new():
    """One slot, rows one after the other: the ring of T + G places is written over several times."""
    sampling = Sampling(G, temperature=0.0)
    found, expected, last = both("llama", sampling, 1)
    assert last.turns == G * len(PROMPTS) > 4 * (T + G)
    np.testing.assert_array_equal(found.tokens_BG, expected.tokens_BG)
    np.testing.assert_allclose(found.logprobs_BG, expected.logprobs_BG, atol=1e-5, rtol=0)


def test_samples_of_a_prompt_share_its_reading_and_two_programs_are_all(monkeypatch):
    traced = []
    monkeypatch.setattr(decoding, "apply", lambda *given, **by: traced.append(1) or apply(*given, **by))
    sampling = Sampling(G + 1, temperature=0.9, samples=3)
    config, params = model("llama")
    given = (config, params, PROMPTS, jax.random.key(1), sampling, 7)
    *_, last = slots.rows_as_they_end(*given, length=T, together=2)
    found = slots.continue_all(*given, length=T, together=2)
    compiled = len(traced)
    expected = generate(config, params, PROMPTS, jax.random.key(1), sampling, shape=(16, T))
    np.testing.assert_array_equal(found.tokens_BG, expected.tokens_BG)
    # Two prompts are read at once, the last one alone.
    assert last.fillings == 6
    # Other prompts in another order, other ends of rows: nothing is compiled; numbers tell rows apart.
    traced.clear()
    order = [10, 3, 5, 0]
    some = slots.continue_all(
        config, params, [PROMPTS[row] for row in order], jax.random.key(1), sampling, 7, length=T, together=2,
        numbers=order,
    )  # fmt: skip
    rows = [row * 3 + sample for row in order for sample in range(3)]
    np.testing.assert_array_equal(some.tokens_BG, expected.tokens_BG[rows])
    assert not traced and compiled == 3  # the shapes of slots, the prompts and the turn


def test_slots_on_a_mesh_and_a_stop_that_is_a_table():
    """Split rows and weights give the same; token 5 after token 4 ends a row, by a table made by hand."""
    stops = np.zeros((2, LLAMA.vocab_size), np.int16)
    free = both("llama", Sampling(G, temperature=0.0), 4)[1].tokens_BG
    first, second = (int(token) for token in free[0, 3:5])
    stops[:, first], stops[1, second] = 1, -1
    config, params = model("llama")
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shard_params(params, mesh))
        found = slots.continue_all(
            config, placed, PROMPTS, jax.random.key(1), Sampling(G, temperature=0.0), 6, length=T, stops=stops
        )
    assert found.ended_B[0]
    for row, tokens in enumerate(free):
        pairs = zip(tokens, tokens[1:], strict=False)
        count = next((at + 2 for at, pair in enumerate(pairs) if pair == (first, second)), G)
        np.testing.assert_array_equal(found.tokens_BG[row], [*tokens[:count], *[-1] * (G - count)])
        assert found.ended_B[row] == (count < G or tuple(tokens[-2:]) == (first, second))
    alone = generate(config, params, PROMPTS, jax.random.key(1), Sampling(G, temperature=0.0), stops=stops)
    np.testing.assert_array_equal(alone.tokens_BG, found.tokens_BG)
    close(alone.logprobs_BG, found.logprobs_BG)


def test_rounding_in_bfloat16_is_that_of_a_batch():
    config, params = model("llama")
    how = (PROMPTS, jax.random.key(1), Sampling(G, temperature=0.0))
    execution = Execution(dtype="bfloat16")
    found = slots.continue_all(config, params, *how, 4, length=T, execution=execution)
    expected = generate(config, params, *how, shape=(16, T), execution=execution)
    np.testing.assert_array_equal(found.tokens_BG, expected.tokens_BG)
