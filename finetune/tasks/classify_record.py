"""What classification is: the record from which runs, reports and cards read it. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.tasks import FinetuneTask
from finetune.tasks.classify_report import REPORT

if TYPE_CHECKING:
    from finetune.tasks.classify import Classification


def read(*given) -> Classification:
    from finetune.tasks.classify import Classification

    return Classification(*given)


CLASSIFICATION = FinetuneTask(
    name="sequence_classification",
    head="sequence_classification",
    report=REPORT,
    splits_rows=False,
    reads=read,
)
