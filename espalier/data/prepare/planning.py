"""What is to be tokenized, with which tokenizer, and where in the cache it lies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from espalier import progress
from espalier.data.config import DataConfig
from espalier.data.prepare.watched import Watched
from espalier.errors import UserError
from espalier.files import appearing, cache_key, make_folder, replacing, sha256_of_file, sha256_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.data.filters import Decisions, Measure
    from espalier.data.sources import Source

SUMS = "sums.json"


class Plan(NamedTuple):
    """What is to be tokenized."""

    sides: dict[str, dict[str, Source]]
    """"train" and "validation" → the sources of that side by name."""
    keys: dict[str, dict[str, str]]
    """Their fingerprints."""
    tokenizer: PreTrainedTokenizerFast
    fingerprints: dict[str, str]
    """As in Prepared."""
    words: dict[str, str]
    """As in Prepared."""


def plan(
    config: DataConfig,
    vocab_size: int,
    *,
    for_masked_lm: bool,
    of_weights: PreTrainedTokenizerFast | None = None,
    whole_words: bool = False,
    words: dict[str, str] | None = None,
) -> Plan:
    """What is to be tokenized with which tokenizer: `prepare` without its last part."""
    if config.words and not for_masked_lm:
        raise UserError("data.words is for masked LM, which can hide whole words; leave out --data.words")
    from espalier.data.sources import open_sources
    from espalier.data.tokenizer import fingerprint, load_tokenizer
    from espalier.data.words import check_segmenters

    cache = cache_folder(config)
    with progress.waiting("looking through the text"):
        sides = open_sources(config, cache, lambda source: filtered(source, config))._asdict()
        keys = {side: {name: source.fingerprint() for name, source in found.items()} for side, found in sides.items()}
    if words is None:
        words = _segmenters(sides["train"].values(), config, whole_words)
    else:
        check_segmenters(words)
    if words:
        progress.say(f"whole words: {'; '.join(f'{script} by {found}' for script, found in words.items())}")
    joint = {side: _joint(names) for side, names in keys.items()}
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else of_weights
    if tokenizer and of_weights and fingerprint(tokenizer) != fingerprint(of_weights):
        raise UserError(
            f"{config.tokenizer} is not the tokenizer that the weights were trained with; leave out --data.tokenizer, "
            "or start anew, without --init-from and in another --run-dir"
        )
    if tokenizer is None:
        train = list(sides["train"].values())
        tokenizer = _trained(config, train, joint["train"], vocab_size, for_masked_lm)
    return Plan(sides, keys, tokenizer, {"tokenizer": fingerprint(tokenizer)} | joint, words)


def _segmenters(sources: Iterable[Source], config: DataConfig, whole_words: bool) -> dict[str, str]:
    """The segmenters that the settings and a sample of each source ask for."""
    from espalier.data.sources import sample
    from espalier.data.words import find_segmenters

    if config.words == "tokens" or not (config.words or whole_words):
        return {}
    return find_segmenters([sample(source) for source in sources], required=config.words == "segmenter")


def cache_folder(config: DataConfig) -> Path:
    """config.cache, else $ESPALIER_CACHE, else ~/.cache/espalier."""
    return Path(config.cache or os.environ.get("ESPALIER_CACHE") or "~/.cache/espalier").expanduser()


def _joint(keys: dict[str, str]) -> str:
    """One fingerprint for several sources; of a single one, its own."""
    return next(iter(keys.values())) if len(keys) == 1 else sha256_of_text(json.dumps(keys))


def filtered(source: Source, config: DataConfig) -> Source:
    """The source without what the filters drop; what that is, is found out once and kept in the cache."""
    if not config.filters.active:
        return source
    from espalier.data.documents import documents
    from espalier.data.filters import Decisions, measure
    from espalier.data.sources import Filtered

    path = decisions_path(source, config)
    decisions = Decisions.load(path)
    if decisions is None:
        texts = (item.text for item in documents(Watched(source, "comparing documents")))
        decisions = write_decisions(path, (measure(text, config.filters) for text in texts), config)
    return Filtered(source, decisions, path.stem)


def decisions_path(source: Source, config: DataConfig) -> Path:
    return cache_folder(config) / f"filters-{cache_key(source.fingerprint(), str(config.filters))}.npz"


def write_decisions(path: Path, measures: Iterable[Measure], config: DataConfig) -> Decisions:
    """Which documents the filters drop, from the measures of them all in their order."""
    from espalier.data.filters import decide

    make_folder(path.parent)
    decisions = decide(measures, config.filters)
    with replacing(path, "wb") as file:
        decisions.save(file)
    return decisions


def _trained(config: DataConfig, sources: list[Source], key: str, vocab_size: int, for_masked_lm: bool):
    from espalier.data.documents import documents
    from espalier.data.tokenizer import load_tokenizer, save_tokenizer
    from espalier.data.train_tokenizer import train_tokenizer

    kind, *rules = config.training()
    folder = cache_folder(config) / f"tokenizer-{cache_key(key, kind, vocab_size, for_masked_lm, *rules)}"
    found = _cached_tokenizer(folder)
    if found is None:
        label = "reading text for the tokenizer"
        texts = (item.text for item in chain.from_iterable(documents(Watched(source, label)) for source in sources))
        shutil.rmtree(folder, ignore_errors=True)
        with appearing(folder) as unfinished:
            trained = train_tokenizer(
                texts,
                config.tokenizer_kind,
                vocab_size,
                for_masked_lm=for_masked_lm,
                alphabet=config.alphabet,
                lowercase=config.lowercase,
            )
            save_tokenizer(trained, unfinished)
            (unfinished / SUMS).write_text(json.dumps(_sums(unfinished)))
        found = load_tokenizer(folder)
    return found


def _cached_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer that was trained there, unless its files are not what was written."""
    from espalier.data.tokenizer import load_tokenizer

    try:
        intact = json.loads((folder / SUMS).read_text()) == _sums(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        intact = False
    if not intact:
        print(f"{folder} is damaged: its SHA-256 sums are not those that were noted; training anew", flush=True)
    return load_tokenizer(folder) if intact else None


def _sums(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return {path.name: sha256_of_file(path) for path in paths}
