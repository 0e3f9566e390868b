"""Hard negatives for `finetune embed`: what a model takes for near to a query, and does not belong to it.

    ./launch.sh mine RUN mined.jsonl --data.train pairs.tsv

A text that is as near as the positive is often right too, and only unlabelled; so a negative's cosine must be a part of
the positive's below it (Moreira et al. 2024, "perc pos").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import cli, progress
from espalier.errors import UserError
from espalier.short_help import often
from finetune.tasks.embed.record import EmbedData

if TYPE_CHECKING:
    import numpy as np

    from finetune.tasks.embed.examples import Pairs


@dataclass(frozen=True)
class MineConfig:
    """Find hard negatives with a model: `mine RUN OUTPUT --data.train F`."""

    model: str
    """Whose embeddings decide: a run directory, or hf:PATH_OR_ID."""
    output: str
    """The new file (.jsonl), a line a query: query, positives, negatives; `finetune embed` reads it."""
    data: EmbedData = field(default_factory=EmbedData)
    negatives: int = often(5)
    """Of a query, at most; those that the file has come first."""
    margin: float = often(0.05)
    """How far below the cosine of the positive that of a negative must be at least, as a part of it."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if self.negatives < 1:
            raise UserError(f"negatives={self.negatives} must be 1 or more; try 5")
        if not 0 <= self.margin < 1:
            raise UserError(f"margin={self.margin} must be at least 0 and below 1; try 0.05")


def main(config: MineConfig) -> dict:
    """Write the file as a whole; returns the `--json` object."""
    from espalier.files import replacing
    from espalier.loading import load
    from espalier.predict.embed import embed, unit
    from finetune.tasks.embed.examples import read_pairs

    path = Path(config.output).expanduser()
    if path.suffix != ".jsonl":
        raise UserError(f"{config.output}: hard negatives are written as .jsonl; give such a name")
    if path.exists():
        raise UserError(f"{config.output} exists already; give the name of a new file")
    pairs = read_pairs(config.data, "train")
    if pairs.scored:
        raise UserError(
            f"{config.data.train} has scores; hard negatives are for pairs that belong together: name their columns "
            "with --data.query and --data.positive, in a file without scores"
        )
    with progress.waiting(f"loading {config.model}"):
        model = load(config.model)
    with progress.waiting(f"embedding {len(pairs.texts):,} texts"):
        x_TD = unit(embed(model, pairs.texts))
    rows = list(mined(pairs, x_TD, config.negatives, config.margin))
    os.makedirs(path.parent, exist_ok=True)
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row, _ in rows)
    found, dropped = sum(len(row["negatives"]) for row, _ in rows), sum(count for _, count in rows)
    progress.say(f"{config.output}: {len(rows):,} queries with {found / len(rows):.1f} hard negatives each")
    if dropped:
        progress.say(
            f"{dropped:,} negatives of {config.data.train} are left out: they are not {config.margin:.0%} below"
        )
    return {"output": str(path), "queries": len(rows), "negatives": found, "dropped": dropped}


def mined(pairs: Pairs, x_TD: np.ndarray, most: int, margin: float) -> Iterator[tuple[dict[str, Any], int]]:
    """(query, positives, negatives; how many of its own negatives were too near), of each query.

    x_TD: an embedding of each text, of length 1. Of several positives the one with the least cosine counts.
    """
    import numpy as np

    from finetune.tasks.embed.metrics import cosines, documents

    documents_C = documents(pairs)
    for query, cosines_C in cosines(pairs, documents_C, x_TD):
        right, own = pairs.known[query], pairs.negatives.get(query, ())
        least = cosines_C[np.isin(documents_C, right)].min()
        fitting_C = cosines_C <= least - margin * abs(least)
        fitting_C &= ~np.isin(documents_C, [query, *right])
        order = documents_C[fitting_C][np.argsort(-cosines_C[fitting_C], kind="stable")]
        kept = [int(text) for text in order if text in own]
        chosen = [*kept, *(int(text) for text in order[: most + len(kept)] if text not in own)][:most]
        row = {
            "query": pairs.texts[query],
            "positives": [pairs.texts[text] for text in right],
            "negatives": [pairs.texts[text] for text in chosen],
        }
        yield row, len(own) - len(kept)


if __name__ == "__main__":
    cli.run_config(main, MineConfig, prog="mine")
