"""The demo: pretrain a small encoder on the text that ships with Python, and measure what pretraining is worth.

`./launch.sh` runs it. A classifier (are the words of this sentence in order?) is fine-tuned from the checkpoint and,
with the same budget, from scratch. The baselines are TF-IDF with logistic regression, and the majority class. Neither
the tokenizer nor the pretraining has read the validation files of that task.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from espalier import cli
from espalier.errors import UserError


@dataclass(frozen=True)
class DemoConfig:
    """Pretrain, fine-tune and compare on built-in text; about 5 minutes on 2 CPU cores."""

    run_dir: str = "runs/demo"
    """The pretraining run; the two fine-tuned classifiers are its folders `pretrained` and `scratch`."""
    steps: int | None = None
    """Pretraining steps; unset = those of the `mlm demo` preset."""
    finetune_steps: int | None = None
    """Steps of each fine-tuning; unset = those of the `finetune demo` preset."""
    labels: int = 1000
    """Labelled sentences to learn from, half of them shuffled."""
    seed: int = 0
    """Seeds everything: weights, data order, masks, and which sentences are labelled."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        for name, least in (("steps", 1), ("finetune_steps", 1), ("labels", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}; leave it out for the demo as it is")


def main(config: DemoConfig) -> dict:
    """Run the demo; returns the `--json` object."""
    print("Espalier demo: tokenizer, masked-LM pretraining, two fine-tunings, one report.", flush=True)

    import finetune.train
    import mlm.presets
    import mlm.pretrain
    from espalier.data.builtin import demo_task
    from espalier.files import write_json
    from espalier.report.render import write_report
    from finetune.tasks.classify import record as classification

    root = Path(config.run_dir)
    task = demo_task(config.seed, config.labels)
    rows = {name: root / f"{name}.jsonl" for name in ("train", "validation")}
    for name, path in rows.items():
        if path.exists() and path.read_text(encoding="utf-8") != _jsonl(getattr(task, name)):
            raise UserError(
                f"{root} holds a demo with other labelled sentences; give its --seed and --labels, or another --run-dir"
            )
    pretraining = mlm.presets.demo()
    pretraining = replace(
        pretraining,
        # Its text is English, and so small a model has no room for two spellings of a word.
        data=replace(pretraining.data, builtin_exclude=tuple(sorted(task.validation_files)), lowercase=True),
        steps=pretraining.steps if config.steps is None else config.steps,
        seed=config.seed,
        run_dir=str(root),
    )
    print(f"\n1/3  Pretraining on Python's own documentation, without the {len(task.validation_files)} held-out files")
    pretrained = mlm.pretrain.main(pretraining)
    if not pretrained["finished"]:
        return _unfinished(pretrained)

    for name, path in rows.items():
        path.write_text(_jsonl(getattr(task, name)), encoding="utf-8")
    tuning = classification.demo()
    tuning = replace(
        tuning,
        data=replace(tuning.data, train=str(rows["train"]), validation=str(rows["validation"])),
        init_from=str(root),
        steps=tuning.steps if config.finetune_steps is None else config.finetune_steps,
        seed=config.seed,
    )
    accuracy = {}
    for number, (name, weights) in enumerate((("pretrained", "pretrained"), ("scratch", "random")), 2):
        print(f"\n{number}/3  Is a sentence in order? Learnt from {len(task.train):,} labelled ones, {weights} weights")
        run = finetune.train.main(replace(tuning, scratch=name == "scratch", run_dir=str(root / name)))
        if not run["finished"]:
            return _unfinished(run)
        accuracy[name] = run["metrics"]["accuracy"]
    accuracy["tfidf"] = tfidf_accuracy(task.train, task.validation)
    accuracy["majority"] = majority_accuracy(task.train, task.validation)

    judged = f"{len(task.validation)} sentences of files that nothing above has read"
    write_json(
        root / "comparison.json",
        {
            "title": "What is the pretraining worth?",
            "note": f"Accuracy on {judged}: are their words in order, or were they shuffled? Learnt from "
            f"{len(task.train):,} labelled sentences.",
            "rows": [
                {"name": NAMES[name][0], "note": NAMES[name][1], "value": value, "run": name if name in RUNS else None}
                for name, value in accuracy.items()
            ],
        },
    )
    report = write_report(root)
    print(f"\nAre the words in order? Accuracy on {judged}")
    for name, value in accuracy.items():
        print(f"  {NAMES[name][0]:32}{value:6.1%}   {NAMES[name][1]}")
    print(f"Report: {report}", flush=True)
    return {
        **{f"{name}_accuracy": value for name, value in accuracy.items()},
        **{name: pretrained[name] for name in ("step", "loss", "eval", "tokens", "tokens_per_second")},
        "first_step_seconds": pretrained["first_step_seconds"],
        "run_dir": str(root),
        "report": str(report),
    }


RUNS = ("pretrained", "scratch")
NAMES = {
    "pretrained": ("Pretrained, then fine-tuned", "masked LM on text without labels, then the labelled examples"),
    "scratch": ("The same model from scratch", "the same fine-tuning from random weights"),
    "tfidf": ("TF-IDF + logistic regression", "words and word pairs, scikit-learn"),
    "majority": ("Majority class", "the most frequent label, always"),
}


def _unfinished(run: dict) -> dict:
    """The `--json` object after one of the runs was stopped."""
    return {name: run[name] for name in ("step", "run_dir", "finished", "stopped_by")}


def _jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tfidf_accuracy(train: list[dict[str, str]], validation: list[dict[str, str]]) -> float:
    """Accuracy of logistic regression on TF-IDF of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    texts, labels = ([[row[field] for row in rows] for rows in (train, validation)] for field in ("text", "label"))
    return float(model.fit(texts[0], labels[0]).score(texts[1], labels[1]))


def majority_accuracy(train: list[dict[str, str]], validation: list[dict[str, str]]) -> float:
    """Accuracy of always giving the most frequent training label (the first in alphabetical order among equals)."""
    counts = Counter(row["label"] for row in train)
    best = min(counts, key=lambda label: (-counts[label], label))
    return sum(row["label"] == best for row in validation) / len(validation)


if __name__ == "__main__":
    cli.run_config(main, DemoConfig, prog="demo")
