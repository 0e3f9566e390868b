"""Files that say which of two answers is better, or whether one is good: what `reward` and `prefer` learn from.

{"prompt": …, "chosen": …, "rejected": …}           texts, or messages (role, content); without prompt whole texts, or
                                                    chats whose first messages, which both have, are the prompt
{"prompt": …, "completions": […], "scores": […]}    scored lists: each two answers with different scores are a pair
{"prompt": …, "completion": …, "label": true}       unpaired: an answer that is good, or not
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from espalier.data.chat import ASSISTANT, Message, messages_of
from espalier.data.encodings import codec
from espalier.data.records import Record
from espalier.data.tables import read_table
from espalier.errors import UserError

if TYPE_CHECKING:
    from finetune.config import FinetuneData

PROMPTS = ("prompt", "question", "instruction", "input", "query")
LISTS = ("completions", "responses", "answers")
SCORES = ("scores", "ratings", "rewards")
ANSWERS = ("completion", "response", "answer", "text")
LABELS = ("label", "desirable", "good")
WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

Said = str | Sequence[Message]
"""A text, or messages."""


class Pair(NamedTuple):
    """A prompt with two answers."""

    place: str
    """Where it was read: `file:line`."""
    prompt: Said
    """"" where there is none."""
    chosen: Said
    rejected: Said


class Verdict(NamedTuple):
    """A prompt with one answer."""

    place: str
    prompt: Said
    answer: Said
    good: bool


class Preferences(NamedTuple):
    """What one file holds: pairs, or verdicts."""

    path: str
    pairs: list[Pair]
    verdicts: list[Verdict]
    fingerprint: str
    facts: tuple[str, ...]
    """What was taken for what and left out, a line each."""


def read_preferences(data: FinetuneData, side: str) -> Preferences:
    """The preferences in `train` or `validation`. UserError where the file will not do."""
    what = "pairs (.jsonl, .csv, .parquet, hf:…) with prompt, chosen and rejected"
    with data.opening(side, what) as path:
        table = read_table(path, codec(data.encoding))
    columns = list(dict.fromkeys(name for record in table.records for name in record.columns))

    def there(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in columns), None)

    prompt = there(PROMPTS)
    pairs: list[Pair] = []
    verdicts: list[Verdict] = []
    if {"chosen", "rejected"} <= set(columns):
        pairs = [_pair(record, prompt) for record in table.records]
        form = "pairs of 'chosen' and 'rejected'" + (f", behind {prompt!r}" if prompt else "")
    elif (answers := there(LISTS)) and (scores := there(SCORES)):
        pairs = [pair for record in table.records for pair in _of_list(record, prompt, answers, scores)]
        form = f"each two of {answers!r} with different {scores!r} are a pair"
    elif (answer := there(ANSWERS)) and (label := there(LABELS)):
        verdicts = [_verdict(record, prompt, answer, label) for record in table.records]
        good = sum(verdict.good for verdict in verdicts)
        form = f"single answers in {answer!r}, {good:,} of {len(verdicts):,} good by {label!r}"
    else:
        raise UserError(
            f"{path} has {', '.join(map(repr, columns))}; preferences have 'chosen' and 'rejected' (and 'prompt'), "
            "scored lists 'prompt', 'completions' and 'scores', single answers 'prompt', 'completion' and 'label'"
        )
    differing = [pair for pair in pairs if pair.chosen != pair.rejected]
    facts = [*table.notes, f"{path}: {form}"]
    if same := len(pairs) - len(differing):
        facts.append(f"{path}: {same:,} of {len(pairs):,} pairs are left out: chosen and rejected are the same")
    if not differing and not verdicts:
        raise UserError(
            f"{path}: in every pair chosen and rejected are the same, so that there is nothing to prefer; correct it"
            if pairs
            else f"{path}: no two answers to a prompt have different scores, so that there is nothing to prefer"
        )
    return Preferences(path, differing, verdicts, table.fingerprint, tuple(facts))


def as_verdicts(pairs: Sequence[Pair]) -> list[Verdict]:
    """Both answers of each pair by themselves, the chosen one good (Ethayarajh et al. 2024, section 4.1)."""
    return [
        Verdict(pair.place, pair.prompt, answer, good)
        for pair in pairs
        for answer, good in ((pair.chosen, True), (pair.rejected, False))
    ]


def _pair(record: Record, prompt: str | None) -> Pair:
    values = dict(zip(record.columns, record.values, strict=True))
    chosen, rejected = (_said(values, name, record.name) for name in ("chosen", "rejected"))
    asked = _asked(values, prompt, record.name)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{record.name}: one of chosen and rejected is text and the other messages; give both alike")
    if isinstance(chosen, str) or isinstance(rejected, str) or chosen[0]["role"] == ASSISTANT:
        return Pair(record.name, asked, chosen, rejected)
    # Whole chats: what both begin with is the prompt, whatever else is said of it.
    shared = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
    # Of chats that are the same, or one of which is a part of the other, an answer is left.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    return Pair(record.name, chosen[:shared], chosen[shared:], rejected[shared:])


def _of_list(record: Record, prompt: str | None, answers: str, scores: str) -> Iterator[Pair]:
    values = dict(zip(record.columns, record.values, strict=True))
    asked, said, scored = _asked(values, prompt, record.name), values.get(answers), values.get(scores)
    if not isinstance(said, list) or not isinstance(scored, list) or len(said) != len(scored):
        raise UserError(f"{record.name}: {answers!r} and {scores!r} must be lists of the same length; correct them")
    if not all(isinstance(score, int | float) and score == score for score in scored):
        raise UserError(f"{record.name}: {scores!r} holds something that is no number; correct or remove it")
    texts = [_said({answers: one}, answers, record.name) for one in said]
    for (one, first), (other, second) in itertools.combinations(zip(texts, scored, strict=True), 2):
        if first != second:
            yield Pair(record.name, asked, *((one, other) if first > second else (other, one)))


def _verdict(record: Record, prompt: str | None, answer: str, label: str) -> Verdict:
    values = dict(zip(record.columns, record.values, strict=True))
    good = WORDS.get(str(values.get(label)).strip().lower())
    if good is None:
        raise UserError(f"{record.name}: {label}={values.get(label)!r} is neither true nor false (1 nor 0); correct it")
    return Verdict(record.name, _asked(values, prompt, record.name), _said(values, answer, record.name), good)


def _asked(values: Mapping[str, Any], prompt: str | None, place: str) -> Said:
    return _said(values, prompt, place) if prompt and values.get(prompt) is not None else ""


def _said(values: Mapping[str, Any], name: str, place: str) -> Said:
    value = values.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return messages_of(value, f"{place}, {name}")
    raise UserError(f"{place}: {name!r} holds neither a text nor messages; correct or remove it")
