"""Text → tokenizer → tokens on disk: `python -m espalier.data.prepare --data.files 'text/*.txt'`.

What is written is keyed by the fingerprints of the text and of the tokenizer: the same inputs are tokenized once,
however many runs use them, a changed tokenizer never meets the tokens of another, and what was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from espalier import cli, progress
from espalier.data.config import DataConfig
from espalier.errors import UserError
from espalier.files import appearing, cache_key, make_folder, replacing, sha256_of_file, sha256_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.data.documents import Item
    from espalier.data.filters import Decisions, Measure
    from espalier.data.sources import Source
    from espalier.data.store import Encoded, TokenStore

SUMS = "sums.json"
REJECTS_SHOWN = 3
MOST_UNKNOWN = 0.001
"""The share of [UNK] above which people are warned."""
LOOKED_AT = 2**22
"""Tokens of a store among which [UNK] is counted."""
HOPELESS = 1000
"""After this many records, more than half of them bad, nobody needs to wait for the end."""


class Prepared(NamedTuple):
    """What a pretraining run reads."""

    tokenizer: PreTrainedTokenizerFast
    train: dict[str, TokenStore]
    """By the name of the source; "text" where there is one without a name."""
    validation: dict[str, TokenStore]
    """By the name of the source it was held out of; "validation" where it was given."""
    fingerprints: dict[str, str]
    """SHA-256 of `tokenizer`, `train` and `validation`: the same values, the same tokens."""
    words: dict[str, str]
    """The segmenter of each script by which word starts are stored (data.words); {} where they are not."""


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


def prepare(
    config: DataConfig,
    vocab_size: int,
    *,
    for_masked_lm: bool,
    of_weights: PreTrainedTokenizerFast | None = None,
    whole_words: bool = False,
    words: dict[str, str] | None = None,
) -> Prepared:
    """Tokens of the training and the held-out text, from the cache where they are there already.

    The tokenizer is `of_weights`, that of the weights that are taken, because weights and tokens belong together; else
    config.tokenizer, else one of at most vocab_size tokens, trained on the training text alone. A config.tokenizer
    that is not that of the weights is an error, and so is a source of which nothing is left.
    whole_words: words are masked whole, so that an unset config.words means the segmenters that are there.
    words: those of a run that goes on, {} where it began without; with others than are here, an error.
    """
    made = plan(
        config, vocab_size, for_masked_lm=for_masked_lm, of_weights=of_weights, whole_words=whole_words, words=words
    )
    stores = {
        side: {name: write_tokens(config, made, side, name) for name in sources} for side, sources in made.sides.items()
    }
    for store in chain.from_iterable(found.values() for found in stores.values()):
        _check_any_tokens(store, config)
    for store in stores["train"].values():
        _warn_of_unknown(store, made.tokenizer)
    return Prepared(made.tokenizer, **stores, fingerprints=made.fingerprints, words=made.words)


def _warn_of_unknown(store: TokenStore, tokenizer: PreTrainedTokenizerFast) -> None:
    """One line where more than MOST_UNKNOWN of the tokens at the store's beginning are [UNK]."""
    import numpy as np

    if tokenizer.unk_token_id is None:
        return
    ids = store.take(np.arange(min(store.manifest["tokens"], LOOKED_AT)))
    share = float(np.mean(ids == tokenizer.unk_token_id))
    if share > MOST_UNKNOWN:
        progress.say(
            f"warning: {share:.2%} of the tokens of {store.label} are {tokenizer.unk_token}, which a model cannot tell "
            "apart; train a tokenizer with --data.alphabet 1 or a larger vocabulary, or --data.tokenizer-kind bpe, "
            "which knows every character (`prepare` shows each script)"
        )


def _check_any_tokens(store: TokenStore, config: DataConfig) -> None:
    counts = store.manifest
    if counts["tokens"]:
        return
    dropped = counts["filtered"] | counts["dropped"]
    if dropped:
        listed = ", ".join(f"{count:,} by {reason}" for reason, count in dropped.items())
        why, advice = f"the filters have dropped {listed}", "change --data.filters, or add text"
    elif config.validation_files:
        why, advice = "it is empty", "add text"
    else:
        why = f"it is empty or too short to hold a part of {config.validation_fraction:.4g} out"
        advice = "add text, name --data.validation-files, or change --data.validation-fraction"
    raise UserError(f"{store.label} makes no row of tokens: {why}; {advice}")


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
        texts = (item.text for item in documents(_Watched(source, "comparing documents")))
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
        texts = (item.text for item in chain.from_iterable(documents(_Watched(source, label)) for source in sources))
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


def tokens_folder(config: DataConfig, made: Plan, side: str, name: str) -> Path:
    """Where the tokens of a source lie, whoever writes them."""
    limit = config.filters.max_tokens_per_character
    # What is not asked for is left out, so that the tokens of older versions are found.
    asked = [part for part in (limit, made.words) if part]
    key = cache_key(made.keys[side][name], made.fingerprints["tokenizer"], *asked)
    return cache_folder(config) / f"tokens-{key}"


