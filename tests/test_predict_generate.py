"""Prompts of three kinds as tokens, and tokens as text of whole characters, at once or as they are drawn."""

import dataclasses

import pytest
from tiny_models import GPT, LLAMA, random_params, strict_and_quick  # noqa: F401

from espalier.data.tokenizer import plain_backend, vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models import generate as models
from espalier.predict import generate
from espalier.predict.generate import GENERATE, answers, prompt_ids, prompt_of, read, stream, way_of
from espalier.predict.loaded import LoadedModel
from espalier.predict.outputs import Shapes, fixed_shapes
from espalier.predict.sampling import SamplingConfig

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WILD = SamplingConfig(max_new_tokens=150, temperature=1.5)


def loaded(architecture=LLAMA, **saved) -> LoadedModel:
    """A random decoder with a vocabulary in which most Chinese characters are two or three tokens."""
    tokenizer = train_tokenizer(["机器学习是人工智能的一个分支。a = b"] * 9, "bpe", 300, for_masked_lm=False)
    config = dataclasses.replace(architecture, vocab_size=vocabulary_size(tokenizer))
    return LoadedModel(config, random_params(config, ("causal_lm",)), tokenizer, "causal_lm", saved)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded()


def drawn_by(model, prompt, config):
    """The tokens before they become text."""
    way = way_of(model, config)
    import jax

    key = jax.random.key(config.seed)
    [row] = models.generate(model.config, model.params, [prompt_ids(model, prompt)], key, way.sampling).tokens_BG
    return [int(token) for token in row if token >= 0 and token not in way.sampling.end_ids]


