"""The answer to a question out of its context, by the scores of its two ends (Devlin et al. 2019, section 4.2).

A context that is too long is read in windows, each behind the whole question, which overlap. An answer is the span of
one window with the greatest score: the sum of those of its first and last token. That there is none is scored by the
two scores of one token, the first of the row; in a causal model by the last one, the only one that has read all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from espalier.data.examples import Example
from espalier.data.tokenizer import plain_backend, special_ids
from espalier.errors import UserError
from espalier.predict.use import Use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel

STRIDE, ANSWER_TOKENS, BEST = 128, 30, 5
"""Where a model does not say: tokens that two windows share, those of an answer at most, and answers listed."""
CANDIDATES = 20
"""Spans of a window that are looked at, the best ones."""

Asked = tuple[str, str]
"""A question and its context."""


class Window(NamedTuple):
    """A row of the model: a question, and a part of its context."""

    example: Example
    """[CLS] question [SEP] part [SEP]."""
    question: int
    """Number of the question."""
    first: int
    """Which token of the context is the first of the part."""
    begin: int
    """Where in the row it stands."""
    count: int
    """Tokens of the part."""


class Windows(NamedTuple):
    rows: list[Window]
    """In the order of the questions, and of the tokens of each context."""
    contexts: list[np.ndarray]
    """int32 [tokens, 2]: the characters begin … end that each token of a question's context stands for."""
    long: int
    """Questions whose context is read in several windows."""
    cut: int
    """Questions that were too long, and lost tokens from their end."""


class Answering(NamedTuple):
    """How answers are looked for."""

    max_length: int
    stride: int = STRIDE
    answer_tokens: int = ANSWER_TOKENS
    n_best: int = BEST
    threshold: float | None = None
    """No answer is given where `no_answer` is above it; None = there always is one."""

    @classmethod
    def of(cls, model: LoadedModel) -> Answering:
        """As the model was fine-tuned, or by default."""
        data = model.saved.get("data") or {}
        found = {name: data[name] for name in ("stride", "answer_tokens", "n_best") if data.get(name) is not None}
        threshold = (model.saved.get("tuned") or {}).get("no_answer_threshold")
        if threshold is None and model.saved.get("no_answer"):
            threshold = 0.0
        return cls(model.longest, threshold=threshold, **found)


