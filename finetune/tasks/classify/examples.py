"""Labelled files as examples: checked, encoded, their labels numbered."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from espalier import progress
from espalier.data.description import listed
from espalier.data.examples import Example, encode_pairs
from espalier.data.labelled import Labelled, read_labelled
from espalier.errors import UserError
from finetune.config import max_length
from finetune.tasks.classify.labels import class_names, in_order, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.config import ModelConfig
    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.classify.record import ClassifyData

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


def read_examples(data: ClassifyData, tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> Examples:
    """Both files, encoded for the model. UserError where a file or its labels will not do."""
    length = max_length(data, model)
    train, validation = (_opened(data, name) for name in ("train", "validation"))
    fingerprints = {"train": train.fingerprint, "validation": validation.fingerprint}
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
    facts = tuple(dict.fromkeys((*train.notes, *validation.notes)))
    parts = (_part(file, numbers, tokenizer, length, model.causal) for file in (train, validation))
    return Examples(*parts, names, fingerprints, facts)


def read_validation(data: ClassifyData, model: LoadedModel) -> tuple[Part, list[str]]:
    """The validation file alone, for a model that is trained; its examples and the model's labels.

    UserError where it has labels that the model does not know.
    """
    file, names = _opened(data, "validation"), list(model.config.labels)
    if unseen := in_order(set(file.labels) - set(names)):
        raise UserError(
            f"{data.validation} has labels that the model does not know: {quoted(unseen)}; known are {quoted(names)}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return _part(file, numbers, model.tokenizer, model.longest, model.config.causal), names


def _part(
    texts: Labelled, numbers: Mapping[str, int], tokenizer: PreTrainedTokenizerFast, length: int, causal: bool
) -> Part:
    with progress.waiting(f"tokenizing {len(texts.texts_a):,} examples"):
        encoded = encode_pairs(tokenizer, texts.texts_a, texts.texts_b, length, causal)
    labels = [numbers[label] for label in texts.labels or ()]
    targets = [example._replace(of_row={"labels": label}) for example, label in zip(encoded, labels, strict=True)]
    return Part(texts, targets, labels)


def describe_examples(data: ClassifyData, examples: Examples) -> dict[str, str]:
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


def _opened(data: ClassifyData, name: str) -> Labelled:
    """The file that is named `train` or `validation`."""
    path = getattr(data, name)
    if path is None:
        raise UserError(f"no --data.{name} FILE given: name labelled texts (.tsv, .csv, .jsonl, hf:…)")
    path = os.path.expanduser(path)
    with progress.waiting(f"reading {path}"):
        return _read(path, data)


def _read(path: str, data: ClassifyData) -> Labelled:
    file = read_labelled(path, data.text, data.label, data.encoding)
    if file.labels is None:
        raise UserError(
            f"{path} has no column of labels that is known by its name; name it with --data.label: there are "
            f"{', '.join(map(repr, file.columns))}"
        )
    if "" in file.labels:
        raise UserError(f"{path}: {file.labels.count('')} examples have an empty label; label or remove them")
    return file
