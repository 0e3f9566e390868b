"""The command line of generation, and the way from text to token ids and back."""

import dataclasses

import jax
import pytest
from tiny_models import strict_and_quick  # noqa: F401

import clm.generate
import clm.presets
from clm.generate import GenerateConfig, SamplingConfig, continue_texts, generate
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.transformer import init_params

TINY = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
MODELS = {
    "gpt2": dataclasses.replace(clm.presets.debug().model, **TINY, max_position_embeddings=32),
    "llama": dataclasses.replace(clm.presets.demo().model, **TINY, num_key_value_heads=2),
}


def fresh(model):
    return jax.jit(lambda key: init_params(model, key, heads=("causal_lm",)))(jax.random.key(1))


def test_a_text_ends_before_the_end_token():
    model = MODELS["llama"]
    params = fresh(model)
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0)
    (free,) = generate(model, params, [[7, 3]], greedy, end_ids=())
    (stopped,) = generate(model, params, [[7, 3]], greedy, end_ids=(free[2],))
    assert len(free) == 6 and stopped == free[: free.index(free[2])]


def test_same_seed_same_text():
    model = MODELS["gpt2"]
    params = fresh(model)
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
    params = fresh(model)
    sampling = SamplingConfig(max_new_tokens=300, temperature=1.5)
    seen = []
    monkeypatch.setattr(clm.generate, "generate", lambda *given, **by: seen.extend(generate(*given, **by)) or seen)
    ((text,), (ids,)) = continue_texts(model, params, byte_level, [""], sampling), seen
    stands_for = {character: byte for byte, character in bytes_to_unicode().items()}
    # A character does not reach across a special token.
    parts = [b""]
    for token, name in zip(ids, byte_level.convert_ids_to_tokens(ids), strict=True):
        if token in byte_level.all_special_ids:
            parts.append(b"")
        else:
            parts[-1] += bytes(stands_for[character] for character in name)
    with pytest.raises(UnicodeDecodeError):
        b"".join(parts).decode()
    assert "\ufffd" not in text and text.encode().decode() == text
    assert _without_specials(byte_level, text) == "".join(part.decode(errors="ignore") for part in parts)


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
    with pytest.raises(UserError, match="holds bytes that are not valid text"):
        GenerateConfig("run", prompt=("caf\udce9",))
