"""Question answering: windows lose no token of a context, and the best spans are those of all."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from espalier.data.tokenizer import framed_tokenizer
from espalier.data.train_tokenizer import train_tokenizer
from espalier.predict.answer import Answering, Found, find_answers, result_of, windows_of
from finetune.tasks.answer.examples import facts_of, part_of
from finetune.tasks.answer.questions import read_questions

TEXTS = ["some words of a text that is not long but long enough to learn from , 北京大学在中国 。"] * 3


@pytest.fixture(scope="module")
def tokenizers():
    return {
        False: train_tokenizer(TEXTS, "wordpiece", 300),
        True: train_tokenizer(TEXTS, "bpe", 400, for_masked_lm=False),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "stride"), [(16, 0), (16, 3), (16, 128), (33, 5), (64, 32)])
def test_windows_lose_no_token_of_a_context(tokenizers, causal, length, stride):
    """As transformers #2548 did, where windows went on by more than they held."""
    tokenizer = tokenizers[causal]
    words = ["words of 北京大学", " a text that is not long", "long " * 30]
    asked = [(words[n % 3], "some words 在中国 of " * size) for n, size in enumerate([0, 1, 2, 3, 5, 9, 14, 25])]
    found = windows_of(tokenizer, asked, length, stride, causal)
    framed, several = framed_tokenizer(tokenizer, causal), 0
    for number, (_, context) in enumerate(asked):
        ids = framed(context, add_special_tokens=False)["input_ids"]
        rows = [row for row in found.rows if row.question == number]
        seen = [range(row.first, row.first + row.count) for row in rows]
        assert sorted({at for part in seen for at in part}) == list(range(len(ids)))
        for row in rows:
            assert len(row.example.ids) == len(row.example.types) <= length
            part = row.example.ids[row.begin : row.begin + row.count].tolist()
            assert part == ids[row.first : row.first + row.count] and row.example.types[row.begin :].all()
        for before, after in zip(seen, seen[1:], strict=False):
            # As many are shared as asked for, but at most half of a window.
            assert before.stop - after.start == min(stride, len(before) // 2)
        several += len(rows) > 1
    assert found.long == several > 1 and (length > 33 or found.cut >= 2)


@pytest.mark.parametrize("causal", [False, True])
def test_windows_are_those_of_the_tokenizer(tokenizers, causal):
    """The reference is its own truncation with a stride, by which transformers' examples train."""
    question, context = "some words 北京", "some words of a text 在中国 that is not long " * 9
    rows = windows_of(tokenizers[causal], [(question, context)], 30, 8, causal).rows
    expected = framed_tokenizer(tokenizers[causal], causal)(
        *(question, context), truncation="only_second", max_length=30, stride=8, return_overflowing_tokens=True,
        return_token_type_ids=True,
    )  # fmt: skip
    assert [row.example.ids.tolist() for row in rows] == expected["input_ids"] and len(rows) > 3
    assert [row.example.types.tolist() for row in rows] == expected["token_type_ids"]


def test_each_window_has_the_whole_answer_or_none(tokenizers, tmp_path):
    """Tokens back to text, against the text itself; Chinese, blanks and accents included."""
    contexts = ["some words of Café  that is not long . " * 4, "北京大学在中国 。 long 北京 text " * 5]
    answers = [("Café", 0), ("long .", 1), ("words of", 3), ("北京大学", 2), ("text", 4), ("在中国 。", 1)]
    rows = []
    for number, (answer, nth) in enumerate(answers):
        context = contexts[number // 3]
        at = [i for i in range(len(context)) if context.startswith(answer, i)][nth]
        rows.append({"question": "some text", "context": context, "answers": {"text": [answer], "answer_start": [at]}})
    path = tmp_path / "flat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(str(path)).questions
    assert [question.name for question in questions] == [f"{path}:{line}" for line in range(1, 7)]
    for causal, tokenizer in tokenizers.items():
        part = part_of(questions, tokenizer, 24, 10, causal)
        whole = {number: 0 for number in range(6)}
        for window, row in zip(part.windows.rows, part.rows, strict=True):
            first, last = row.of_row["span"]
            none = len(row.ids) - 1 if causal else 0
            begin = questions[window.question].begins[0]
            end = begin + len(questions[window.question].answers[0])
            offsets = part.windows.contexts[window.question][window.first :][: window.count]
            if first == none:
                assert last == none and (begin < offsets[0, 0] or end > offsets[-1, 1])
            else:
                whole[window.question] += 1
                context = questions[window.question].context
                left, right = int(offsets[first - window.begin, 0]), int(offsets[last - window.begin, 1])
                text, answer = context[left:right].strip(), questions[window.question].answers[0]
                # Pieces of a byte-level tokenizer may hold more than the answer does.
                assert text == answer or (causal and answer in text)
        assert all(whole.values()) and part.split == 0 and part.windows.long == 6
        # Said to people, with how many there are.
        facts = facts_of("F", part, 24, 10, 2)
        assert "F: 6 of 6 questions do not fit 24 tokens" in facts[0] and "the longest answer has" in facts[1]
        narrow = part_of(questions, tokenizer, 8, 0, causal)
        facts = " ".join(facts_of("F", narrow, 12, 0, 30))
        assert narrow.split > 0 and f"F: {narrow.split} answers are whole in no window" in facts


def test_best_spans_are_those_of_all(tokenizers):
    """Against trying every pair of tokens in every window, for scores drawn at random."""
    tokenizer, rng = tokenizers[False], np.random.default_rng(0)
    asked = [("some text", "some words of a text 北京 that is not long but long enough " * 2)]
    windows = windows_of(tokenizer, asked, 20, 5, False)
    scores = [rng.normal(size=(len(row.example.ids), 2)).astype(np.float32) for row in windows.rows]
    model = SimpleNamespace(outputs_of_head=lambda examples: scores, config=SimpleNamespace(causal=False))
    [found] = find_answers(model, asked, Answering(20, answer_tokens=4), windows)
    expected: dict = {}
    for row, score_T2 in zip(windows.rows, scores, strict=True):
        for first in range(row.begin, row.begin + row.count):
            for last in range(first, min(first + 4, row.begin + row.count)):
                tokens = [row.first + at - row.begin for at in (first, last)]
                span = (int(windows.contexts[0][tokens[0], 0]), int(windows.contexts[0][tokens[1], 1]))
                expected[span] = max(expected.get(span, -np.inf), float(score_T2[first, 0]) + float(score_T2[last, 1]))
    order = sorted(expected, key=lambda span: -expected[span])[:20]
    assert len(windows.rows) > 2 and found.spans[:20] == order
    np.testing.assert_allclose(found.score_S[:20], [expected[span] for span in order], rtol=1e-6)
    assert found.none == min(score_T2[0].sum() for score_T2 in scores)


def test_no_answer_is_given_above_the_threshold():
    found = Found("Ann has it", [(0, 3), (0, 7)], np.array([2.0, 1.0]), 2.5)
    always, never = (result_of(found, Answering(64, threshold=at)) for at in (0.6, 0.4))
    assert (always["answer"], always["begin"], always["end"], always["no_answer"]) == ("Ann", 0, 3, 0.5)
    assert (never["answer"], never["begin"], never["end"]) == ("", None, None)
    share = np.exp([2.5, 2.0, 1.0]) / np.exp([2.5, 2.0, 1.0]).sum()
    assert [best["answer"] for best in never["n_best"]] == ["", "Ann", "Ann has"]
    assert [best["score"] for best in never["n_best"]] == pytest.approx(share)
    without = result_of(found, Answering(64))
    assert "no_answer" not in without and without["score"] == pytest.approx(np.e / (1 + np.e))
    blank = result_of(Found(" ", [], np.array([]), -1.0), Answering(64))
    assert blank["answer"] == "" and blank["begin"] is None
