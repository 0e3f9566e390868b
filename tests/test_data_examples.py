"""Examples are what the tokenizer makes; batches keep every example and target, and waste little."""

import json
import re

import numpy as np
import pytest
from manpages import man_texts

from espalier.data.examples import Example, LabelledBatches, encode_pairs, fitting_row, tagged, token_span
from espalier.data.tokenizer import framed_tokenizer, special_ids
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError


@pytest.fixture(scope="module")
def tokenizers():
    text = ["some words of a text that is not long but long enough"] * 3
    causal = train_tokenizer(text, "bpe", 400, for_masked_lm=False)
    return {False: train_tokenizer(text, "wordpiece", 300), True: causal}


def test_encoder_examples_are_what_the_tokenizer_makes(tokenizers):
    """The reference is the tokenizer's own template and truncation."""
    tokenizer = tokenizers[False]
    a, b = ["some words", "a text that is not long", ""], ["of a text", "words " * 30, "some"]
    for texts_b, limit in ((None, 8), (None, 64), (b, 64)):
        found = encode_pairs(tokenizer, a, texts_b, limit, causal=False)
        for row, example in enumerate(found):
            expected = tokenizer(
                a[row], texts_b and texts_b[row], truncation=True, max_length=limit, return_token_type_ids=True
            )
            assert example.ids == expected["input_ids"] and example.types == expected["token_type_ids"]


def test_long_pairs_are_cut_to_fit(tokenizers):
    for causal, tokenizer in tokenizers.items():
        for a, b in ((5, 50), (50, 5), (50, 50), (3, 3)):
            texts = ["text " * a], ["words " * b]
            [example] = encode_pairs(tokenizer, *texts, 25, causal)
            whole = [len(encode_pairs(tokenizer, text, None, 999, causal)[0].ids) - 2 for text in texts]
            parts = [example.types.count(0) - 2, example.types.count(1) - 1]
            assert len(example.ids) == len(example.types) == min(25, sum(whole) + 3)
            # The shorter text stays whole while it takes no more than its half.
            for part, size in zip(parts, whole, strict=True):
                assert part == size or part >= 11


def test_causal_examples_end_where_the_classifier_reads(tokenizers):
    ids = special_ids(tokenizers[True])
    single, pair = (encode_pairs(tokenizers[True], ["some"], b, 32, causal=True)[0].ids for b in (None, ["words"]))
    assert single[0] == pair[0] == ids.bos and single[-1] == pair[-1] == ids.eos
    assert sum(token == ids.eos for token in pair) == 1 + sum(token == ids.eos for token in single)


def examples(lengths):
    """Example n holds the token n + 10, `lengths[n]` times."""
    return [
        Example([number + 10] * size, [0] * (size - 1) + [1], of_row={"labels": number % 3})
        for number, size in enumerate(lengths)
    ]


def batches_of(lengths, batch_size, seed=0):
    return LabelledBatches(examples(lengths), batch_size, seed, pad_id=0, max_length=100)


@pytest.mark.parametrize("longest", [1, 16, 17, 65, 97, 100])
def test_rows_hold_the_longest_example_and_little_more(longest):
    for batch in batches_of([longest, 1, longest, 2], 2).fixed():
        assert longest <= batch["input_ids"].shape[1] <= min(longest + 15, 100)


def test_few_row_lengths_and_most_batches_are_short():
    """Each row length is a compilation; a batch with only short examples must not pay for the longest of all."""
    lengths = np.where(np.arange(400) % 100 == 7, 90, np.random.default_rng(0).integers(3, 20, 400))
    batches = batches_of(lengths, 8)
    drawn = [batches.batch(step)["input_ids"].shape[1] for step in range(100)]
    assert len(set(drawn)) == 2 and np.mean(np.array(drawn) < 40) > 0.8


def test_fixed_batches_are_the_file():
    lengths = [3, 40, 5, 7, 2, 90, 4]
    batches = batches_of(lengths, 3)
    fixed = batches.fixed()
    assert [len(batch["input_ids"]) for batch in fixed] == [3, 3, 3]
    number = 0
    for batch in fixed:
        for row in range(3):
            size = lengths[number] if number < len(lengths) else 0
            assert batch["input_ids"][row].tolist() == [number + 10] * size + [0] * (batch["input_ids"].shape[1] - size)
            assert batch["segment_ids"][row].sum() == size and (batch["segment_ids"][row, :size] == 1).all()
            assert batch["row_lengths"][row] == size
            assert batch["positions"][row, :size].tolist() == list(range(size))
            assert batch["token_type_ids"][row].sum() == (size > 0)
            assert batch["example_weights"][row] == (size > 0)
            assert batch["labels"][row] == (number % 3 if size else 0)
            number += 1
    assert {name: array.dtype.name for name, array in fixed[0].items()} == {
        **dict.fromkeys(["input_ids", "segment_ids", "positions", "token_type_ids", "row_lengths", "labels"], "int32"),
        "example_weights": "float32",
    }


