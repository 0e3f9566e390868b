"""Questions as rows of the model: which are learnt from, on which a threshold is chosen, which are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from espalier import progress
from espalier.data.examples import Example
from espalier.errors import UserError
from espalier.predict.answer import Asked, Windows, no_answer_place, windows_of
from espalier.progress import plural
from finetune.config import max_length
from finetune.tasks.answer.metrics import Unit, unit_of
from finetune.tasks.answer.questions import Question, QuestionFile, read_questions, split_by_article

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.config import ModelConfig
    from finetune.tasks.answer.record import AnswerData


class Part(NamedTuple):
    """Questions and their windows."""

    questions: list[Question]
    windows: Windows
    rows: list[Example]
    """Of the windows, with the target `span`: first and last token of the answer in the row, or the token that stands
    for none twice."""
    split: int
    """Answers that are whole in no window."""
    longest: int
    """Tokens of the longest answer."""

    @property
    def asked(self) -> list[Asked]:
        return [(question.question, question.context) for question in self.questions]

    @property
    def answers(self) -> list[tuple[str, ...]]:
        return [question.answers for question in self.questions]


class Parts(NamedTuple):
    train: Part
    tuning: Part | None
    """To choose the no-answer threshold on; None where every question of the training file has an answer."""
    validation: Part
    unit: Unit
    fingerprints: dict[str, str]
    facts: list[str]
    about: dict[str, str]


def read_parts(data: AnswerData, tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> Parts:
    """The files, divided and encoded. UserError where they will not do."""
    if data.holdout is not None and data.validation is not None:
        raise UserError("both data.validation and data.holdout are given; measure on a file or on a part of train")
    train, fingerprints = _opened(data, "train"), {}
    fingerprints["train"], notes = train.fingerprint, train.notes
    learnt, measured_on = train.questions, data.validation
    if data.holdout is not None:
        learnt, held = split_by_article(train.questions, data.holdout)
        measured_on = f"{data.train} (held out)"
    elif data.validation is None:
        raise UserError("no --data.validation FILE given: name questions to measure on, or give --data.holdout 0.2")
    else:
        validation = _opened(data, "validation")
        held, fingerprints["validation"] = validation.questions, validation.fingerprint
        notes = (*notes, *validation.notes)
    tuning: list[Question] = []
    if not all(question.answers for question in learnt):
        advice = f"{data.train} has questions without an answer, whose threshold is chosen apart: add another context"
        learnt, tuning = split_by_article(learnt, data.threshold_part, advice)
    if not any(question.answers for question in learnt):
        raise UserError(f"{data.train}: no question has an answer, so that there is nothing to learn; give some")
    unit = unit_of_file(data, held)
    length = max_length(data, model)
    parts = [part_of(questions, tokenizer, length, data.stride, model.causal) for questions in (learnt, held)]
    apart = part_of(tuning, tokenizer, length, data.stride, model.causal) if tuning else None
    facts = list(dict.fromkeys(notes))
    for name, part in zip((data.train, measured_on), parts, strict=True):
        facts += facts_of(str(name), part, length, data.stride, data.answer_tokens)
    if tuning and (lacking := lacks(tuning)):
        facts.append(
            f"no question of the {len(tuning):,} on which the no-answer threshold is chosen has {lacking}: it stays 0, "
            "where both are as likely; raise --data.threshold-part"
        )
    if model.causal:
        facts.append("a causal model scores the begin of an answer before it reads on; an encoder (mlm) answers better")
    about = {"training": _words(str(data.train), learnt), "validation": _words(str(measured_on), held)}
    if tuning:
        about["threshold"] = f"chosen on {_words('a part of train that is not learnt from', tuning)}"
    about["scored by"] = unit_words(data, unit)
    return Parts(parts[0], apart, parts[1], unit, fingerprints, facts, about)


def read_validation(
    data: AnswerData, tokenizer: PreTrainedTokenizerFast, length: int, causal: bool
) -> tuple[Part, Unit]:
    """The validation file alone; without one, the part that is held out of the training file."""
    if data.validation is None and data.holdout is not None:
        _, questions = split_by_article(_opened(data, "train").questions, data.holdout)
    else:
        questions = _opened(data, "validation").questions
    return part_of(questions, tokenizer, length, data.stride, causal), unit_of_file(data, questions)


def part_of(
    questions: list[Question], tokenizer: PreTrainedTokenizerFast, length: int, stride: int, causal: bool
) -> Part:
    """The windows of questions, with their targets; windows that do not hold the whole answer have none."""
    with progress.waiting(f"tokenizing {len(questions):,} questions"):
        asked = [(question.question, question.context) for question in questions]
        windows = windows_of(tokenizer, asked, length, stride, causal)
    spans = [_tokens(question, offsets) for question, offsets in zip(questions, windows.contexts, strict=True)]
    rows, whole = [], set()
    for window in windows.rows:
        target, span = (no_answer_place(window, causal),) * 2, spans[window.question]
        if span and window.first <= span[0] and span[1] < window.first + window.count:
            whole.add(window.question)
            target = tuple(token - window.first + window.begin for token in span)
        rows.append(window.example._replace(of_row={"span": target}))
    with_answer = sum(bool(question.answers) for question in questions)
    longest = max((span[1] - span[0] + 1 for span in spans if span), default=0)
    return Part(questions, windows, rows, with_answer - len(whole), longest)


def _tokens(question: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token of the first answer, among those of the context; None where there is none."""
    if not question.answers:
        return None
    begin, end = question.begins[0], question.begins[0] + len(question.answers[0])
    found = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin))
    return (int(found[0]), int(found[-1])) if len(found) else None


