"""Drawing tokens against stated distributions, and generation against the model's own forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GPT, LLAMA, close, random_params, strict_and_quick  # noqa: F401

from espalier.models import decoding, generate
from espalier.models.config import Execution
from espalier.models.decoding import Sampling, next_token, sample
from espalier.models.generate import bucket, row_keys
from espalier.models.heads import causal_lm_head
from espalier.models.transformer import apply
from espalier.models.vocabulary import logits
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

pytestmark = pytest.mark.corner
PROMPTS = [[7, 3, 9, 11, 2], [5], [8, 8, 1]]
G = 8


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (dict(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(temperature=0.0), [1, 0, 0, 0]),
        (dict(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.7), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.01), [1, 0, 0, 0]),
        (dict(top_p=0.9), np.array([0.5, 0.3, 0.15, 0]) / 0.95),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_stated_distribution(how, expected):
    draws = 20_000
    logits_BV = jnp.tile(jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05], jnp.float32)), (draws, 1))
    tokens = np.asarray(next_token(logits_BV, row_keys(jax.random.key(0), draws), Sampling(1, **how)))
    # Four standard deviations of a frequency over 20,000 draws are at most 0.0142.
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / draws, expected, atol=0.0142)


@functools.cache
def model(name):
    config = {"gpt2": GPT, "llama": LLAMA}[name]
    return config, random_params(config, ("causal_lm",))


def run(name, prompts, sampling, key=0):
    config, params = model(name)
    return generate.generate(config, params, prompts, jax.random.key(key), sampling)


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(config, params, batch):
    """Of every next token, [B, T, V], by a forward pass without a cache."""
    x_BTD = apply(config, params, batch)
    return jax.nn.log_softmax(logits(*causal_lm_head(config, params, x_BTD, Execution()), config.vocab_size))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_and_log_probabilities_are_those_of_a_forward_pass(name):
    """Greedy, prompts of several lengths: each token is the most probable after all before it, by its own score."""
    drawn = run(name, PROMPTS, Sampling(G, temperature=0.0))
    ids, mask = np.zeros((3, 16), np.int32), np.zeros((3, 16), np.int32)
    for row, prompt in enumerate(PROMPTS):
        whole = [*prompt, *drawn.tokens_BG[row]]
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    scores = np.asarray(log_probabilities(*model(name), {"input_ids": ids, "attention_mask": mask}))
    for row, prompt in enumerate(PROMPTS):
        of_row = scores[row, len(prompt) - 1 : len(prompt) - 1 + G]
        np.testing.assert_array_equal(drawn.tokens_BG[row], of_row.argmax(-1))
        np.testing.assert_allclose(drawn.logprobs_BG[row], of_row.max(-1), atol=1e-5, rtol=0)
    assert drawn.logprobs_BG.dtype == np.float32


def test_a_program_is_compiled_once_a_bucket(monkeypatch):
    traced = []
    monkeypatch.setattr(decoding, "apply", lambda *given, **by: traced.append(1) or apply(*given, **by))
    how = Sampling(5, temperature=0.9)
    run("llama", PROMPTS, how)
    once = len(traced)
    run("llama", [[4] * 16, [1, 2], [3]], how, key=3)
    assert once == len(traced) == 2  # the prompt and the turn
    run("llama", [[4] * 17, [1, 2], [3]], how)
    assert len(traced) == 4
    assert [bucket(n) for n in (1, 16, 17, 128, 129, 1000, 1025)] == [16, 16, 32, 128, 160, 1024, 1280]


def test_a_row_is_drawn_alike_wherever_it_stands():
    """On a mesh that splits weights and rows as on one device; alone with its key as among others."""
    config, params = model("llama")
    how = Sampling(G, top_k=50)
    expected = run("llama", PROMPTS, how)
    assert len(np.unique(expected.tokens_BG[0])) > 1
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shard_params(params, mesh))
        drawn = generate.generate(config, placed, PROMPTS, jax.random.key(0), how)
    np.testing.assert_array_equal(drawn.tokens_BG, expected.tokens_BG)
    close(drawn.logprobs_BG, expected.logprobs_BG)
    # Within a jitted function, parameters traced; a row of padding alone stays empty.
    prompt = {"input_ids": np.array([[0] * 16, [0] * 13 + PROMPTS[2]]), "attention_mask": np.zeros((2, 16), np.int32)}
    prompt["attention_mask"][1, 13:] = 1
    some = jax.jit(lambda params, keys: sample(config, params, prompt, keys, how))
    tokens, logprobs, *_ = some(params, row_keys(jax.random.key(0), 3)[1:])
    np.testing.assert_array_equal(tokens[1], expected.tokens_BG[2])
    assert (np.asarray(tokens[0]) == -1).all() and not np.asarray(logprobs[0]).any()


def test_a_row_ends_at_an_end_token_and_others_go_on():
    free = run("llama", PROMPTS, Sampling(G, temperature=0.0))
    ends = (int(free.tokens_BG[0, 2]), 199)
    found = run("llama", PROMPTS, Sampling(G, temperature=0.0, end_ids=ends))
    for row, tokens in enumerate(free.tokens_BG):
        count = next((i + 1 for i, token in enumerate(tokens) if token in ends), G)
        np.testing.assert_array_equal(found.tokens_BG[row], [*tokens[:count], *[-1] * (G - count)])
        close(found.logprobs_BG[row], np.where(np.arange(G) < count, free.logprobs_BG[row], 0))
    assert (found.tokens_BG[0, 3:] == -1).all() and (found.tokens_BG[1:] != -1).any()


def test_the_cache_is_of_the_type_that_is_computed_in():
    config, params = model("llama")
    prompt = {"input_ids": np.ones((2, 16), np.int32), "attention_mask": np.ones((2, 16), np.int32)}
    for dtype in ("bfloat16", "float32"):
        start = functools.partial(decoding.begun, config, sampling=Sampling(G), execution=Execution(dtype=dtype))
        state = jax.eval_shape(start, params, prompt)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.cache["layers"])} == {dtype}
        assert state.logits_BV.dtype == np.float32


def test_a_prompt_on_its_own_is_streamed_as_it_is_generated():
    config, params = model("gpt2")
    for how in (
        Sampling(G, temperature=0.9, repetition_penalty=1.3),
        Sampling(G, temperature=0.0, end_ids=tuple(range(0, 200, 3))),
    ):
        drawn = generate.generate(config, params, PROMPTS[:1], jax.random.key(2), how).tokens_BG[0]
        streamed = list(generate.stream(config, params, PROMPTS[0], jax.random.key(2), how))
        assert streamed == [token for token in drawn if token >= 0]


def test_weights_cast_once_are_the_weights_that_the_layers_cast():
    """As the layers cast them at every token: nothing changes by it."""
    config, params = model("llama")
    execution = Execution(dtype="bfloat16")
    key, how = jax.random.key(0), Sampling(2, temperature=0.0)
    drawn = generate.generate(config, params, [PROMPTS[0]], key, how, execution=execution)
    cast = decoding.cast_once(params, jnp.dtype("bfloat16"))
    batch = {"input_ids": np.array([PROMPTS[0]], np.int32)}
    both = [jax.jit(functools.partial(apply, config, execution=execution))(tree, batch) for tree in (params, cast)]
    np.testing.assert_array_equal(*(np.asarray(states, np.float32) for states in both))
    scores = logits(*causal_lm_head(config, params, both[0][:, -1:], execution), config.vocab_size)
    assert drawn.tokens_BG[0, 0] == scores.argmax()
