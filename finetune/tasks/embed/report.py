"""The report of a bi-encoder: metrics beside those of the model before tuning, and the queries that find theirs last.

predictions.jsonl  {"query", "positive", "nearest", "rank", "cosine", "nearest_cosine"} a line, of each query; of scored
                   pairs {"text", "text_b", "score", "cosine"}
"""

from __future__ import annotations

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

SHOWN = 8
"""How many queries or pairs are shown."""
TILES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "recall@10": "recall@10",
    "spearman": "Spearman",
    "pearson": "Pearson",
}


def sections(run: RunFiles) -> list[Section]:
    """What is furthest from right."""
    rows = run.jsonl("predictions.jsonl")
    if not rows:
        return []
    if "rank" in rows[0]:
        late = sorted((row for row in rows if row["rank"] > 1), key=lambda row: -row["rank"])
        if not late:
            return []
        note = f"{len(late):,} of {len(rows):,} queries have another document nearer than theirs; the last ones of all."
        return [Section("Late finds", page.entries(map(_late, late[:SHOWN])), note)]
    order = sorted(range(len(rows)), key=lambda at: rows[at]["cosine"])
    by_score = sorted(range(len(rows)), key=lambda at: rows[at]["score"])
    place, wanted = ({at: number for number, at in enumerate(ordered)} for ordered in (order, by_score))
    worst = sorted(range(len(rows)), key=lambda at: -abs(place[at] - wanted[at]))[:SHOWN]
    note = f"Pairs whose cosine is furthest from the place that their score has among {len(rows):,} pairs."
    return [Section("Furthest off", page.entries(_pair(rows[at]) for at in worst), note)]


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the whole validation file, those before tuning behind them."""
    final = run.summary.get("metrics") or {}
    shown = []
    for name, words in TILES.items():
        if name in final:
            shown.append((words, f"{final[name]:.3f}"))
            if f"{name}_before" in final and name in ("ndcg@10", "spearman"):
                shown.append((f"{words} before tuning", f"{final[f'{name}_before']:.3f}"))
    return shown


def _late(row: dict) -> tuple[str, str, str]:
    return (
        page.shortened(row["query"], 160),
        f"rank {row['rank']:,}",
        f"{page.shortened(row['positive'], 160)} ✗ {page.shortened(row['nearest'], 160)}",
    )


def _pair(row: dict) -> tuple[str, str, str]:
    return (
        f"score {row['score']:g}",
        f"cosine {row['cosine']:.2f}",
        f"{page.shortened(row['text'], 160)} / {page.shortened(row['text_b'], 160)}",
    )


REPORT = TaskReport(
    title=lambda config: "Sentence embeddings",
    unit="pair",
    sections=sections,
    tiles=tiles,
    pipeline="sentence-similarity",
    loader="AutoModel",
    words="fine-tuned for sentence embeddings",
    metric_names={
        "ndcg@10": "nDCG@10",
        "map": "MAP",
        "mrr@10": "MRR@10",
        **{f"{name}_before": f"{words} before tuning" for name, words in TILES.items()},
    },
)
