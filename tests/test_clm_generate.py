"""Sampling against brute force, and generation against a loop without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clm.generate
import clm.presets
from clm.generate import GenerateConfig, SamplingConfig, continue_texts, generate, next_token
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.heads import causal_lm_head
from espalier.models.transformer import Execution, apply, init_params
from espalier.models.vocabulary import logits

TINY = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
MODELS = {
    "gpt2": dataclasses.replace(clm.presets.debug().model, **TINY, max_position_embeddings=32),
    "llama": dataclasses.replace(clm.presets.demo().model, **TINY, num_key_value_heads=2),
}


def frequencies(sampling, probabilities, draws=20_000):
    logits_BV = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (draws, 1))
    tokens = np.asarray(next_token(logits_BV, jax.random.key(0), sampling))
    return np.bincount(tokens, minlength=len(probabilities)) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingConfig(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (SamplingConfig(temperature=0.0), [1, 0, 0, 0]),
        (SamplingConfig(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (SamplingConfig(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (SamplingConfig(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0]),
        (SamplingConfig(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
        (SamplingConfig(temperature=1.0, top_p=0.9), np.array([0.5, 0.3, 0.15, 0]) / 0.95),
    ],
)
def test_sampling_draws_from_the_stated_distribution(sampling, expected):
    # Four standard deviations of a frequency over 20,000 draws are at most 0.0142.
    np.testing.assert_allclose(frequencies(sampling, [0.5, 0.3, 0.15, 0.05]), expected, atol=0.0142)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_equals_a_loop_without_cache(name):
    model = MODELS[name]
    params = init_params(model, jax.random.key(1), heads=("causal_lm",))
    prompts = [[7, 3, 9, 11, 2], [5], [8, 8, 1]]
    new = generate(model, params, prompts, SamplingConfig(max_new_tokens=8, temperature=0.0), end_ids=())

    @jax.jit
    def scores_at(ids_1T, length):
        at_1T = jnp.arange(ids_1T.shape[1], dtype=jnp.int32)[None]
        batch = {"input_ids": ids_1T, "segment_ids": (at_1T < length).astype(jnp.int32), "positions": at_1T}
        x_BTD = apply(model, params, batch)
        last_BTD = jax.lax.dynamic_slice_in_dim(x_BTD, length - 1, 1, axis=1)
        return logits(*causal_lm_head(model, params, last_BTD, Execution()), model.vocab_size)[0, 0]

    for prompt, got in zip(prompts, new, strict=True):
        ids = list(prompt)
        for _ in range(8):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(jnp.argmax(scores_at(padded, len(ids)))))
        assert got == ids[len(prompt) :]


def test_a_row_ends_at_the_end_token_and_others_go_on():
    model = MODELS["llama"]
    params = init_params(model, jax.random.key(1), heads=("causal_lm",))
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0)
    free = generate(model, params, [[7, 3], [5]], greedy, end_ids=())
    end = free[0][2]
    stopped = generate(model, params, [[7, 3], [5]], greedy, end_ids=(end,))
    assert stopped[0] == free[0][: free[0].index(end)]
    assert stopped[1] == (free[1][: free[1].index(end)] if end in free[1] else free[1])
    several = generate(model, params, [[7, 3], [5]], greedy, end_ids=(49, free[0][3], free[1][1]))
    for row, whole in zip(several, free, strict=True):
        ends = [at for at, token in enumerate(whole) if token in (49, free[0][3], free[1][1])]
        assert row == whole[: min(ends, default=len(whole))]


def test_same_seed_same_text():
    model = MODELS["gpt2"]
    params = init_params(model, jax.random.key(1), heads=("causal_lm",))
    one, same, other = (
        generate(model, params, [[1, 2]], SamplingConfig(max_new_tokens=16, temperature=1.0, seed=s), end_ids=())
        for s in (0, 0, 1)
    )
    assert one == same != other


def test_generation_beyond_the_learned_positions_is_refused():
    with pytest.raises(UserError, match="exceeds the model's 32 positions; try --sampling.max-new-tokens 30"):
        generate(MODELS["gpt2"], {}, [[1, 2]], SamplingConfig(max_new_tokens=100), end_ids=())
    with pytest.raises(UserError, match="give a shorter prompt"):
        generate(MODELS["gpt2"], {}, [[1] * 40], SamplingConfig(), end_ids=())


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_bad_sampling_is_refused(bad):
    with pytest.raises(UserError, match="out of range"):
        SamplingConfig(**bad)


@pytest.fixture(scope="module")
def byte_level():
    """A vocabulary in which most Chinese characters are two or three tokens."""
    return train_tokenizer(["机器学习是人工智能的一个分支。"] * 9, "bpe", 300, for_masked_lm=False)


def test_generated_text_is_whole_characters(byte_level, monkeypatch):
    """An untrained model writes bytes at random: what is shown are the characters among them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = dataclasses.replace(MODELS["llama"], vocab_size=vocabulary_size(byte_level), max_position_embeddings=512)
    params = init_params(model, jax.random.key(1), heads=("causal_lm",))
    sampling = SamplingConfig(max_new_tokens=300, temperature=1.5)
    seen = []
    monkeypatch.setattr(clm.generate, "generate", lambda *given, **by: seen.extend(generate(*given, **by)) or seen)
    ((text,), (ids,)) = continue_texts(model, params, byte_level, [""], sampling), seen
    stands_for = {character: byte for byte, character in bytes_to_unicode().items()}
    names = byte_level.convert_ids_to_tokens([token for token in ids if token not in byte_level.all_special_ids])
    content = bytes(stands_for[character] for name in names for character in name)
    with pytest.raises(UnicodeDecodeError):
        content.decode()
    assert "\ufffd" not in text and text.encode().decode() == text
    assert _without_specials(byte_level, text) == content.decode(errors="ignore")


def _without_specials(tokenizer, text: str) -> str:
    for name in tokenizer.all_special_tokens:
        text = text.replace(name, "")
    return text


def test_a_character_that_the_end_cuts_is_left_out(byte_level, monkeypatch):
    whole = byte_level.encode("学习机🤖", add_special_tokens=False)
    monkeypatch.setattr(clm.generate, "generate", lambda *_, **__: [whole[:-1], whole, [*whole[:-2], *whole]])
    found = continue_texts(MODELS["llama"], {}, byte_level, ["a", "b", "c"])
    assert found == ["学习机", "学习机🤖", "学习机学习机🤖"]


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(UserError, match="holds bytes that are no text"):
        GenerateConfig("run", prompt=("caf\udce9",))
