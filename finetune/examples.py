"""Labelled files as examples: checked, encoded, their labels numbered."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from espalier import progress
from espalier.data.description import listed
from espalier.data.examples import Example, encode_pairs
from espalier.data.labelled import Labelled, read_labelled
from espalier.errors import UserError
from finetune.labels import class_names, in_order, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.config import ModelConfig
    from finetune.presets import FinetuneData

LONGEST = 512
"""Tokens of an example at most, unless --data.max-length asks for more: attention costs their square."""


LABELS = 8
"""How many are listed in words."""


class Part(NamedTuple):
    """The examples of one file, in its order."""

    texts: Labelled
    encoded: list[Example]
    """With the target `labels`."""
    labels: list[int]


class Examples(NamedTuple):
    """What a classifier learns from and what it is measured on."""

    train: Part
    validation: Part
    names: list[str]
    """The labels, by their number: those of the training file, sorted (numbers by value)."""
    fingerprints: dict[str, str]
    """SHA-256 of both files."""
    facts: tuple[str, ...]
    """Notices on files whose content does not match their suffix, a line each."""


def read_examples(data: FinetuneData, tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> Examples:
    """Both files, encoded for the model. UserError where a file or its labels will not do."""
    length = max_length(data, model)
    files, fingerprints = {}, {}
    for name in ("train", "validation"):
        path = getattr(data, name)
        if path is None:
            raise UserError(f"no --data.{name} FILE given: name labelled texts (.tsv, .csv, .jsonl, hf:…)")
        path = os.path.expanduser(path)
        with progress.waiting(f"reading {path}"):
            files[name] = _read(path, data)
            fingerprints[name] = files[name].fingerprint
    train, validation = files["train"], files["validation"]
    names = class_names(train.labels, f"{data.train}, column {train.label_column!r}", data.label_kind)
    unseen = in_order(set(validation.labels) - set(names))
    if unseen:
        raise UserError(
            f"{data.validation} has labels that {data.train} has no example of: {quoted(unseen)}; known are "
            f"{quoted(names)}; correct the labels, or add training examples"
        )
    if (train.texts_b is None) != (validation.texts_b is None):
        raise UserError(
            f"one of {data.train} and {data.validation} has pairs of texts and the other single texts; "
            "name the columns with --data.text"
        )

    numbers = {name: number for number, name in enumerate(names)}

    def part(texts: Labelled) -> Part:
        with progress.waiting(f"tokenizing {len(texts.texts_a):,} examples"):
            encoded = encode_pairs(tokenizer, texts.texts_a, texts.texts_b, length, model.causal)
        labels = [numbers[label] for label in texts.labels or ()]
        targets = [example._replace(of_row={"labels": label}) for example, label in zip(encoded, labels, strict=True)]
        return Part(texts, targets, labels)

    facts = tuple(dict.fromkeys((*train.notes, *validation.notes)))
    return Examples(part(train), part(validation), names, fingerprints, facts)


def describe_examples(data: FinetuneData, examples: Examples) -> dict[str, str]:
    """Rows on both files and on the labels, with how often the training file has each, the most frequent first."""
    counts = Counter(examples.train.labels)
    most = sorted(counts, key=lambda label: (-counts[label], label))
    total = len(examples.train.labels)
    texts = examples.train.texts
    columns = f"column{'s' * (len(texts.text_columns) > 1)} {' and '.join(map(repr, texts.text_columns))}"
    labels = [f"{examples.names[label]} {counts[label]:,} ({counts[label] / total:.1%})" for label in most]
    return {
        "training": f"{data.train}: {total:,} examples, {columns}",
        "validation": f"{data.validation}: {len(examples.validation.labels):,} examples",
        "labels": f"{len(labels)} classes in {texts.label_column!r}: {listed(labels, LABELS)}".replace("%", " %"),
    }


def max_length(data: FinetuneData, model: ModelConfig) -> int:
    """Tokens of an example at most."""
    limit = model.max_length
    if data.max_length is None:
        return min(limit or model.max_position_embeddings, LONGEST)
    if limit is not None and data.max_length > limit:
        raise UserError(f"data.max_length={data.max_length} exceeds the model's {limit} learned positions; try {limit}")
    return data.max_length


def _read(path: str, data: FinetuneData) -> Labelled:
    file = read_labelled(path, data.text, data.label, data.encoding)
    if file.labels is None:
        raise UserError(
            f"{path} has no column of labels that is known by its name; name it with --data.label: there are "
            f"{', '.join(map(repr, file.columns))}"
        )
    if "" in file.labels:
        raise UserError(f"{path}: {file.labels.count('')} examples have an empty label; label or remove them")
    return file