def lacks(questions: Sequence[Question]) -> str | None:
    """Which kind of question is not there: of those that have "an answer", and of those that have "none"."""
    kinds = {bool(question.answers) for question in questions}
    return None if len(kinds) == 2 else "none" if True in kinds else "an answer"


def unit_of_file(data: AnswerData, questions: Sequence[Question]) -> Unit:
    if data.score_by != "auto":
        return data.score_by
    return unit_of(dict.fromkeys(question.context for question in questions))


def unit_words(data: AnswerData, unit: Unit) -> str:
    if data.score_by != "auto":
        return f"{unit} (--data.score-by)"
    most = "have no blanks between words" if unit == "characters" else "are of scripts with blanks between words"
    return f"{unit}, for most letters of the contexts {most}"


def facts_of(name: str, part: Part, length: int, stride: int, answer_tokens: int) -> list[str]:
    """What was cut and divided, a sentence each."""
    found, windows = [], part.windows
    if windows.long:
        found.append(
            f"{name}: {windows.long:,} of {len(part.questions):,} questions do not fit {length} tokens with their "
            f"context; all of it is read, in {len(windows.rows):,} windows that share {stride} tokens (at most half)"
        )
    if windows.cut:
        found.append(f"{name}: {windows.cut:,} questions are longer than half a row and lose tokens from their end")
    if part.split:
        found.append(
            f"{name}: {part.split:,} answers are whole in no window and count as none in training; raise --data.stride "
            "or --data.max-length"
        )
    if part.longest > answer_tokens:
        found.append(
            f"{name}: the longest answer has {part.longest} tokens, and none of more than {answer_tokens} is given; "
            "raise --data.answer-tokens"
        )
    return found


def _words(name: str, questions: Sequence[Question]) -> str:
    """FILE: 952 questions on 240 contexts in 38 articles, 12 without an answer."""
    contexts, titles = ({getattr(question, key) for question in questions} for key in ("context", "title"))
    none = sum(not question.answers for question in questions)
    articles = f" in {plural(len(titles), 'article')}" if titles != {""} else ""
    return f"{name}: {plural(len(questions), 'question')} on {plural(len(contexts), 'context')}{articles}" + (
        f", {none:,} without an answer" if none else ""
    )


def _opened(data: AnswerData, name: str) -> QuestionFile:
    """The file that is named `train` or `validation`."""
    with data.opening(name, "questions with answers (SQuAD's .json, .jsonl, hf:…)") as path:
        return read_questions(path, data.encoding)
