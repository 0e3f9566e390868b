"""What ranking is: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData
from finetune.task import FinetuneTask
from finetune.tasks.rank.report import REPORT


@dataclass(frozen=True)
class RankData(FinetuneData):
    """Queries and texts with what is relevant: a file (query, text, relevance; query, positives, negatives; MS MARCO's
    triples), or a folder in the layout of BEIR (corpus.jsonl) or MS MARCO (collection.tsv)."""

    query: str | None = often(None)
    """Column of queries; unset = guessed (query, question, …)."""
    text: str | None = often(None)
    """Column of texts; unset = guessed (text, passage, document, …)."""
    label: str | None = None
    """Column of relevance: 0, 1 or grades; unset = guessed (relevance, label, score, …)."""
    position: str | None = None
    """Column with the position at which a text of the training file was shown, 1 = first: the label is then a click,
    weighed by how likely it was to be looked at there."""
    position_bias: float = 1.0
    """η: at position k a text is looked at with the probability (1/k)^η; 0 takes clicks for relevance as they are."""
    propensity: str | None = None
    """Column with that probability itself, instead of a position."""
    propensity_clip: float = 0.0
    """Smaller probabilities are taken for this one: some bias, less noise."""
    negatives: int = often(7)
    """Irrelevant texts for each relevant one that are learnt from, where the file does not pair them itself."""
    depth: int = 100
    """Where nothing says which texts a query ranks: the first that BM25 finds among all of the file or folder."""
    run: str | None = None
    """What the validation queries rank, of another search: a TREC run, or MS MARCO's lines (query, text, rank)."""
    eval_queries: int = 200
    """Validation queries that are measured during the training, at most; at its end all are."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("negatives", "depth", "eval_queries"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least 1")
        if self.position is not None and self.propensity is not None:
            raise UserError(
                f"data.position={self.position} and data.propensity={self.propensity} say the same thing in two ways; "
                "give one"
            )
        if not self.position_bias >= 0 or not 0 <= self.propensity_clip < 1:
            raise UserError(
                f"data.position_bias={self.position_bias} (0 or more), data.propensity_clip={self.propensity_clip} (0 "
                "or more, below 1): correct what is out of range"
            )


@dataclass(frozen=True)
class RankConfig(FinetuneConfig):
    """A fine-tuning run that learns how relevant a text is to a query."""

    task: ClassVar[str] = "ranking"
    loss: Literal["bce", "softmax"] = often("bce")
    """bce: each pair by itself, cross-entropy of its relevance. softmax: each relevant text against the irrelevant ones
    of its query (each clicked one against the others); a row of the batch is then such a group."""
    data: RankData = field(default_factory=RankData)


def rank() -> RankConfig:
    """Rank texts by relevance: `./launch.sh finetune rank --init-from RUN --data.train F --data.validation F`.

    From an mlm or a clm run. Three epochs of batches of 32 pairs; with --loss softmax of 32 groups (Nogueira and Cho
    2019; Gao et al. 2021, "Rethink training of BERT rerankers").
    """
    return RankConfig(log_every=10, checkpoint=CheckpointConfig(every=1000))


RANKING = FinetuneTask(
    name="ranking",
    head="sequence_classification",
    report=REPORT,
    data=RankData,
    splits_rows=False,
    place="finetune.tasks.rank.task:Ranking",
)
