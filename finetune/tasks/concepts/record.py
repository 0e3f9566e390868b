"""What classification by concepts is: its settings, preset and record. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from espalier.errors import UserError
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneOptimizer
from finetune.task import FinetuneTask
from finetune.tasks.classify.record import ClassifyData
from finetune.tasks.concepts.report import REPORT


@dataclass(frozen=True)
class ConceptData(ClassifyData):
    """Labelled texts, with a column for each concept or a file of concepts that an embedding model scores."""

    concepts: tuple[str, ...] = often(())
    """Columns of numbers (0 and 1, or any), one for each concept."""
    concept_file: str | None = None
    """Instead of columns: a file with a concept a line, in words ("praises the acting")."""

    def __post_init__(self):
        super().__post_init__()
        if self.concepts and self.concept_file:
            raise UserError("data.concepts are columns, data.concept_file is scored by a model; give one of them")
        if len(set(self.concepts)) < len(self.concepts):
            raise UserError(f"data.concepts={', '.join(self.concepts)}: a column is named twice")

    @property
    def others(self) -> tuple[str, ...]:
        return (*super().others, *self.concepts)


@dataclass(frozen=True)
class ConceptSettings:
    """How concepts are scored and learnt."""

    scorer: str | None = None
    """Run or hf: model whose embeddings say how near a text is to each line of data.concept_file."""
    weight: float = 1.0
    """Of the squared error of the concept scores, beside the nats of the class."""
    joint: bool = False
    """Let the class, too, change what the concepts say: a little more accurate, and less to be believed."""
    sparsity: float = 0.0
    """Price on the sum of the class layer's absolute weights: fewer concepts a class. Try 0.001."""

    def __post_init__(self):
        if not self.weight > 0 or self.sparsity < 0:
            raise UserError(
                f"concepts.weight={self.weight} must be above 0, and concepts.sparsity={self.sparsity} not below it"
            )


@dataclass(frozen=True)
class ConceptConfig(FinetuneConfig):
    """A fine-tuning run that learns to classify texts by what is said of them."""

    task: ClassVar[str] = "concepts"
    data: ConceptData = field(default_factory=ConceptData)
    concepts: ConceptSettings = field(default_factory=ConceptSettings)

    def __post_init__(self):
        super().__post_init__()
        for name, default in (("examples_per_row", 1), ("rationale", None), ("calibration_part", 0)):
            if getattr(self.data, name) != default:
                raise UserError(f"data.{name}: classification by concepts does not have it; leave it out")
        if self.data.class_weights != "none":
            raise UserError("data.class_weights: classification by concepts does not have it; leave it out")
        if bool(self.data.concept_file) != bool(self.concepts.scorer):
            raise UserError(
                "concepts in words are scored by an embedding model: give both --data.concept-file FILE and "
                "--concepts.scorer RUN|hf:ID"
            )


def concepts() -> ConceptConfig:
    """Classify by concepts: `./launch.sh finetune concepts --init-from RUN --data.train F --data.concepts A B C …`.

    The model scores named concepts, and a linear layer makes the class of them (docs/tasks/concepts.md).
    """
    return ConceptConfig(
        log_every=10,
        checkpoint=CheckpointConfig(every=1000),
        # A layer of few numbers that begins at 0, and whose loss has one valley.
        optimizer=FinetuneOptimizer(rate_scales=((r"head/concept_classes", 30.0),)),
    )


CONCEPTS = FinetuneTask(
    name="concepts",
    head="sequence_classification",
    report=REPORT,
    data=ConceptData,
    splits_rows=False,
    exports=False,
    place="finetune.tasks.concepts.task:Concepts",
)