def windows_of(
    tokenizer: PreTrainedTokenizerFast, asked: Sequence[Asked], max_length: int, stride: int, causal: bool
) -> Windows:
    """Rows of at most max_length tokens that together hold every token of each context.

    Causal models read bos question eos context eos. stride: tokens that a window shares with the one before, at most
    half of a window. A question keeps at most half of the row.
    """
    backend = plain_backend(tokenizer)
    specials = special_ids(tokenizer, need=("bos", "eos") if causal else ("cls", "sep"))
    first, between = (specials.bos, specials.eos) if causal else (specials.cls, specials.sep)
    assert first is not None and between is not None
    room = max_length - 3
    if room < 2:
        raise UserError(f"max_length={max_length} leaves no room for a question and its context; give at least 8")
    # Many questions are on one context.
    texts = list(dict.fromkeys(context for _, context in asked))
    encoded = dict(zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True))
    questions = backend.encode_batch_fast([question for question, _ in asked], add_special_tokens=False)
    ids_of = {text: found.ids for text, found in encoded.items()}
    offsets = {text: np.array(found.offsets, np.int32).reshape(-1, 2) for text, found in encoded.items()}
    rows, long, cut = [], 0, 0
    for number, ((_, context), question) in enumerate(zip(asked, questions, strict=True)):
        kept, ids = question.ids[: room // 2], ids_of[context]
        size = room - len(kept)
        step = max(size - stride, size - size // 2)
        begin = len(kept) + 2
        starts = range(0, max(len(ids) - size, 0) + step, step)
        for start in starts:
            part = ids[start : start + size]
            # Arrays, for there may be some hundred thousand windows.
            example_ids = np.array([first, *kept, between, *part, between], np.int32)
            types = np.repeat(np.array([0, 1], np.int8), (begin, len(part) + 1))
            rows.append(Window(Example(example_ids, types), number, start, begin, len(part)))
        long += len(starts) > 1
        cut += len(kept) < len(question.ids)
    return Windows(rows, [offsets[context] for _, context in asked], long, cut)


def no_answer_place(window: Window, causal: bool) -> int:
    """The token of the row by which a model says that the window has no answer."""
    return len(window.example.ids) - 1 if causal else 0


class Found(NamedTuple):
    """What the scores of a question's windows say."""

    context: str
    spans: list[tuple[int, int]]
    """Characters begin … end of each candidate, the best first."""
    score_S: np.ndarray
    """Sum of the scores of both ends, float64."""
    none: float
    """The score that there is no answer: the least over the windows, each of which may well hold none."""

    @property
    def best(self) -> str:
        """The best span; "" where the context has no tokens."""
        return self.context[slice(*self.spans[0])] if self.spans else ""

    @property
    def no_answer(self) -> float:
        """How much the score of no answer is above that of the best span."""
        return float(self.none - self.score_S[0]) if self.spans else float(np.finfo(np.float32).max)


def find_answers(
    model: LoadedModel, asked: Sequence[Asked], how: Answering, windows: Windows | None = None
) -> list[Found]:
    """The candidates of each question. windows: those of the questions, where they are there already."""
    if windows is None:
        windows = windows_of(model.tokenizer, asked, how.max_length, how.stride, model.config.causal)
    spans: list[dict[tuple[int, int], float]] = [{} for _ in asked]
    none = np.full(len(asked), np.inf)
    scores = model.outputs_of_head([window.example for window in windows.rows])
    for window, scores_T2 in zip(windows.rows, scores, strict=True):
        number, context = window.question, asked[window.question][1]
        none[number] = min(none[number], scores_T2[no_answer_place(window, model.config.causal)].sum())
        for span, score in _spans(window, scores_T2, context, windows.contexts[number], how.answer_tokens):
            spans[number][span] = max(score, spans[number].get(span, -np.inf))
    found = []
    for (_, context), of_question, least in zip(asked, spans, none, strict=True):
        order = sorted(of_question, key=lambda span: (-of_question[span], span))
        found.append(Found(context, order, np.array([of_question[span] for span in order]), float(least)))
    return found


def result_of(found: Found, how: Answering) -> dict[str, Any]:
    """The result of `answer` for one question."""
    entries: list[dict[str, Any]] = [
        {"answer": found.context[begin:end], "begin": begin, "end": end} for begin, end in found.spans
    ]
    scores = found.score_S
    if how.threshold is not None or not entries:
        at = int(np.searchsorted(-scores, -found.none))
        entries.insert(at, {"answer": "", "begin": None, "end": None})
        scores = np.insert(scores, at, found.none)
    share = np.exp(scores - scores.max())
    best = [{**entry, "score": float(part)} for entry, part in zip(entries, share / share.sum(), strict=True)]
    empty = not found.spans or (how.threshold is not None and found.no_answer > how.threshold)
    chosen = next(entry for entry in best if (entry["answer"] == "") == empty)
    result = {name: chosen[name] for name in ("answer", "score", "begin", "end")}
    return result | ({} if how.threshold is None else {"no_answer": found.no_answer}) | {"n_best": best[: how.n_best]}


def _spans(
    window: Window, scores_T2: np.ndarray, context: str, offsets: np.ndarray, answer_tokens: int
) -> list[tuple[tuple[int, int], float]]:
    """((begin, end), score) of the best spans of a window, as characters of the context without blanks around them."""
    count, begin = window.count, window.begin
    starts_C, ends_C = scores_T2[begin : begin + count].astype(np.float64).T
    longest = min(answer_tokens, count)
    if not count:
        return []
    score_LC = np.full((longest, count), -np.inf)
    for more in range(longest):
        score_LC[more, : count - more] = starts_C[: count - more] + ends_C[more:]
    flat = score_LC.ravel()
    best = np.argpartition(-flat, CANDIDATES - 1)[:CANDIDATES] if flat.size > CANDIDATES else np.arange(flat.size)
    found = []
    for index in best:
        more, at = divmod(int(index), count)
        if np.isfinite(flat[index]):
            left, right = int(offsets[window.first + at, 0]), int(offsets[window.first + at + more, 1])
            text = context[left:right]
            left, right = left + len(text) - len(text.lstrip()), right - len(text) + len(text.rstrip())
            if left < right:
                found.append(((left, right), float(flat[index])))
    return found


def read(row: Mapping[str, Any]) -> Asked:
    question, context = row.get("question"), row.get("context")
    if not (isinstance(question, str) and isinstance(context, str) and question.strip() and context.strip()):
        raise UserError(f"no question with its context: a row has both, and this one {', '.join(row) or 'nothing'}")
    return question, context


def answer(model: LoadedModel, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """`answer`, `score`, `begin`, `end` and `n_best` (the same of the best ones) of each.

    begin, end: characters of the context. score: the share of the answer among the candidates (softmax over the
    CANDIDATES best spans of each window). Of a model that may find none, also `no_answer`: the score that there is
    none less the best span's; where it is above the model's threshold, the answer is "" and has no begin and end.
    """
    how = Answering.of(model)
    return [result_of(found, how) for found in find_answers(model, asked, how)]


ANSWER = Use(
    name="answer",
    takes="question and context",
    reads=read,
    answers=answer,
    example={
        "question": "Where does the Danube rise?",
        "context": "The Danube rises in the Black Forest and flows through ten countries to the Black Sea.",
    },
)
