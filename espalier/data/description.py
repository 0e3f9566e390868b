"""The text of a run in words, for its introduction: where it is from, how much it is, and how often it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from espalier.data.config import DataConfig
from espalier.data.loader import Batches, Rows
from espalier.progress import amount

if TYPE_CHECKING:
    from espalier.data.prepare import Prepared

NAMES = 3
"""Files, sources or labels that are listed; of the others there is a number."""


def describe_text(
    config: DataConfig, prepared: Prepared, rows: Mapping[str, Rows], held_out: Mapping[str, Rows], eval_rows: int
) -> dict[str, str]:
    """Rows on the training and the held-out text. eval_rows: at most so many of its rows are evaluated."""
    if config.sources:
        shares = config.weights() or {}
        names = list(dict.fromkeys(spec.partition("=")[0] for spec in config.sources))
        source = listed([f"{name} ({shares[name]:.0%})" if name in shares else name for name in names])
    else:
        source = listed(config.files) if config.files else f"built-in {config.builtin}"
    apart = (
        listed(config.validation_files)
        if config.validation_files
        else f"{100 * config.validation_fraction:.3g} % of it"
    )
    held = sum(map(len, held_out.values()))
    evaluated = f", {eval_rows:,} of them evaluated" if eval_rows < held else ""
    return {
        "text": f"{source}: {_counts(prepared.train, rows)}",
        "held out": f"{apart}: {_counts(prepared.validation, held_out)}{evaluated}",
    }


def describe_epochs(batches: Batches, steps: int) -> str:
    """How often so many steps go through each source: "1.83 epochs"."""
    read = {name: entry["epochs"] for name, entry in batches.epochs(steps).items()}
    if len(read) == 1 or len({f"{epochs:.2g}" for epochs in read.values()}) == 1:
        return epochs_words(next(iter(read.values())))
    return "epochs: " + listed([f"{name} {epochs:.3g}" for name, epochs in read.items()])


def epochs_words(epochs: float) -> str:
    """1 epoch, 1.83 epochs."""
    return "1 epoch" if f"{epochs:.3g}" == "1" else f"{epochs:.3g} epochs"


def listed(names: Sequence[str], most: int = NAMES) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _counts(stores: Mapping, rows: Mapping[str, Rows]) -> str:
    documents, tokens = (sum(store.manifest[key] for store in stores.values()) for key in ("documents", "tokens"))
    return f"{documents:,} documents, {amount(tokens)} tokens in {sum(map(len, rows.values())):,} rows"
