"""Stops: a table for the program against a search of the text, over vocabularies that cut characters and words."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from tiny_models import LLAMA, random_params, strict_and_quick  # noqa: F401
from tiny_runs import write_run

from espalier.commands import predict
from espalier.commands.asked_model import stopping
from espalier.data.token_bytes import byte_alphabet, token_bytes
from espalier.data.tokenizer import plain_backend, vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models import generate as models
from espalier.predict import generate
from espalier.predict.classify import CLASSIFY
from espalier.predict.generate import GENERATE, read, stream, way_of
from espalier.predict.loaded import LoadedModel
from espalier.predict.outputs import Shapes, fixed_shapes
from espalier.predict.sampling import SamplingConfig
from espalier.predict.stops import before_stop, stop_table

TEXTS = ["机器学习是人工智能的一个分支。END of it, e.g. 学习 = a + b\n\nQ: 是什么？"]


@functools.cache
def tokenizer(kind):
    return train_tokenizer(TEXTS * 9, kind, 300, for_masked_lm=kind == "wordpiece")


def ended_at(table, ids):
    """How many tokens there are up to the one that completes a stop; None = none does."""
    state = 0
    for count, token in enumerate(ids, 1):
        state = int(table[state, token])
        if state < 0:
            return count
    return None


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_the_table_finds_what_a_search_of_the_text_finds(kind):
    """Two thousand texts of random tokens; stops of one character, of several tokens, and of parts of each other."""
    made = tokenizer(kind)
    draw, size = np.random.default_rng(0), vocabulary_size(made)
    first = plain_backend(made).encode("a", add_special_tokens=False).ids
    pieces = [index for index in range(size) if index not in made.all_special_ids]
    likely = plain_backend(made).encode(TEXTS[0], add_special_tokens=False).ids
    found = 0
    for stops in (["。"], ["学习"], ["END", "ND of"], ["a + b", " b", "+ b\n"], ["什么？"], ["\n\n"]):
        if kind == "wordpiece" and "\n" in "".join(stops):
            continue  # it has no line breaks
        table = stop_table(made, stops, size)
        assert table.dtype == np.int16 and table.shape == (16, size)
        for _ in range(350):
            ids = [int(token) for token in draw.choice(pieces if draw.random() < 0.3 else likely, 24)]
            if draw.random() < 0.5:
                at = int(draw.integers(len(likely) - 8))
                ids[8:16] = likely[at : at + 8]
            text = str(made.decode([*first, *ids]))[len(made.decode(first)) :]
            count = ended_at(table, ids)
            assert (count is not None) == any(stop in text for stop in stops), (stops, text)
            if count is not None:
                found += 1
                before = str(made.decode([*first, *ids[: count - 1]]))[len(made.decode(first)) :]
                assert not any(stop in before for stop in stops)
    assert found > 100


def test_bytes_of_tokens_are_those_of_the_text():
    """A character of three bytes in three tokens is known where its last byte comes; special tokens are their names."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == bytes_to_unicode()
    made = tokenizer("bpe")
    known = token_bytes(made)
    for text in (*TEXTS, "🤖 é\t<|endoftext|>"):
        ids = plain_backend(made).encode(text, add_special_tokens=False).ids
        assert b"".join(known[index] for index in ids) == text.encode()
    assert known[made.eos_token_id] == b"<|endoftext|>"
    robot = plain_backend(made).encode("🤖!", add_special_tokens=False).ids
    assert len(robot) > 3
    table = stop_table(made, ["🤖"], vocabulary_size(made))
    assert ended_at(table, robot) == len(robot) - 1 and ended_at(table, robot[1:]) is None
    # What has been matched is not lost where the same bytes begin anew.
    again = plain_backend(made).encode("🤖", add_special_tokens=False).ids
    assert ended_at(table, [*again[:-1], *again]) == 2 * len(again) - 1
    assert before_stop("a ENDE", ["E", "ND"]) == "a " and before_stop("a", ["b"]) == "a"


