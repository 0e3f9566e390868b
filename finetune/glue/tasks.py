"""The nine tasks of GLUE: their files, columns, labels and official metrics. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One task, as its own files and the data sets `nyu-mll/glue` and `glue` of TFDS have it."""

    name: str
    """As it is printed: SST-2."""
    key: str
    """Configuration of the data sets, and folder of its runs: sst2."""
    folder: str
    """Of GLUE's own .tsv files; `key` in capitals is known too."""
    text: tuple[str, ...]
    """Columns of text in the .tsv files."""
    label: str
    """Column of labels there."""
    fields: tuple[str, ...]
    """Columns of text in the data sets, whose labels are the column `label`."""
    metrics: tuple[str, ...]
    """The official ones; their mean is the score of the task."""
    labels: tuple[str, ...] = ("0", "1")
    """By their numbers in the data sets, as GLUE's files and submissions spell them; none where it is a number."""
    classes: tuple[str, ...] = ()
    """What the data sets call them, where that is something else."""
    submitted: str = ""
    """Name of the file that the benchmark's server takes, where it is not the name of the task."""
    dev: str = "dev"
    test: str = "test"
    header: bool = True
    """CoLA's files for training have no line of names."""

    def label_of(self, value: str) -> str:
        """The label that a data set gives by its number or name; a number of STS-B stays as it is."""
        if not self.labels:
            return value
        names = self.classes or self.labels
        return self.labels[names.index(value) if value in names else int(value)]

    @property
    def submission(self) -> str:
        return f"{self.submitted or self.name}.tsv"


NLI = ("entailment", "not_entailment")
MNLI = GlueTask(
    name="MNLI",
    key="mnli",
    folder="MNLI",
    text=("sentence1", "sentence2"),
    label="gold_label",
    fields=("premise", "hypothesis"),
    metrics=("accuracy", "accuracy_mismatched"),
    labels=("entailment", "neutral", "contradiction"),
    submitted="MNLI-m",
    dev="dev_matched",
    test="test_matched",
)
MISMATCHED = ("dev_mismatched", "test_mismatched")
"""Further files of MNLI, with texts of other genres than the training's."""
FROM_MNLI = ("rte", "mrpc", "stsb")
"""Small tasks that published tables train on from the MNLI checkpoint (Liu et al. 2019)."""

GLUE = (
    GlueTask(
        "CoLA",
        "cola",
        "CoLA",
        ("sentence",),
        "label",
        ("sentence",),
        ("matthews",),
        header=False,
        classes=("unacceptable", "acceptable"),
    ),
    GlueTask(
        "SST-2", "sst2", "SST-2", ("sentence",), "label", ("sentence",), ("accuracy",), classes=("negative", "positive")
    ),
    GlueTask(
        "MRPC",
        "mrpc",
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("sentence1", "sentence2"),
        ("f1", "accuracy"),
        classes=("not_equivalent", "equivalent"),
    ),
    GlueTask(
        "STS-B",
        "stsb",
        "STS-B",
        ("sentence1", "sentence2"),
        "score",
        ("sentence1", "sentence2"),
        ("pearson", "spearman"),
        labels=(),
    ),
    GlueTask(
        "QQP",
        "qqp",
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("question1", "question2"),
        ("f1", "accuracy"),
        classes=("not_duplicate", "duplicate"),
    ),
    MNLI,
    GlueTask("QNLI", "qnli", "QNLI", ("question", "sentence"), "label", ("question", "sentence"), ("accuracy",), NLI),
    GlueTask("RTE", "rte", "RTE", ("sentence1", "sentence2"), "label", ("sentence1", "sentence2"), ("accuracy",), NLI),
    GlueTask(
        "WNLI",
        "wnli",
        "WNLI",
        ("sentence1", "sentence2"),
        "label",
        ("sentence1", "sentence2"),
        ("accuracy",),
        classes=NLI[::-1],
    ),
)
"""In the order of the paper's table."""
BY_KEY = {task.key: task for task in GLUE}
DIAGNOSTIC = ("AX", "ax", "diagnostic")
"""Name, configuration of the data sets, and file: sentence pairs that the MNLI model labels for the server."""

COLA_COLUMNS = ("source", "label", "star", "sentence")
