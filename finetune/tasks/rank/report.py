"""The report of a ranker: its metrics beside BM25's, and queries with the texts that it ranks first.

predictions.jsonl  {"query_id", "query", "ndcg@10", "ranking": [{"text_id", "text", "score", "relevance"}]} a line
run.trec           what trec_eval reads: query Q0 text rank score name; qrels.trec: the judgements
"""

from __future__ import annotations

from html import escape

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

METRICS = {"ndcg@10": "nDCG@10", "map": "MAP", "mrr@10": "MRR@10", "recall@1": "recall@1", "recall@10": "recall@10"}
QUERIES, TEXTS = 6, 4
"""How many queries are shown, and texts of each."""


def sections(run: RunFiles) -> list[Section]:
    """The metrics beside those of BM25, the queries that went worst, and some that went best."""
    metrics, rows = run.summary.get("metrics") or {}, run.jsonl("predictions.jsonl")
    found = []
    if "baseline_ndcg@10" in metrics:
        bars = []
        for name, words in METRICS.items():
            bars += [(words, metrics[name], "this model"), (words, metrics[f"baseline_{name}"], "BM25")]
        note = (
            "Of the validation queries, as trec_eval and MS MARCO's script count; of what they rank, "
            f"{page.percent(metrics['candidates_recall'])} of all relevant texts are there to be found."
        )
        found.append(Section("Ranking", page.bars(bars), note))
    rows = sorted((row for row in rows if row["ranking"]), key=lambda row: row["ndcg@10"])
    if rows:
        chosen = rows if len(rows) <= QUERIES else rows[: QUERIES // 2] + rows[-(QUERIES // 2) :]
        note = (
            "The queries that went worst and best, each with the texts that are ranked first; ✓ = relevant. "
            "predictions.jsonl holds all."
        )
        found.append(Section("Queries", "".join(map(_query, chosen)), note, STYLE))
    return found


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the whole validation set."""
    metrics = run.summary.get("metrics") or {}
    shown = [("nDCG@10", "ndcg@10"), ("of BM25", "baseline_ndcg@10"), ("MRR@10", "mrr@10"), ("MAP", "map")]
    return [(words, page.percent(metrics[name])) for words, name in shown if name in metrics]


def _query(row: dict) -> str:
    items = []
    for text in row["ranking"][:TEXTS]:
        mark = "✓ " if text["relevance"] > 0 else ""
        body = page.marked("span", page.shortened(text["text"]))
        items.append(f"<li{' class=relevant' if mark else ''}>{mark}{body} <small>{text['score']:.2f}</small></li>")
    remark = escape(f"nDCG@10 {page.percent(row['ndcg@10'], 0)}")
    return (
        f"<div class=query>{page.marked('strong', row['query'])} <small>{remark}</small><ol>{''.join(items)}</ol></div>"
    )


STYLE = """
.query{margin:0 0 1.4rem}
.query ol{margin:.4rem 0 0;padding-left:1.4rem}
.query li{margin:.25rem 0;color:var(--soft)}
.query .relevant{color:inherit}
"""

REPORT = TaskReport(
    title=lambda config: "Ranker of texts by relevance",
    unit="example",
    sections=sections,
    tiles=tiles,
    pipeline="text-ranking",
    loader="AutoModelForSequenceClassification",
    words="fine-tuned to rank texts by their relevance to a query",
    metric_names=METRICS
    | {f"baseline_{name}": f"{words} of BM25" for name, words in METRICS.items()}
    | {"candidates_recall": "part of the relevant texts that are among the ranked ones"},
)