def test_bytes_of_a_vocabulary_with_byte_fallback():
    """As Llama 2 and Gemma write them: ▁ for a blank, <0xE6> for a byte that no token has."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "▁", "▁b", "é"]
    backend = Tokenizer(BPE({name: at for at, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    known = token_bytes(made)
    assert known[names.index("▁b")] == b" b" and known[names.index("<0xE6>")] == b"\xe6" and known[1] == b"<s>"
    ids = [names.index(f"<0x{byte:02X}>") for byte in "学".encode()]
    assert ended_at(stop_table(made, ["学"], len(names)), [names.index("a"), *ids]) == 4


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(LLAMA, vocab_size=vocabulary_size(tokenizer("bpe")))
    return LoadedModel(config, random_params(config, ("causal_lm",)), tokenizer("bpe"), "causal_lm", {})


def test_a_text_ends_before_its_stop_and_nothing_is_drawn_after_it(model):
    """At once, in a stream and among rows that go on; ids are kept with the token that completed the stop."""
    way = SamplingConfig(max_new_tokens=40, temperature=1.2, seed=3)
    prompts = ["a", "学习", "b = "]
    free = generate.generate(model, prompts, way)
    at = next(at for at in range(4, len(free[0]) - 2) if free[0][at : at + 2] not in free[0][: at + 1])
    stop = free[0][at : at + 2]
    ended = dataclasses.replace(way, stop=(stop,))
    assert generate.generate(model, prompts, ended) == [before_stop(text, [stop]) for text in free]
    assert "".join(piece for piece, _ in stream(model, "a", ended)) == free[0][:at]
    how = way_of(model, ended)
    given = (model.config, model.params, [generate.prompt_ids(model, "a")], jax.random.key(3), how.sampling)
    drawn = models.generate(*given, stops=generate.stops_of(model, how))
    whole = models.generate(*given)
    count = int((drawn.tokens_BG >= 0).sum())
    np.testing.assert_array_equal(drawn.tokens_BG[0, :count], whole.tokens_BG[0, :count])
    assert drawn.ended_B[0] and count < (whole.tokens_BG >= 0).sum()
    text = generate.decoded(model, given[2][0], drawn.tokens_BG[0, :count].tolist())
    assert stop in text and stop not in generate.decoded(model, given[2][0], drawn.tokens_BG[0, : count - 1].tolist())
    assert drawn.logprobs_BG[0, count - 1] < 0 and not drawn.logprobs_BG[0, count:].any()


def test_other_stops_compile_nothing(model):
    model.generate("a", max_new_tokens=9, stop=["。"])
    before = models.continued._cache_size()
    for stop in (["b", "是什么"], ["x" * 14], ["\n"]):
        model.generate("b", max_new_tokens=9, stop=stop)
    assert models.continued._cache_size() == before


def test_a_server_takes_stops_of_each_request(model):
    """The field of a row, or what --stop gives to all that name none; no program is compiled for them."""
    [free] = model.generate(["a"])
    stop = free[5:7]
    use = stopping(GENERATE, (stop,))
    with fixed_shapes(Shapes([16], [1])):
        assert model.generate(["a"]) == [free]
        compiled = models.continued._cache_size()
        [found] = use.answers(model, [use.reads({"prompt": "a"})])
        assert found["text"] == before_stop(free, [stop]) != free
        [other] = use.answers(model, [use.reads({"prompt": "a", "stop": [free[9], free[2]]})])
        assert other["text"] == before_stop(free, [free[9], free[2]])
        assert models.continued._cache_size() == compiled
        with pytest.raises(UserError, match="longer than the 63 bytes that there is room for here"):
            model.generate(["a"], stop=["学习" * 15])
    with pytest.raises(UserError, match="--stop is for models that write, and this one does classify; leave it out"):
        stopping(CLASSIFY, ("x",))


def test_predict_takes_stops_by_a_flag_and_by_a_column(tmp_path):
    run = write_run(tmp_path / "run", LLAMA, TEXTS * 9)
    rows = [{"prompt": "a", "max_new_tokens": 30}, {"prompt": "a", "max_new_tokens": 30, "stop": "\u0000"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = predict.PredictData(files=(str(tmp_path / "rows.jsonl"),))
    texts: list[list[str]] = []
    for _ in range(2):
        output, stop = tmp_path / "found.jsonl", (texts[0][0][5:7], texts[0][0][3]) if texts else ()
        predict.main(predict.PredictConfig(str(run), data=data, output=str(output), stop=stop))
        texts.append([json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()])
    # Each row has a number of its own; the second names another stop.
    assert texts[1] == [before_stop(texts[0][0], stop), texts[0][1]] and len(texts[1][0]) <= 3


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (("",), "an empty text, at which nothing can end"),
        (("\udce9",), "holds bytes that are not valid text"),
        (("x" * 200, "y" * 60), "have 260 bytes together, at most 256"),
    ],
)
def test_stops_that_will_not_do_are_refused(stop, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(stop=stop)
    with pytest.raises(UserError, match="stop=3 is no text and no list of texts; try stop=END"):
        read({"prompt": "x", "stop": 3})


def test_a_table_by_brute_force():
    """Every text of up to five of three tokens, against a search: tokens a, ab and b with the stops aba and bb."""

    class Words:
        """The bytes are given by hand."""

    from espalier.predict import stops as of_stops

    words = ["a", "ab", "b"]
    original = of_stops._bytes_of
    of_stops._bytes_of = lambda made: [word.encode() for word in words]
    try:
        table = stop_table(Words(), ["aba", "bb"], 3)  # type: ignore[arg-type]
    finally:
        of_stops._bytes_of = original
    for length in range(1, 6):
        for ids in itertools.product(range(3), repeat=length):
            parts = ["".join(words[index] for index in ids[:count]) for count in range(1, length + 1)]
            expected = next((count for count, text in enumerate(parts, 1) if "aba" in text or "bb" in text), None)
            assert ended_at(table, ids) == expected
