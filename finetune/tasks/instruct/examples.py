"""Files of chats, prompts and answers as examples: read, put into a template, encoded, cut where they are too long."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from espalier import progress
from espalier.data.chat import (
    Chat,
    Message,
    chat_template,
    default_template,
    encode_chats,
    end_of_turn,
    messages_of,
    render_chat,
    special_strings,
    template_from,
)
from espalier.data.examples import Example
from espalier.data.records import Record
from espalier.data.tables import read_table, read_text
from espalier.data.text_template import encode_filled, filled, template_fields
from espalier.errors import UserError
from espalier.files import sha256_of_text
from finetune.config import max_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.config import ModelConfig
    from espalier.predict.generate import Prompt
    from finetune.tasks.instruct.record import InstructData

ANSWERS = ("completion", "response", "answer", "chosen")
"""Names of the column beside `prompt`."""
PAIRS = (("source", "target"), ("question", "answer"), ("document", "summary"), ("article", "highlights"))
"""Further names of what is asked and what is answered."""


class Item(NamedTuple):
    """One example as text."""

    place: str
    """Where it was read: `file:line`."""
    prompt: Prompt
    """What the model would be asked, its last answer left out."""
    source: str
    """What stands last in the prompt, without the words of a template."""
    reference: str
    """The last answer."""
    chat: Chat
    """Where texts fill a template, their answer is the last field."""


class Part(NamedTuple):
    """The examples of one file, in its order, those left out that teach nothing."""

    name: str
    items: list[Item]
    encoded: list[Example]
    """With the target `loss_weights`: 1 at the tokens of answers, else 0."""
    fingerprint: str
    facts: tuple[str, ...]
    """What was taken for what, cut and left out, a line each."""


def with_template(tokenizer: PreTrainedTokenizerFast, data: InstructData) -> PreTrainedTokenizerFast:
    """The tokenizer with the chat template of the run, where chats are learnt: that of a file, its own, the default."""
    if data.chat_template is not None:
        if data.template is not None:
            raise UserError("--data.template and --data.chat-template are two ways to write an example; give one")
        tokenizer.chat_template = template_from(os.path.expanduser(data.chat_template))
    elif data.template is None and chat_template(tokenizer) is None:
        tokenizer.chat_template = default_template(tokenizer)
    return tokenizer


def read_part(data: InstructData, side: str, tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> Part:
    """The examples of `train` or `validation`. UserError where the file, a chat or the template will not do."""
    paths = tuple(os.path.expanduser(path) for path in getattr(data, side))
    if not paths:
        raise UserError(
            f"no --data.{side} FILE given: name chats or prompts with answers (.jsonl, .json, .csv, .tsv, hf:…), or "
            "two text files of parallel lines"
        )
    name = " and ".join(paths)
    with progress.waiting(f"reading {name}"):
        records, notes, fingerprint = read_records(paths, data.encoding)
        form, items = _items(name, records, data, tokenizer)
    empty = sum(not item.reference.strip() for item in items)
    items = [item for item in items if item.reference.strip()]
    if not items:
        raise UserError(f"{name}: every answer is empty; there is nothing to learn")
    with progress.waiting(f"tokenizing {len(items):,} examples"):
        if data.template is None:
            encoded = encode_chats(tokenizer, [item.chat for item in items])
        else:
            encoded = encode_filled(tokenizer, [item.chat for item in items])
    room, how = max_length(data, model), Counter[str]()
    kept_items, kept = [], []
    for item, example in zip(items, encoded, strict=True):
        short, why = fitted(example, item.chat.answers, room)
        how[why] += 1
        if short is not None:
            kept_items.append(item)
            kept.append(short)
    if not kept:
        raise UserError(
            f"{name}: no example has a token of its answer within {room} tokens; give more with --data.max-length"
        )
    facts = [*notes, f"{name}: {form}"]
    facts += _lengths(name, how, len(items), room)
    if empty:
        facts.append(f"{name}: {empty:,} examples with an empty answer are left out")
    if data.template is None and (spelled := _spelled(items, special_strings(tokenizer))):
        facts.append(f"{name}: {spelled}")
    return Part(name, kept_items, kept, fingerprint, tuple(facts))


def fitted(example: Example, answers: Sequence[tuple[int, int]], room: int) -> tuple[Example | None, str]:
    """The example in so many tokens, and what became of it: "whole", "turns", "answer" or "dropped".

    It ends behind the last answer that fits as a whole; where not even the first does, within that answer, at the end
    of a character. None where the prompt alone fills the room.
    """
    size = len(example.ids)
    if size <= room:
        return example, "whole"
    assert example.offsets is not None
    begin_N, end_N = example.offsets.T
    weights_N = np.asarray(example.of_tokens["loss_weights"])
    ends = [int(np.flatnonzero((begin_N >= 0) & (begin_N < end))[-1]) + 1 for _, end in answers]
    whole = max((end for end in ends if end <= room), default=0)
    cut = whole or room
    while not whole and 0 < cut < size and 0 <= begin_N[cut] < end_N[cut - 1]:
        cut -= 1
    if not weights_N[:cut].any():
        return None, "dropped"
    short = Example(
        example.ids[:cut], example.types[:cut], example.offsets[:cut], of_tokens={"loss_weights": weights_N[:cut]}
    )
    return short, "turns" if whole else "answer"


def shown(item: Item, example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """An example token by token, in two lines: [brackets] around each that is learnt, │ between the others.

    A character that is several tokens stands at the first of them, the others are ·.
    """
    assert example.offsets is not None
    weights = np.asarray(example.of_tokens["loss_weights"])
    words, before, learnt_before = [], 0, True
    for token, (begin, end), weight in zip(example.ids, example.offsets.tolist(), weights, strict=True):
        if begin < 0:
            text = str(tokenizer.convert_ids_to_tokens(int(token)))
        else:
            text = item.chat.text[before : max(end, before)] or "·"
            before = max(end, before)
        text = text.replace("\n", "⏎")
        words.append(f"[{text}]" if weight else f"{'' if learnt_before else '│'}{text}")
        learnt_before = bool(weight)
    learnt = int((weights > 0).sum())
    return f"{item.place}: {len(example.ids)} tokens, {learnt} learnt, in [brackets]\n  {''.join(words)}"


def describe_part(part: Part) -> str:
    """How many examples a file has, and how many tokens of them are learnt."""
    tokens = sum(len(example.ids) for example in part.encoded)
    learnt = int(sum(np.sum(example.of_tokens["loss_weights"]) for example in part.encoded))
    return f"{part.name}: {len(part.encoded):,} examples, {tokens:,} tokens, {learnt:,} of them learnt"


def read_records(paths: Sequence[str], encoding: str) -> tuple[list[Record], list[str], str]:
    """Rows with JSON values, notes on the file, and its fingerprint."""
    if len(paths) == 1:
        table = read_table(paths[0], encoding)
        return list(table.records), list(table.notes), table.fingerprint
    files = [read_text(path, encoding) for path in paths]
    sides = [file.text.removesuffix("\n").split("\n") for file in files]
    counts = [len(side) for side in sides]
    if counts[0] != counts[1]:
        raise UserError(
            f"{paths[0]} has {counts[0]:,} lines and {paths[1]} {counts[1]:,}; parallel files have as many: the line "
            "in one is the translation of that in the other"
        )
    records = [
        Record(f"{paths[0]}:{number}", ("source", "target"), pair)
        for number, pair in enumerate(zip(*sides, strict=True), 1)
    ]
    fingerprint = sha256_of_text(" ".join(file.fingerprint for file in files))
    return records, [note for file in files for note in file.notes], fingerprint


def _items(
    name: str, records: Sequence[Record], data: InstructData, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[Item]]:
    """What the file was taken for, in words, and its examples."""
    columns = list(records[0].columns)
    if data.template is not None:
        fields = template_fields(data.template)
        if lacking := [field for field in fields if field not in columns]:
            raise UserError(
                f"{name} has no {lacking[0]!r}, which data.template={data.template!r} names; it has "
                f"{', '.join(map(repr, columns))}"
            )
        return f"template {data.template!r}; {fields[-1]!r} is learnt", list(_filled(records, data.template, fields))
    form, chats = _chats(name, records, columns)
    return form, [_chat_item(place, messages, tokenizer) for place, messages in chats]


def _filled(records: Sequence[Record], template: str, fields: Sequence[str]) -> Iterator[Item]:
    for record in records:
        values = dict(zip(record.columns, record.values, strict=True))
        texts = {field: _text(values, field, record.name) for field in dict.fromkeys(fields)}
        chat = filled(template, texts)
        prompt = {field: texts[field] for field in fields[:-1]}
        yield Item(record.name, prompt, texts[fields[-2]], texts[fields[-1]], chat)


def _chat_item(place: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> Item:
    try:
        chat = render_chat(tokenizer, messages)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    asked = [message["content"] for message in messages[:last] if message["role"] == "user"]
    return Item(place, list(messages[:last]), asked[-1] if asked else "", messages[last]["content"], chat)


def _chats(
    name: str, records: Sequence[Record], columns: Sequence[str]
) -> tuple[str, Iterator[tuple[str, Sequence[Message]]]]:
    """What the columns were taken for, in words, and (place, messages) of each row."""
    if field := next((field for field in ("messages", "conversations", "conversation") if field in columns), None):
        return f"chats in {field!r}", (
            (record.name, messages_of(_value(record, field), record.name)) for record in records
        )
    if {"instruction", "output"} <= set(columns):
        return "instruction, input and output (Alpaca)", map(_alpaca, records)
    pairs = [("prompt", answer) for answer in ANSWERS] + list(PAIRS)
    pair = next((pair for pair in pairs if set(pair) <= set(columns)), None)
    if pair is None:
        raise UserError(
            f"{name} has {', '.join(map(repr, columns))}; chats have 'messages', others 'prompt' and 'completion', or "
            "'instruction', 'input' and 'output'; for other columns give --data.template \"{one} … {other}\""
        )
    return f"{pair[0]!r} is asked, {pair[1]!r} is the answer", (_pair(record, *pair) for record in records)


def _alpaca(record: Record) -> tuple[str, Sequence[Message]]:
    values = dict(zip(record.columns, record.values, strict=True))
    asked = _text(values, "instruction", record.name)
    if values.get("input"):
        asked += f"\n\n{_text(values, 'input', record.name)}"
    return record.name, _exchange(asked, _text(values, "output", record.name), values.get("system"))


def _pair(record: Record, asks: str, answers: str) -> tuple[str, Sequence[Message]]:
    values = dict(zip(record.columns, record.values, strict=True))
    if isinstance(values.get(asks), list):
        before, after = (messages_of(values.get(field), f"{record.name}, {field}") for field in (asks, answers))
        return record.name, before + after
    return record.name, _exchange(_text(values, asks, record.name), _text(values, answers, record.name))


def _exchange(asked: str, answer: str, system: Any = None) -> list[Message]:
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return [*first, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _value(record: Record, field: str) -> Any:
    return dict(zip(record.columns, record.values, strict=True)).get(field)


def _text(values: dict[str, Any], field: str, place: str) -> str:
    value = values.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{place}: no text under {field!r}; correct or remove it")
    return str(value)


def _lengths(name: str, how: Counter[str], count: int, room: int) -> Iterator[str]:
    """What became of examples that are too long, in words."""
    long = count - how["whole"]
    if long:
        words = {"turns": "end after an earlier answer", "answer": "end within their answer", "dropped": "are left out"}
        became = ", ".join(f"{how[why]:,} {became}" for why, became in words.items() if how[why])
        yield f"{name}: {long:,} of {count:,} examples are longer than {room} tokens: {became} (--data.max-length)"


def _spelled(items: Sequence[Item], specials: Sequence[str]) -> str:
    """What is to be known of special tokens that messages spell out, in words."""
    texts = [item.reference + "".join(m["content"] for m in item.prompt if isinstance(m, dict)) for item in items]
    found = Counter(token for text in texts for token in specials if token in text)
    if not found:
        return ""
    token, count = found.most_common(1)[0]
    return f"{count:,} examples spell out the special token {token}, which is then read as that token"


def endless(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """A warning where the template gives the assistant no token to end with."""
    if end_of_turn(tokenizer) is not None:
        return None
    return "the chat template ends answers by no special token: the model does not learn where to stop"