def test_rows_of_several_examples_hold_the_same_batches():
    """Every example once, with its targets, as a segment of its own; rows are about equally long, hosts cut them."""
    lengths = np.random.default_rng(1).integers(2, 40, 53)
    of_tokens = [{"tags": np.arange(size)} for size in lengths]
    drawn = [one._replace(of_tokens=tags) for one, tags in zip(examples(lengths), of_tokens, strict=True)]
    settings = dict(batch_size=16, seed=7, pad_id=0, max_length=40)
    packed, single = LabelledBatches(drawn, examples_per_row=4, **settings), LabelledBatches(drawn, **settings)
    pairs = [(packed.batch(step), single.batch(step)) for step in range(8)]
    for batch, alone in [*pairs, *zip(packed.fixed(), single.fixed(), strict=True)]:
        assert "row_lengths" not in batch and "row_lengths" in alone
        assert batch["input_ids"].shape[0] == 4 and batch["labels"].shape == batch["example_weights"].shape == (4, 4)
        found = []
        for row, number in np.argwhere(batch["example_weights"] > 0):
            own = batch["segment_ids"][row] == number + 1
            token = int(batch["input_ids"][row, own][0])
            size = lengths[token - 10]
            assert batch["input_ids"][row, own].tolist() == [token] * size
            assert batch["positions"][row, own].tolist() == batch["tags"][row, own].tolist() == list(range(size))
            assert batch["token_type_ids"][row, own].sum() == 1 and batch["labels"][row, number] == (token - 10) % 3
            found.append(token)
        assert sorted(found) == sorted(alone["input_ids"][alone["example_weights"] > 0, 0])
        assert (batch["segment_ids"] > 0).sum() == (alone["segment_ids"] > 0).sum()
    used = [(batch["segment_ids"] > 0).sum(1) for batch, _ in pairs]
    assert all(row.max() - row.min() <= 12 for row in used)
    widths = [(batch["input_ids"].size, alone["input_ids"].size) for batch, alone in pairs]
    assert sum(width for width, _ in widths) < 0.7 * sum(width for _, width in widths) and packed.fill > 0.8
    whole = packed.batch(2)
    halves = [packed.batch(2, part) for part in (slice(0, 2), slice(2, 4))]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


def test_rows_hold_as_many_examples_as_suit_their_length():
    found = [fitting_row([tokens] * 9, *cut) for tokens, *cut in ((13, 32, 1), (13, 32, 8), (13, 32, 32), (13, 6, 1))]
    assert found == [8, 4, 1, 2]
    assert [fitting_row([tokens] * 9, 32, 1) for tokens in (70, 300)] == [2, 1]


def test_epochs_and_hosts():
    lengths = np.random.default_rng(0).integers(1, 90, 30)
    batches = batches_of(lengths, 6, seed=5)
    epochs = [np.concatenate([batches.batch(epoch * 5 + at)["input_ids"][:, 0] for at in range(5)]) for epoch in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10, 40))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    for step in range(10):
        whole = batches.batch(step)
        parts = [batches_of(lengths, 6, seed=5).batch(step, part) for part in (slice(0, 3), slice(3, 6))]
        for name, array in whole.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    assert batches.batch(0)["example_weights"].tolist() == [1.0] * 6
    with pytest.raises(UserError, match="no labelled examples"):
        LabelledBatches([], 4, pad_id=0, max_length=16)


@pytest.fixture(scope="module")
def real_text(shared_data):
    """Questions with contexts (XQuAD, English) and paragraphs of Chinese manual pages."""
    entries = json.loads((shared_data / "xquad" / "xquad.en.json").read_text())["data"][:3]
    paragraphs = [paragraph for entry in entries for paragraph in entry["paragraphs"]]
    lines = [line for text in man_texts("zh", 40) for line in text.split("\n")]
    chinese = [line for line in lines if re.search("[一-鿿]{9}.*[一-鿿]{9}", line)][:60]
    return paragraphs, chinese


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def real_tokenizer(request, real_text):
    paragraphs, chinese = real_text
    texts = [paragraph["context"] for paragraph in paragraphs] + chinese
    return train_tokenizer(texts, request.param, 1200, for_masked_lm=True)


@pytest.mark.parametrize("causal", [False, True])
def test_offsets_are_those_of_the_tokenizer(real_tokenizer, real_text, causal):
    paragraphs, chinese = real_text
    framed = framed_tokenizer(real_tokenizer, causal)
    texts = [paragraph["context"] for paragraph in paragraphs] + chinese
    questions = [paragraph["qas"][0]["question"] for paragraph in paragraphs] + chinese[::-1]
    asked = dict(return_offsets_mapping=True, return_special_tokens_mask=True)
    for second, limit in ((None, 40), (questions, 2000)):
        found = encode_pairs(real_tokenizer, texts, second, limit, causal, offsets=True)
        plain = encode_pairs(real_tokenizer, texts, second, limit, causal)
        expected = framed(texts, second, truncation=True, max_length=limit, **asked)
        for row, example in enumerate(found):
            assert example[:2] == plain[row][:2] and example.ids == expected["input_ids"][row]
            special = np.array(expected["special_tokens_mask"][row], bool)
            assert example.offsets is not None and (example.offsets[special] == -1).all()
            reference = np.array(expected["offset_mapping"][row])
            np.testing.assert_array_equal(example.offsets[~special], reference[~special])


