"""Files of tagged sentences as examples: checked, cut into pieces and windows, their tags numbered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from espalier import progress
from espalier.data.description import listed
from espalier.data.examples import Example
from espalier.data.tagged import Tagged, read_tagged
from espalier.data.word_pieces import Sentence, Window, encode_words, sentence_of_words
from espalier.errors import UserError
from espalier.predict.tags import is_of_entity, scheme_of, types_of
from finetune.config import max_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.config import ModelConfig
    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.tag.record import TagData

TAGS = 8
"""How many are listed in words."""


class Part(NamedTuple):
    """The sentences of one file, in its order."""

    file: Tagged
    sentences: list[Sentence]
    windows: list[Window]
    """With the targets `labels` and `loss_weights`, where tags have numbers."""

    @property
    def examples(self) -> list[Example]:
        return [window.example for window in self.windows]


class Examples(NamedTuple):
    """What a tagger learns from and what it is measured on."""

    train: Part
    validation: Part
    names: list[str]
    """The tags, by their number: O first, then sorted."""
    scheme: str | None
    """How tags are of entities (predict.tags.scheme_of); None = they are tags of words."""
    fingerprints: dict[str, str]
    """SHA-256 of both files."""
    facts: tuple[str, ...]
    """What the tags were taken for, and sentences that are longer than a row, a line each."""


def read_examples(data: TagData, tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> Examples:
    """Both files, encoded for the model. UserError where a file or its tags will not do."""
    length = max_length(data, model)
    train, validation = (_opened(data, name) for name in ("train", "validation"))
    scheme = checked_scheme(train, str(data.train), data.tag_kind)
    known = {tag for tags in train.tags for tag in tags}
    found = {tag for tags in validation.tags for tag in tags}
    _check_known(str(data.validation), validation, known, scheme, f"{data.train} has no example of")
    names = sorted(known | found, key=lambda name: (name != "O", name))
    numbers = {name: number for number, name in enumerate(names)}
    train_part, validation_part = (
        _part(file, tokenizer, length, model.causal, data.stride, numbers) for file in (train, validation)
    )
    facts = [*train.notes, *validation.notes]
    facts.append(_taken_for(scheme, names))
    for path, part in ((data.train, train_part), (data.validation, validation_part)):
        long = len(part.windows) - len(part.sentences)
        if long:
            count = sum(number > 1 for number in Counter(window.sentence for window in part.windows).values())
            facts.append(
                f"{path}: {count:,} of {len(part.sentences):,} sentences are longer than {length} tokens; they are "
                f"read in windows that overlap, {len(part.windows):,} rows in all, and lose no word"
            )
    fingerprints = {"train": train.fingerprint, "validation": validation.fingerprint}
    return Examples(train_part, validation_part, names, scheme, fingerprints, tuple(dict.fromkeys(facts)))


def read_validation(data: TagData, model: LoadedModel) -> tuple[Part, str | None]:
    """The validation file alone, for a model that is trained, and how its tags are of entities.

    UserError where it has tags, or types of entities, that the model does not know.
    """
    file, known = _opened(data, "validation"), set(model.config.labels)
    scheme = None
    if data.tag_kind == "auto":
        scheme = model.saved.get("scheme", scheme_of(file.tags) if scheme_of([sorted(known)]) else None)
    _check_known(str(data.validation), file, known, scheme, "the model does not know")
    return _part(file, model.tokenizer, model.longest, model.config.causal, data.stride, {}), scheme


def checked_scheme(file: Tagged, path: str, kind: str) -> str | None:
    """How the tags are of entities; UserError where there is nothing to tell apart, or only some are of entities."""
    names = sorted({tag for tags in file.tags for tag in tags})
    if len(names) < 2:
        raise UserError(f"{path}: every word has the tag {names[0]!r}; a tagger needs two or more")
    if kind == "words":
        return None
    scheme = scheme_of(file.tags)
    typed = [name for name in names if is_of_entity(name) and "-" in name]
    if scheme is None and typed and len(typed) >= len(names) / 2:
        other = next(name for name in names if name != "O" and name not in typed)
        place = next(place for place, tags in zip(file.places, file.tags, strict=True) if other in tags)
        raise UserError(
            f"{place}: the tag {other!r} is neither O nor like B-TYPE, as most are ({listed(typed, 3)}); correct it, "
            "or say --data.tag-kind words if they are no tags of entities"
        )
    return scheme


def describe_examples(data: TagData, examples: Examples) -> dict[str, str]:
    """Rows on both files and on the tags, with how often the training file has each, the most frequent first."""

    def size(part: Part) -> str:
        return f"{len(part.sentences):,} sentences, {sum(len(words) for words in part.file.words):,} words"

    columns = examples.train.file.columns
    counts = Counter(tag for tags in examples.train.file.tags for tag in tags)
    total = sum(counts.values())
    most = sorted(counts, key=lambda tag: (-counts[tag], tag))
    tags = listed([f"{tag} {counts[tag]:,} ({counts[tag] / total:.1%})" for tag in most], TAGS)
    return {
        "training": f"{data.train}: {size(examples.train)} (columns {columns[0]} and {columns[1]})",
        "validation": f"{data.validation}: {size(examples.validation)}",
        "tags": f"{len(examples.names)}: {tags}".replace("%", " %"),
    }


def _taken_for(scheme: str | None, names: Sequence[str]) -> str:
    if scheme is None:
        return f"tags are taken each for itself ({len(names)} of them): accuracy and F1 of each"
    types = types_of(names)
    return f"tags are taken for entities, written as {scheme}, of {len(types)} types: {listed(types, TAGS)}"


def _check_known(path: str, file: Tagged, known: set[str], scheme: str | None, lacking: str) -> None:
    """UserError for tags that are not known; of entities, for types."""
    found = {tag for tags in file.tags for tag in tags}
    unseen = found - known - {"O"}
    if scheme is not None:
        types = set(types_of(known))
        unseen = {tag for tag in unseen if not is_of_entity(tag) or types_of([tag])[0] not in types}
    if unseen:
        several = "; several tags of a word with commas between them must become one" * any(
            "," in tag for tag in unseen
        )
        raise UserError(
            f"{path} has tags that {lacking}: {listed([repr(tag) for tag in sorted(unseen)], TAGS)}; known are "
            f"{listed([repr(tag) for tag in sorted(known)], TAGS)}{several}"
        )


def _part(
    file: Tagged,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    causal: bool,
    stride: int | None,
    numbers: dict[str, int],
) -> Part:
    """numbers: those of the tags; empty = examples get no targets."""
    with progress.waiting(f"tokenizing {len(file.words):,} sentences"):
        sentences = list(map(sentence_of_words, file.words))
        windows = encode_words(tokenizer, sentences, length, causal, stride)
    if not numbers:
        return Part(file, sentences, windows)
    labels = [np.array([numbers[tag] for tag in tags], np.int32) for tags in file.tags]
    return Part(file, sentences, [_labelled(window, labels[window.sentence]) for window in windows])


def _labelled(window: Window, label_W: np.ndarray) -> Window:
    size = len(window.example.ids)
    labels, weights = np.zeros(size, np.int32), np.zeros(size, np.float32)
    labels[window.places], weights[window.places] = label_W[window.words], 1.0
    targets = {"labels": labels, "loss_weights": weights}
    return window._replace(example=window.example._replace(of_tokens=targets))


def _opened(data: TagData, name: str) -> Tagged:
    """The file that is named `train` or `validation`."""
    with data.opening(name, "tagged sentences (columns as CoNLL's, .jsonl, hf:…)") as path:
        return read_tagged(path, data.tokens, data.tags, data.encoding)