def write_tokens(
    config: DataConfig, made: Plan, side: str, name: str, part: Source | None = None, folder: Path | None = None
) -> TokenStore:
    """The tokens of one source of the plan, or of a part of it in a folder of its own."""
    from espalier.data.encode import encode
    from espalier.data.store_writer import write_store
    from espalier.data.tokenizer import vocabulary_size

    source = part or made.sides[side][name]
    folder = folder or tokens_folder(config, made, side, name)
    label = f"{side} text" if name in ("text", side) else f"{side} text of {name}"
    limit = config.filters.max_tokens_per_character
    dtype = "uint16" if vocabulary_size(made.tokenizer) <= 2**16 else "uint32"
    about = {"source": made.keys[side][name], "tokenizer": made.fingerprints["tokenizer"]}
    about |= {"filtered": getattr(source, "dropped", {})} | ({"words": made.words} if made.words else {})

    def items_from(done: int):
        if done:
            print(f"tokenizing {label}: going on behind {done:,} documents", flush=True)
        return encode(islice(_Watched(source, f"tokenizing {label}"), done, None), made.tokenizer, made.words)

    def keep(encoded: Encoded) -> str | None:
        return "tokens per character" if limit and len(encoded.ids) > limit * encoded.characters else None

    def check(counts: dict[str, Any], ended: bool) -> None:
        if part is None:
            check_share(counts, ended, config.max_rejected, label, folder.with_name(f".{folder.name}.unfinished"))

    store = write_store(folder, items_from, dtype, about, keep=keep, check=check)
    store.label = label
    if part is None:
        # Also where the store was there already: another run may have allowed more.
        check_share(store.manifest, True, config.max_rejected, label, store.folder)
    return store


def check_share(counts: dict[str, Any], ended: bool, allowed: float, label: str, folder: Path) -> None:
    """UserError where more than this share of the records was rejected. folder: of the rejects."""
    from espalier.data.store import REJECTS

    bad, records = sum(counts["rejected"].values()), counts["records"]
    hopeless = records >= HOPELESS and bad > max(allowed, 0.5) * records
    if bad <= allowed * records or not (ended or hopeless):
        return
    shown: list[dict] = []
    with contextlib.suppress(OSError, ValueError), (folder / REJECTS).open(encoding="utf-8") as file:
        dropped = (line for line in file if '"dropped": true' in line)
        shown = [json.loads(line) for line in islice(dropped, REJECTS_SHOWN)]
    first = "; ".join(f"{entry['name']}: {entry['message']}" for entry in shown)
    raise UserError(
        f"{label}: {bad:,} of {records:,} records are bad ({bad / records:.1%}; at most {allowed:.0%}): {first}"
        f"{' …' if bad > len(shown) else ''}; all are listed in {folder / REJECTS}; correct them, or allow more with "
        "--data.max-rejected"
    )


class _Watched:
    """The items of a source, with a progress bar for each time that they are gone through."""

    def __init__(self, source: Source, label: str):
        self._source, self._label = source, label

    def __iter__(self) -> Iterator[Item]:
        from tqdm import tqdm

        from espalier.data.documents import Document

        bar = tqdm(
            desc=self._label,
            total=self._source.size(),
            unit="B",
            unit_scale=True,
            mininterval=0.5,
            leave=False,
            disable=None,
        )
        with bar, progress.waiting(self._label, bar=True):
            for item in self._source:
                yield item
                if isinstance(item, Document):
                    bar.update(len(item.text.encode()))


@dataclass(frozen=True)
class PrepareConfig:
    """Train or load a tokenizer and tokenize text, so that a pretraining run with the same flags starts at once."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: int = 30522
    """Size of a tokenizer that is trained here."""
    causal: bool = False
    """For `clm` instead of `mlm`: a byte-level tokenizer then needs no [MASK]."""
    verify: bool = False
    """Compare everything that is prepared with its SHA-256, too; exit code 2 where a file is damaged."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: PrepareConfig) -> dict:
    """Prepare the text and say what is there."""
    from espalier.data.summary import summarise

    prepared = prepare(config.data, config.vocab_size, for_masked_lm=not config.causal)
    if config.verify:
        stores = [*prepared.train.values(), *prepared.validation.values()]
        damaged = [str(path) for store in stores for path in store.damaged()]
        if damaged:
            raise UserError(
                f"{len(damaged)} of the prepared files are damaged: {', '.join(damaged[:5])}; delete their folders and "
                "prepare the text again"
            )
        print(f"verified: {len(stores)} stores and their tokenizer are what was written")
    return summarise(prepared, config.data, config.causal, _training_texts(config.data))


def _training_texts(config: DataConfig) -> Iterator[str]:
    """The documents of the training text, source after source."""
    from espalier.data.documents import documents
    from espalier.data.sources import open_sources

    sides = open_sources(config, cache_folder(config), lambda source: filtered(source, config))
    return (item.text for source in sides.train.values() for item in documents(source))


if __name__ == "__main__":
    cli.run_config(main, PrepareConfig, prog="prepare")
