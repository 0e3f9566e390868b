"""The tokens of a plan's sources: written once, and refused where too many records are bad."""

from __future__ import annotations

import contextlib
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.data.config import DataConfig
from espalier.data.prepare.planning import Plan, cache_folder
from espalier.data.prepare.watched import Watched
from espalier.errors import UserError
from espalier.files import cache_key

if TYPE_CHECKING:
    from espalier.data.sources import Source
    from espalier.data.store import Encoded, TokenStore

REJECTS_SHOWN = 3
EARLY_ABORT_RECORDS = 1000
"""After so many records, more than half of them bad, the preparation stops without reading on."""


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
            print(f"tokenizing {label}: continuing after {done:,} documents", flush=True)
        return encode(islice(Watched(source, f"tokenizing {label}"), done, None), made.tokenizer, made.words)

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
    abort_early = records >= EARLY_ABORT_RECORDS and bad > max(allowed, 0.5) * records
    if bad <= allowed * records or not (ended or abort_early):
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
