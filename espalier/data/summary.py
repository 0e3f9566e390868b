"""A summary of prepared text for people: counts, what was dropped and why, row fill, a histogram of lengths."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from espalier.data.config import DataConfig
from espalier.data.documents import KINDS
from espalier.data.packing import fill, pack_best_fit, pack_split
from espalier.data.scripts import samples
from espalier.data.store import REJECTS, TokenStore
from espalier.data.tokenizer import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.data.prepare import Prepared

PICTURE = "lengths.svg"


def summarise(prepared: Prepared, config: DataConfig, causal: bool, texts: Iterable[str]) -> dict:
    """Print it, draw the lengths beside the tokens of the training text, and return it as JSON values.

    texts: the documents of the training text, of which the beginning is read.
    """
    print(f"tokenizer: {vocabulary_size(prepared.tokenizer):,} tokens")
    summary: dict = {"vocab_size": vocabulary_size(prepared.tokenizer), "fingerprints": prepared.fingerprints}
    summary["scripts"] = _describe_scripts(texts, prepared.tokenizer)
    for side, stores in (("train", prepared.train), ("validation", prepared.validation)):
        entries = {
            name: _describe(side, name, store, config, causal, prepared.tokenizer) for name, store in stores.items()
        }
        # A single source needs no name.
        summary[side] = next(iter(entries.values())) if len(entries) == 1 else entries
    if prepared.words:
        summary["words"] = prepared.words
    if weights := config.weights():
        print("mixture:   ", ", ".join(f"{name} {weight:.1%}" for name, weight in weights.items()))
        summary["mixture"] = weights
    first = next(iter(prepared.train.values()))
    summary["picture"] = str(draw_lengths(prepared.train, config.sequence_length, first.folder / PICTURE))
    print(f"lengths:    {summary['picture']}")
    return summary


def _describe_scripts(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    """Print how the tokenizer writes each script of the text."""
    found = samples(texts, tokenizer)
    lossless = tokenizer.unk_token_id is None
    for sample in found:
        share = "none unknown" if lossless else f"{sample.unknown:.2%} [UNK]"
        print(f"{sample.script:10}  {share}; {' | '.join(sample.tokens)}")
    return [sample._asdict() for sample in found]


def _describe(
    side: str, name: str, store: TokenStore, config: DataConfig, causal: bool, tokenizer: PreTrainedTokenizerFast
) -> dict:
    """Print one store and return its figures."""
    entry = {key: store.manifest[key] for key in ("documents", "tokens", "bytes", "rejected", "repaired")}
    entry["dropped"] = store.manifest["filtered"] | store.manifest["dropped"]
    documents, tokens, size = (entry[key] for key in ("documents", "tokens", "bytes"))
    plan = (pack_split if causal else pack_best_fit)(store.offsets, config.sequence_length)
    entry |= {
        "folder": str(store.folder),
        "bytes_per_token": size / max(tokens, 1),
        "unknown": _unknown(store, tokenizer),
        "rows": plan.rows,
        "fill": fill(plan, config.sequence_length),
        "lengths": _quantiles(np.diff(store.offsets)),
    }
    label = side if name in ("text", side) else f"{side} {name}"
    ratio = f"{size / max(tokens, 1):.2f} bytes a token"
    ratio += "" if tokenizer.unk_token is None else f"  {entry['unknown']:.3%} {tokenizer.unk_token}"
    print(f"{label:10}  {documents:,} documents  {tokens:,} tokens  {size:,} bytes  {ratio}")
    print(f"{'':10}  {plan.rows:,} rows of {config.sequence_length}, {entry['fill']:.2%} full; {store.folder}")
    for key, reasons in (("rejected", KINDS), ("repaired", KINDS), ("dropped", {})):
        if counts := entry[key]:
            words = ", ".join(f"{count:,} {reasons.get(kind, kind)}" for kind, count in counts.items())
            print(f"{'':10}  {key}: {words}" + (f"; see {store.folder / REJECTS}" if reasons else ""))
    return entry


def _unknown(store: TokenStore, tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of the tokens that stand for what the tokenizer does not know; 0 where it knows everything."""
    size = vocabulary_size(tokenizer)
    unknown = tokenizer.unk_token_id
    return 0.0 if unknown is None else float(store.counts(size)[unknown] / store.manifest["tokens"])


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Tokens in the shortest, the middle … document."""
    if not len(lengths):
        return {}
    names = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}
    return {name: int(np.quantile(lengths, at)) for name, at in names.items()}


def draw_lengths(stores: dict[str, TokenStore], sequence_length: int, path: Path) -> Path:
    """A histogram of the tokens in the documents of each source, on a logarithmic scale, beside the row length."""
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    lengths = {name: np.maximum(np.diff(store.offsets), 1) for name, store in stores.items()}
    longest = max((int(values.max()) for values in lengths.values() if len(values)), default=1)
    bins = np.geomspace(1, max(longest, sequence_length) * 1.1, 50)
    for name, values in lengths.items():
        label = f"{name}: {len(values):,} documents" if len(stores) > 1 else f"{len(values):,} documents"
        axes.hist(values, bins=bins.tolist(), alpha=0.6, label=label)
    axes.axvline(sequence_length, color="black", linestyle="--", linewidth=1, label=f"row of {sequence_length} tokens")
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    # Text as text, for whoever shows the picture has fonts for the names of sources, and matplotlib may have none.
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path)
    return path