@pytest.mark.parametrize("seed", range(3))
def test_generated_text_is_whole_characters(model, seed):
    """An untrained model writes bytes at random: what is shown are the characters among them; streamed, the same."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = dataclasses.replace(WILD, seed=seed)
    [text] = model.generate("", max_new_tokens=150, temperature=1.5, seed=seed)
    ids = drawn_by(model, "", config)
    stands_for = {character: byte for byte, character in bytes_to_unicode().items()}
    # A character does not reach across a special token.
    parts = [b""]
    for token, name in zip(ids, model.tokenizer.convert_ids_to_tokens(ids), strict=True):
        if token in model.tokenizer.all_special_ids:
            parts.append(b"")
        else:
            parts[-1] += bytes(stands_for[character] for character in name)
    if len(ids) > 50:
        with pytest.raises(UnicodeDecodeError):
            b"".join(parts).decode()
    plain = text
    for name in model.tokenizer.all_special_tokens:
        plain = plain.replace(name, "")
    assert "\ufffd" not in text and plain == "".join(part.decode(errors="ignore") for part in parts)
    pieces = list(stream(model, "", config))
    assert "".join(piece for piece, _ in pieces) == text and len(pieces) > len(ids) / 8
    assert all("\ufffd" not in piece and piece.encode().decode() == piece for piece, _ in pieces)
    assert [count for _, count in pieces] == sorted({count for _, count in pieces})


def test_a_character_that_the_end_cuts_is_left_out(model, monkeypatch):
    whole = plain_backend(model.tokenizer).encode("学习机🤖", add_special_tokens=False).ids
    for ids, text in ((whole[:-1], "学习机"), (whole, "学习机🤖"), ([*whole[:-2], *whole], "学习机学习机🤖")):
        monkeypatch.setattr(models, "stream", lambda *given, ids=ids, **by: iter(ids))
        assert "".join(piece for piece, _ in stream(model, "x", WILD)) == text


def test_streams_wait_for_a_stop_that_may_begin(model, monkeypatch):
    ids = plain_backend(model.tokenizer).encode("学习 = 机器 END 分支", add_special_tokens=False).ids
    monkeypatch.setattr(models, "stream", lambda *given, **by: iter(ids))
    way = dataclasses.replace(WILD, stop=(" END",))
    assert "".join(piece for piece, _ in stream(model, "x", way)) == "学习 = 机器"
    assert "".join(piece for piece, _ in stream(model, "x", WILD)) == "学习 = 机器 END 分支"


def test_a_text_is_the_same_among_others_as_alone_and_ends_at_a_stop(model):
    way = SamplingConfig(max_new_tokens=10, temperature=1.0)
    prompts = ["a", "机器学习", "分支。" * 9, ""]
    together = generate.generate(model, prompts, way)
    longer = generate.generate(model, prompts[:2], way)
    assert together[:2] == longer and len(set(together)) == 4
    greedy = SamplingConfig(max_new_tokens=30, temperature=0.0)
    [free] = generate.generate(model, ["a"], greedy)
    stop = free[3:5]
    assert generate.generate(model, ["a"], dataclasses.replace(greedy, stop=(stop,))) == [free[: free.index(stop)]]


def test_a_blank_before_the_first_word_is_kept():
    """Unigram writes it into the token of the word, and its decoder drops it from the first."""
    tokenizer = train_tokenizer(["to be or not to be"] * 9, "unigram", 300, for_masked_lm=False)
    ids = plain_backend(tokenizer).encode("to be or not", add_special_tokens=False).ids
    at = next(n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]) == "to be")
    model = LoadedModel(LLAMA, {}, tokenizer, "causal_lm")
    assert tokenizer.decode(ids[at:]) == "or not"
    assert generate.decoded(model, ids[:at], ids[at:]) == " or not"
    assert generate.decoded(model, [tokenizer.bos_token_id], ids) == "to be or not"


def test_same_seed_same_text(model):
    one, same, other = (model.generate("a", max_new_tokens=16, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert one == same != other


def test_a_prompt_is_what_the_run_was_tuned_to_read(model):
    tokenizer = model.tokenizer
    bos = tokenizer.bos_token_id
    encode = plain_backend(tokenizer).encode
    # Text is text.
    assert prompt_ids(model, "<|endoftext|>") == [bos, *encode("<|endoftext|>").ids] != [bos, bos]
    tuned = loaded(task="instruction_tuning", data={"template": "{source} = {target}"})
    for prompt in ("机器", {"source": "机器"}, {"text": "机器"}):
        assert prompt_ids(tuned, prompt) == [bos, *encode("机器 =").ids]
    two = loaded(task="instruction_tuning", data={"template": "{a} {b}: {c}"})
    assert prompt_ids(two, {"a": "x", "b": "y", "c": "no"}) == [bos, *encode("x y:").ids]
    chats = loaded(task="instruction_tuning", data={"template": None})
    chats.tokenizer.chat_template = CHAT
    for prompt in ("机器", [{"role": "user", "content": "机器"}]):
        expected = tokenizer.encode("<user>机器<|endoftext|><assistant>", add_special_tokens=False)
        assert prompt_ids(chats, prompt) == expected
    # What a run was tuned to do is done by the most probable tokens.
    assert (
        way_of(chats, SamplingConfig()).sampling.temperature
        == 0
        != way_of(model, SamplingConfig()).sampling.temperature
    )
    for wrong, prompt, message in (
        (two, "x", "no 'a', which the template"),
        (tuned, {"other": "x"}, "no 'source', which the template '{source} = {target}' names; there is 'other'"),
        (tuned, [{"role": "user", "content": "x"}], "not on chats; give its fields"),
        (model, {"source": "x"}, "a row with 'source' needs a template"),
        (model, [{"role": "user", "content": "x"}], "no chat template"),
    ):
        with pytest.raises(UserError, match=message):
            prompt_ids(wrong, prompt)


def test_rows_are_read_as_prompts_with_settings_of_their_own(model):
    assert prompt_of({"prompt": "x"}) == prompt_of({"text": "x"}) == "x"
    messages = [{"role": "user", "content": "x"}]
    assert prompt_of({"messages": messages}) == prompt_of({"prompt": messages, "seed": "3"}) == messages
    # What was learnt from is asked anew.
    assert prompt_of({"messages": [*messages, {"role": "assistant", "content": "y"}]}) == messages
    assert prompt_of({"conversations": 0, "source": "x"}) == {"source": "x"}
    with pytest.raises(UserError, match="no prompt: a row has prompt or messages, and this one n"):
        read({"n": 3})
    with pytest.raises(UserError, match="beams='many' is no number; try beams=1"):
        read({"prompt": "x", "beams": "many"})
    rows = [{"id": "1", "prompt": "a", "max_new_tokens": "4"}, {"prompt": "b"}, {"prompt": "a", "max_new_tokens": 4}]
    short, long, again = (found["text"] for found in answers(model, [read(row) for row in rows]))
    assert [short] == model.generate("a", max_new_tokens=4) and len(long) > len(short)


def test_what_is_drawn_for_a_row_depends_on_its_number_in_the_file(model):
    """Not on the chunk that it is read in, nor on rows beside it that are bad."""
    rows = [GENERATE.numbered(read({"prompt": "a", "temperature": 1.0, "max_new_tokens": 8}), at) for at in range(6)]
    whole = [found["text"] for found in answers(model, rows)]
    parts = [found["text"] for begin in (0, 2, 5) for found in answers(model, rows[begin : {0: 2, 2: 5, 5: 6}[begin]])]
    assert parts == whole and len(set(whole)) > 1
    assert [found["text"] for found in answers(model, [rows[4], rows[1]])] == [whole[4], whole[1]]
    with pytest.raises(UserError, match="top_k=inf is no number"):
        read({"prompt": "a", "top_k": float("inf")})


def test_a_server_generates_in_its_own_shapes_alone(model):
    prompts = ["a", "b", "c" * 20]
    expected = model.generate(prompts)
    with fixed_shapes(Shapes([16, 32], [1, 2])):
        assert model.generate(prompts) == expected
        compiled = models.continued._cache_size()
        assert model.generate(prompts[2:] * 3)[0] and models.continued._cache_size() == compiled
        with pytest.raises(UserError, match="ask without settings"):
            model.generate(prompts, max_new_tokens=3)
        with pytest.raises(UserError, match="a prompt of 41 tokens is longer than the 32 taken here"):
            model.generate("d" * 40)


def test_a_server_leaves_room_for_the_prompt():
    model = loaded(GPT)
    with fixed_shapes(Shapes([16, 64], [1])):
        assert model.generate("ab") == model.generate("ab") and GPT.max_position_embeddings == 64
        with pytest.raises(UserError, match="try max_new_tokens|give a shorter prompt"):
            model.generate("ab" * 20)


def test_generation_beyond_the_learned_positions_is_refused():
    model = loaded(GPT)
    with pytest.raises(UserError, match="exceeds the model's 64 positions; try max_new_tokens=61"):
        model.generate("ab", max_new_tokens=100)
    with pytest.raises(UserError, match="give a shorter prompt"):
        model.generate("ab" * 40)
    with pytest.raises(UserError, match="has the head masked_lm and does not generate"):
        dataclasses.replace(model, head="masked_lm").generate("a")


def test_a_second_prompt_of_a_like_length_compiles_nothing(model):
    counts = []
    for prompts in (["a" * 5], ["b" * 9], ["a", "b"], ["c", "dd"], ["e" * 40]):
        model.generate(prompts, max_new_tokens=4, temperature=0.5)
        counts.append(models.continued._cache_size())
    assert [after - before for before, after in zip(counts, counts[1:], strict=False)] == [0, 1, 0, 1]


def test_more_prompts_than_rows_take_turns_in_them(model, monkeypatch):
    """Eleven in four slots, of lengths that are alike and one that is not: each the same as alone, by its number."""
    prompts = ["a" * (9 + n % 4) for n in range(10)] + ["分支。" * 30]
    way = SamplingConfig(max_new_tokens=12, temperature=1.2, stop=("。",))
    expected = generate.generate(model, prompts, way)
    monkeypatch.setattr(generate, "ROWS", 4)
    told = []
    assert generate.generate(model, prompts, way, lambda done, tokens: told.append(done)) == expected
    assert told[-1] == 11 and told == sorted(told) and len(set(expected)) > 8
