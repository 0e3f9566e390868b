"""Several samples of a prompt, and their log-probabilities against those of a training pass over the same tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GPT, LLAMA, close, random_params, strict_and_quick  # noqa: F401

from espalier.models import decoding, generate
from espalier.models.config import Execution
from espalier.models.decoding import Sampling
from espalier.models.logprobs import label_logprobs
from espalier.models.transformer import apply
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

PROMPTS = [[7, 3, 9, 11, 2], [5], [8, 8, 1], [4] * 16]
G, S, T = 6, 3, 16


@functools.cache
def model(name):
    config = {"gpt2": GPT, "llama": LLAMA}[name]
    return config, random_params(config, ("causal_lm",))


def drawn_by(name, sampling, prompts=PROMPTS, params=None, dtype="float32", **how):
    config, own = model(name)
    execution = Execution(dtype=dtype)
    given = (config, own if params is None else params, prompts, jax.random.key(1), sampling)
    return generate.generate(*given, execution=execution, **how)


@functools.partial(jax.jit, static_argnames=("config", "first", "dtype", "temperature"))
def scored(config, params, batch, labels, first, dtype, temperature):
    execution = Execution(dtype=dtype)
    return label_logprobs(config, params, batch, labels, execution, first=first, temperature=temperature)[0]


def trained(name, tokens_BG, dtype="float32", temperature=1.0, left=True):
    """log p of what was drawn by the pass of training, prompts padded on the left or completions on the right."""
    found = np.zeros(tokens_BG.shape, np.float32)
    length = T + G
    ids, mask = (np.zeros((len(tokens_BG), length), np.int32) for _ in range(2))
    labels = np.maximum(tokens_BG, 0)
    for row, tokens in enumerate(tokens_BG):
        prompt = PROMPTS[row // S]
        whole = [*prompt, *tokens[tokens >= 0]]
        begin = T - len(prompt) if left else 0
        ids[row, begin : begin + len(whole)], mask[row, begin : begin + len(whole)] = whole, 1
    config, params = model(name)
    batch = {"input_ids": ids, "attention_mask": mask}
    if left:
        found = np.asarray(scored(config, params, batch, labels, T - 1, dtype, temperature))
    else:
        padded = np.zeros((len(ids), length), np.int32)
        for row in range(len(ids)):
            size = len(PROMPTS[row // S])
            padded[row, size - 1 : size - 1 + G] = labels[row]
        every = np.asarray(scored(config, params, batch, padded, 0, dtype, temperature))
        for row in range(len(ids)):
            size = len(PROMPTS[row // S])
            found[row] = every[row, size - 1 : size - 1 + G]
    return np.where(tokens_BG >= 0, found, 0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_log_probabilities_of_samples_are_those_of_a_training_pass(name):
    """Within 1e-4 in float32, padded on either side; end tokens of both kinds have theirs."""
    free = drawn_by(name, Sampling(G, samples=S))
    ends = (int(free.tokens_BG[0, 2]), int(free.tokens_BG[7, 1]))
    drawn = drawn_by(name, Sampling(G, samples=S, end_ids=ends))
    tokens = drawn.tokens_BG
    assert tokens.shape == (len(PROMPTS) * S, G) and (tokens == -1).any()
    for row in tokens:
        real = row[row >= 0]
        assert (row[: len(real)] >= 0).all() and not np.isin(real[:-1], ends).any()
        assert len(real) == G or real[-1] in ends
    np.testing.assert_allclose(drawn.logprobs_BG, trained(name, tokens), atol=1e-4, rtol=0)
    np.testing.assert_allclose(drawn.logprobs_BG, trained(name, tokens, left=False), atol=1e-4, rtol=0)
    # At temperature 1 and uncut, what is drawn from is the model itself.
    np.testing.assert_array_equal(drawn.drawn_logprobs_BG, drawn.logprobs_BG)


def test_both_distributions_are_told_where_they_differ():
    drawn = drawn_by("gpt2", Sampling(G, temperature=0.7, samples=S))
    np.testing.assert_allclose(drawn.logprobs_BG, trained("gpt2", drawn.tokens_BG), atol=1e-4, rtol=0)
    tempered = trained("gpt2", drawn.tokens_BG, temperature=0.7)
    np.testing.assert_allclose(drawn.drawn_logprobs_BG, tempered, atol=1e-4, rtol=0)
    assert abs(drawn.drawn_logprobs_BG - drawn.logprobs_BG).max() > 0.1
    # Cut to two tokens, each is one of two: what is drawn from sums to 1 over them.
    scores = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]], jnp.float32))
    cut = jax.nn.softmax(decoding.drawn_from(scores, Sampling(1, top_k=2)))
    np.testing.assert_allclose(cut, [[0.625, 0.375, 0, 0]], rtol=1e-6)
    greedy = decoding.drawn_from(scores, Sampling(1, temperature=0.0))
    assert decoding.logprob_of(greedy, jnp.array([0])) == 0


def test_the_difference_in_bfloat16_is_of_rounding():
    """Reported, not hidden: half a unit of the last place of bfloat16 is 0.4 %, over scores of up to 5."""
    drawn = drawn_by("llama", Sampling(G, samples=S), dtype="bfloat16")
    difference = abs(drawn.logprobs_BG - trained("llama", drawn.tokens_BG, dtype="bfloat16"))
    print(f"bfloat16: mean {difference.mean():.1e}, largest {difference.max():.1e} nats")
    assert 0 < difference.mean() < 0.02 and difference.max() < 0.1


def test_samples_of_a_prompt_differ_and_depend_on_nothing_else(monkeypatch):
    """A prompt is read once; in another order and on a mesh the tokens are the same; a second call compiles nothing."""
    traced = []
    monkeypatch.setattr(decoding, "apply", lambda *given, **by: traced.append(1) or apply(*given, **by))
    how = Sampling(G + 1, temperature=0.9, samples=S)
    shape = (4, T)
    drawn = drawn_by("llama", how, shape=shape)
    assert len(traced) == 2  # the prompt and the turn
    again = drawn_by("llama", how, shape=shape)
    swapped = drawn_by("llama", how, [PROMPTS[2], PROMPTS[0]], numbers=[2, 0], shape=shape)
    assert len(traced) == 2
    for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(swapped.tokens_BG[:S], drawn.tokens_BG[2 * S : 3 * S])
    np.testing.assert_array_equal(swapped.tokens_BG[S:], drawn.tokens_BG[:S])
    assert all(len({tuple(row) for row in group}) == S for group in drawn.tokens_BG.reshape(-1, S, G + 1))
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(model("llama")[1], shard_params(model("llama")[1], mesh))
        split = drawn_by("llama", how, params=placed, shape=shape)
    np.testing.assert_array_equal(split.tokens_BG, drawn.tokens_BG)
    close(split.logprobs_BG, drawn.logprobs_BG)
