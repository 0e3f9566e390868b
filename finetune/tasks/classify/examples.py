"""Labelled files as examples: checked, encoded, their labels numbered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from espalier import progress
from espalier.data.description import listed
from espalier.data.examples import Example, cut_words, encode_pairs
from espalier.data.labelled import Labelled, read_labelled
from espalier.data.loader import permute
from espalier.errors import UserError
from finetune.calibration import FEWEST
from finetune.config import max_length
from finetune.tasks.classify.labels import PROBLEMS, in_order, labels_of, lists_of, numbers_of, quoted
from finetune.tasks.classify.marks import with_marks

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
    apart: Part | None
    """Of the training file, but not learnt from: what probabilities are calibrated on. None = nothing."""
    kind: str
    """What the labels are: classes, numbers or lists."""
    names: list[str]
    """The labels, by their number: those of the training file, sorted (numbers by value); of numbers, their column."""
    fingerprints: dict[str, str]
    """SHA-256 of both files."""
    facts: tuple[str, ...]
    """Notices on files whose content does not match their suffix, a line each."""


def read_examples(
    data: ClassifyData, tokenizer: PreTrainedTokenizerFast, model: ModelConfig, seed: int = 0
) -> Examples:
    """Both files, encoded for the model. UserError where a file or its labels will not do.

    seed: chooses the part of the training file that is not learnt from.
    """
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

    if data.rationale and data.rationale not in train.others:
        raise UserError(
            f"{data.train} has no column {data.rationale!r} of marked words; its columns are "
            f"{', '.join(map(repr, train.columns))}"
        )
    parts = {
        name: _part(file, numbered[name], tokenizer, length, model.causal, data.rationale)
        for name, file in (("train", train), ("validation", validation))
    }
    cut = [line for name, part in parts.items() for line in cut_words(getattr(data, name), part.encoded, length)]
    facts = tuple(dict.fromkeys((found.words, *train.notes, *validation.notes, *cut)))
    learnt, apart = _divided(parts["train"], data, found.kind, seed)
    return Examples(learnt, parts["validation"], apart, found.kind, names, fingerprints, facts)


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


def _part(
    texts: Labelled,
    labels: list[Any],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    causal: bool,
    rationale: str | None = None,
) -> Part:
    """rationale: the column of marked words, where the examples are to have the weights of their tokens."""
    with progress.waiting(f"tokenizing {len(texts.texts_a):,} examples"):
        encoded = encode_pairs(tokenizer, texts.texts_a, texts.texts_b, length, causal, offsets=rationale is not None)
    if rationale is not None:
        encoded = with_marks(texts, encoded, rationale)
    targets = [example._replace(of_row={"labels": label}) for example, label in zip(encoded, labels, strict=True)]
    return Part(texts, targets, labels)


def _divided(part: Part, data: ClassifyData, kind: str, seed: int) -> tuple[Part, Part | None]:
    """What is learnt from, and what is calibrated on: so much of it as data.calibration_part says."""
    if not data.calibration_part:
        return part, None
    if kind == "numbers":
        raise UserError("data.calibration_part: numbers have no probabilities to calibrate; leave it out")
    total = len(part.labels)
    count = round(total * data.calibration_part)
    if count < FEWEST or count > total - FEWEST:
        raise UserError(
            f"data.calibration_part={data.calibration_part:g} of the {total:,} examples of {data.train} are {count:,}; "
            f"there must be {FEWEST} at least, and as many to learn from"
        )
    apart = drawn_alike(part.labels, count, seed)
    return _some(part, np.setdiff1d(np.arange(total), apart)), _some(part, apart)


def drawn_alike(labels: Sequence[Any], count: int, seed: int) -> np.ndarray:
    """Numbers of so many examples, in their order, that have each label (or set of labels) about as often as all have.

    Of each label one stays behind, where there are enough others.
    """
    groups: dict[Any, list[int]] = {}
    for number in permute(np.arange(len(labels)), len(labels), seed).tolist():
        label = labels[number]
        groups.setdefault(tuple(label) if isinstance(label, list) else label, []).append(number)
    drawn = [number for group in groups.values() for number in group[1:]]
    if len(drawn) < count:
        drawn += [group[0] for group in groups.values()]
    # At equal distances, group by group.
    at = ((np.arange(count) + 0.5) * len(drawn) / count).astype(int)
    return np.sort(np.array(drawn)[at])


def _some(part: Part, chosen: np.ndarray) -> Part:
    """The examples of these numbers."""
    texts = {
        name: [values[number] for number in chosen]
        for name in ("texts_a", "texts_b", "labels")
        if (values := getattr(part.texts, name)) is not None
    }
    encoded, labels = ([values[number] for number in chosen] for values in (part.encoded, part.labels))
    return Part(part.texts._replace(**texts), encoded, labels)


def describe_examples(data: ClassifyData, examples: Examples) -> dict[str, str]:
    """Rows on both files and on the labels, with how often the training file has each, the most frequent first."""
    total = len(examples.train.labels)
    texts = examples.train.texts
    columns = f"column{'s' * (len(texts.text_columns) > 1)} {' and '.join(map(repr, texts.text_columns))}"
    found = {
        "training": f"{data.train}: {total:,} examples, {columns}",
        "validation": f"{data.validation}: {len(examples.validation.labels):,} examples",
    }
    if examples.apart:
        found["calibration"] = f"on {len(examples.apart.labels):,} further examples of {data.train}, not learnt from"
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
    with data.opening(name, "labelled texts (.tsv, .csv, .jsonl, hf:…)") as path:
        return _read(path, data)


def _read(path: str, data: ClassifyData) -> Labelled:
    file = read_labelled(path, data.text, data.label, data.encoding, data.others)
    if file.labels is None:
        there = ", ".join(map(repr, file.columns))
        if len(file.columns) == 1 and (wide := next((sign for sign in "，；｜" if sign in file.columns[0]), None)):
            raise UserError(
                f"{path}: its columns are separated by {wide!r}, a sign of text; separate them by commas or tabs, for "
                f"instance {','.join(file.columns[0].split(wide))!r}"
            )
        raise UserError(
            f"{path} has no column of labels that is known by its name; name it with --data.label: there are {there}; "
            "if these are an example and not names, put a line of names in front: text and label"
        )
    if "" in file.labels and data.label_kind != "lists":
        count, first = file.labels.count(""), file.labels.index("") + 1
        have = "example has" if count == 1 else "examples have"
        raise UserError(f"{path}: {count} {have} an empty label, the first is example {first}; label or remove them")
    return file