def test_spans_of_characters_become_tokens(real_tokenizer, real_text):
    """The tokens of an answer hold its text, and without the first or the last of them they do not."""
    paragraphs, chinese = real_text
    rows = [
        (question["question"], paragraph["context"], answer["answer_start"], answer["text"])
        for paragraph in paragraphs
        for question in paragraph["qas"][:2]
        for answer in question["answers"][:1]
    ]
    rows += [("哪里？", line, begin, line[begin : begin + 5]) for line in chinese for begin in (7, 20)]
    rows = [row for row in rows if row[3] and row[3] == row[3].strip()]
    questions, contexts, begins, answers = zip(*rows, strict=True)
    examples = encode_pairs(real_tokenizer, questions, contexts, 4000, False, offsets=True)
    cut = encode_pairs(real_tokenizer, questions, contexts, 40, False, offsets=True)
    lost = 0
    for example, short, context, begin, answer in zip(examples, cut, contexts, begins, answers, strict=True):
        assert context[begin : begin + len(answer)] == answer and example.offsets is not None
        span = token_span(example, begin, begin + len(answer), text=1)
        assert span
        first, last = span
        places = example.offsets[first : last + 1]
        assert places[0, 0] <= begin < places[0, 1] and places[-1, 0] < begin + len(answer) <= places[-1, 1]
        assert (np.array(example.types[first : last + 1]) == 1).all()
        inside = token_span(short, begin, begin + len(answer), text=1)
        assert short.offsets is not None
        whole = short.offsets[np.array(short.types) == 1].max() >= begin + len(answer)
        assert (inside is not None) == whole
        lost += inside is None
    assert 5 < lost < len(rows) - 5


def test_tags_stand_on_first_pieces(real_tokenizer, real_text, shared_data):
    """English: the words and tags of WNUT 2017; Chinese: each character a word, tagged by its code."""
    sentences = (shared_data / "wnut17" / "dev.conll").read_text().split("\n\n")[:60]
    rows = [[line.split("\t") for line in sentence.splitlines() if "\t" in line] for sentence in sentences]
    cases = [(" ".join(word for word, _ in row), [(word, len(tag)) for word, tag in row]) for row in rows if row]
    cases += [(line, [(word, ord(word) % 97) for word in re.findall(r"\w", line)]) for line in real_text[1]]
    shared = 0
    for text, words in cases:
        [example] = encode_pairs(real_tokenizer, [text], None, 400, False, offsets=True)
        spans, end = [], 0
        for word, _ in words:
            begin = text.index(word, end)
            end = begin + len(word)
            spans.append((begin, end))
        found = tagged(example, spans, [tag for _, tag in words])
        labels, weights = found.of_tokens["labels"], found.of_tokens["loss_weights"]
        # By hand: each token's label is that of the first word with a character in it, if the word begins there.
        owner = np.full(len(text), -1)
        for number, (begin, end) in enumerate(spans):
            owner[begin:end] = number
        seen: set[int] = set()
        for token, (begin, end) in enumerate(example.offsets if example.offsets is not None else ()):
            starting = [n for n in dict.fromkeys(owner[max(begin, 0) : max(end, 0)].tolist()) if n >= 0]
            fresh = [n for n in starting if n not in seen]
            seen.update(starting)
            assert weights[token] == bool(fresh)
            assert labels[token] == (words[fresh[0]][1] if fresh else 0)
            shared += len(fresh) > 1
    assert shared < sum(len(words) for _, words in cases) / 2


def test_targets_of_rows_and_tokens_by_name():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40, 13)
    of_row = [
        {
            "labels": int(n),
            "score": n / 3,
            "classes": [n % 2 == 0, n % 3 == 0, True],
            "span": (int(sizes[n]) // 2, int(sizes[n]) - 1),
        }
        for n in range(13)
    ]
    of_tokens = [{"tags": np.arange(size), "loss_weights": np.full(size, 0.5)} for size in sizes]
    examples = [
        Example([7] * size, [0] * size, of_row=row, of_tokens=tokens)
        for size, row, tokens in zip(sizes, of_row, of_tokens, strict=True)
    ]
    batches = LabelledBatches(examples, 4, seed=3, pad_id=0, max_length=64).fixed()
    assert {name: array.dtype.name for name, array in batches[0].items() if name in of_row[0] | of_tokens[0]} == {
        **dict.fromkeys(["labels", "classes", "span", "tags"], "int32"),
        **dict.fromkeys(["score", "loss_weights"], "float32"),
    }
    for number in range(16):
        batch = {name: array[number % 4] for name, array in batches[number // 4].items()}
        if number >= 13:
            assert not any(batch[name].any() for name in of_row[0] | of_tokens[0] | {"example_weights": 0})
            continue
        for name, value in of_row[number].items():
            np.testing.assert_array_equal(batch[name], np.asarray(value, batch[name].dtype))
        for name, values in of_tokens[number].items():
            np.testing.assert_array_equal(batch[name][: sizes[number]], values)
            assert not batch[name][sizes[number] :].any()
