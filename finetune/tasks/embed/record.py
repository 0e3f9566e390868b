"""What learning sentence embeddings is: its settings, preset, and the record that runs, reports and cards read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData
from finetune.task import FinetuneTask
from finetune.tasks.embed.report import REPORT


@dataclass(frozen=True)
class EmbedData(FinetuneData):
    """Pairs of texts that belong together, triplets, queries with positives and negatives, or pairs with a score.

    .tsv, .csv, .jsonl, .json, .parquet (also .gz, .zst, URLs), or hf:…, tfds:…; a field of .jsonl may hold a list.
    """

    query: str | None = often(None)
    """Column of the first text; unset = guessed (query, anchor, question, sentence1 …, or the first of two)."""
    positive: str | None = often(None)
    """Column of the text that belongs to it, or of a list of them; unset = guessed (positive, document, answer …)."""
    negatives: tuple[str, ...] = often(())
    """Columns of hard negatives, texts or lists of them; unset = guessed (negative, negatives, negative_1 …)."""
    score: str | None = None
    """Column that says how alike the two texts are, in numbers; unset = guessed (score, similarity_score …)."""
    label: str | None = None
    """Column that says by 1 or 0 whether the two texts belong together; unset = guessed (label, Quality …)."""
    hard_negatives: int = 4
    """Of a query in a batch, at most; of more there are others in each epoch."""

    def __post_init__(self):
        super().__post_init__()
        if self.hard_negatives < 0:
            raise UserError(f"data.hard_negatives={self.hard_negatives} must be 0 or more; try 4")


@dataclass(frozen=True)
class EmbedConfig(FinetuneConfig):
    """A fine-tuning run that learns sentence embeddings."""

    SELDOM: ClassVar[tuple[str, ...]] = ("stop_at", "scratch")

    task: ClassVar[str] = "sentence_embedding"
    data: EmbedData = field(default_factory=EmbedData)
    pooling: Literal["mean", "first", "last"] | None = often(None)
    """Mean of a text's states, or its first or last one; unset = as the model says, else mean (causal: last)."""
    temperature: float = often(0.05)
    """What cosines are divided by."""
    symmetric: bool = False
    """Let each positive find its query too, not only each query its positive."""
    matryoshka: tuple[int, ...] = ()
    """Sizes to which embeddings may be cut: the loss is summed over these and the whole (Kusupati et al. 2022)."""
    scored: Literal["cosent", "cosine"] = "cosent"
    """The loss of pairs with a score: their order within the batch (CoSENT), or the square error of the cosine."""

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature} must be greater than 0; try 0.05")
        if any(size < 1 for size in self.matryoshka):
            raise UserError(f"matryoshka={' '.join(map(str, self.matryoshka))}: sizes are 1 or more; try 128 64")


def embed() -> EmbedConfig:
    """Sentence embeddings: `./launch.sh finetune embed --init-from RUN --data.train F --data.validation F`.

    From an mlm or a clm run, or hf:ID. Each text finds its own among those of the batch: --batch-size decides how many
    there are, and --accumulation cuts what is in memory at once, not what it is compared with (Gao et al. 2021).
    """
    return EmbedConfig(batch_size=64, log_every=10, checkpoint=CheckpointConfig(every=1000))


SENTENCE_EMBEDDING = FinetuneTask(
    name="sentence_embedding",
    head="embedding",
    report=REPORT,
    data=EmbedData,
    splits_rows=False,
    place="finetune.tasks.embed.task:SentenceEmbedding",
)
