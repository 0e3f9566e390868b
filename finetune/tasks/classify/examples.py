"""Labelled files as examples: checked, encoded, their labels numbered."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from espalier import progress
from espalier.data.description import listed
from espalier.data.examples import Example, encode_pairs
from espalier.data.labelled import Labelled, read_labelled
from espalier.errors import UserError
from finetune.config import max_length
from finetune.tasks.classify.labels import PROBLEMS, in_order, labels_of, lists_of, numbers_of, quoted

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
    labels: list[Any]
    """The number of the class, or the number, or 0 and 1 for each label."""


class Examples(NamedTuple):
    """What a classifier learns from and what it is measured on."""

    train: Part
    validation: Part
    kind: str
    """What the labels are: classes, numbers or lists."""
    names: list[str]
    """The labels, by their number: those of the training file, sorted (numbers by value); of numbers, their column."""
    fingerprints: dict[str, str]
    """SHA-256 of both files."""
    facts: tuple[str, ...]
    """Notices on files whose content does not match their suffix, a line each."""


def read_examples(data: ClassifyData, tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> Examples:
    """Both files, encoded for the model. UserError where a file or its labels will not do."""
    length = max_length(data, model)
    train, validation = (_opened(data, name) for name in ("train", "validation"))
    fingerprints = {"train": train.fingerprint, "validation": validation.fingerprint}
    found = labels_of(
        train.labels or [],
        str(train.label_column),
        f"{data.train}, column {train.label_column!r}",
        data.label_kind,
    )
    names = found.names or [str(train.label_column)]
    numbered = {
        name: _numbered(file, found.kind, names, str(path), f"{data.train} has no example of")
        for name, path, file in (("train", data.train, train), ("validation", data.validation, validation))
    }
    if (train.texts_b is None) != (validation.texts_b is None):
        raise UserError(
            f"one of {data.train} and {data.validation} has pairs of texts and the other single texts; "
            "name the columns with --data.text"
        )

    parts = {
        name: _part(file, numbered[name], tokenizer, length, model.causal)
        for name, file in (("train", train), ("validation", validation))
    }
    cut = (_cut(parts[name], str(getattr(data, name)), length) for name in parts)
    facts = tuple(dict.fromkeys((found.words, *train.notes, *validation.notes, *filter(None, cut))))
    return Examples(parts["train"], parts["validation"], found.kind, names, fingerprints, facts)


def read_validation(data: ClassifyData, model: LoadedModel) -> Part:
    """The validation file alone, for a model that is trained. UserError where it has labels that the model does not
    know."""
    file, names = _opened(data, "validation"), list(model.config.labels)
    kind = {problem: kind for kind, problem in PROBLEMS.items()}.get(model.config.problem_type, "classes")
    labels = _numbered(file, kind, names, str(data.validation), "the model does not know")
    return _part(file, labels, model.tokenizer, model.longest, model.config.causal)


def _numbered(file: Labelled, kind: str, names: Sequence[str], path: str, unknown: str) -> list[Any]:
    """The targets of a file's examples. UserError where it has labels that are not among `names`."""
    place, labels = f"{path}, column {file.label_column!r}", file.labels or []
    if kind == "numbers":
        return numbers_of(labels, place)
    numbers = {name: number for number, name in enumerate(names)}
    cells = lists_of(labels, place) if kind == "lists" else [[label] for label in labels]
    if unseen := in_order({name for cell in cells for name in cell} - set(numbers)):
        raise UserError(
            f"{path} has labels that {unknown}: {quoted(unseen)}; known are {quoted(names)}; correct the labels, or "
            "add training examples"
        )
    if kind == "lists":
        return [[int(name in cell) for name in names] for cell in map(set, cells)]
    return [numbers[label] for label in labels]


def _part(texts: Labelled, labels: list[Any], tokenizer: PreTrainedTokenizerFast, length: int, causal: bool) -> Part:
    with progress.waiting(f"tokenizing {len(texts.texts_a):,} examples"):
        encoded = encode_pairs(tokenizer, texts.texts_a, texts.texts_b, length, causal)
    targets = [example._replace(of_row={"labels": label}) for example, label in zip(encoded, labels, strict=True)]
    return Part(texts, targets, labels)


def _cut(part: Part, path: str, length: int) -> str | None:
    """A line on examples that fill the row to its end, and so may have lost some of their text."""
    full = sum(len(example.ids) >= length for example in part.encoded)
    if not full:
        return None
    return (
        f"{path}: {full:,} of {len(part.encoded):,} examples have {length} tokens or more; what is beyond was cut off"
    )


def describe_examples(data: ClassifyData, examples: Examples) -> dict[str, str]:
    """Rows on both files and on the labels, with how often the training file has each, the most frequent first."""
    total = len(examples.train.labels)
    texts = examples.train.texts
    columns = f"column{'s' * (len(texts.text_columns) > 1)} {' and '.join(map(repr, texts.text_columns))}"
    found = {
        "training": f"{data.train}: {total:,} examples, {columns}",
        "validation": f"{data.validation}: {len(examples.validation.labels):,} examples",
    }
    if examples.kind == "numbers":
        values = np.array(examples.train.labels)
        spread = f"from {values.min():g} to {values.max():g}, mean {values.mean():.3g}, deviation {values.std():.3g}"
        return found | {"labels": f"numbers in {texts.label_column!r} {spread}"}
    if examples.kind == "lists":
        counts = dict(enumerate(np.sum(examples.train.labels, axis=0).tolist()))
        what = "labels, some together,"
    else:
        counts, what = dict(Counter(examples.train.labels)), "classes"
    most = sorted(counts, key=lambda label: (-counts[label], label))
    labels = [f"{examples.names[label]} {counts[label]:,} ({counts[label] / total:.1%})" for label in most]
    words = f"{len(labels)} {what} in {texts.label_column!r}: {listed(labels, LABELS)}"
    return found | {"labels": words.replace("%", " %")}


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
    if "" in file.labels and data.label_kind != "lists":
        raise UserError(f"{path}: {file.labels.count('')} examples have an empty label; label or remove them")
    return file
