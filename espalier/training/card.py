"""The model card of a run: README.md beside exported weights, as the Hub shows it, from the run's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from espalier.training.run import RunDirectory

TASKS = {
    "masked_lm": ("fill-mask", "AutoModelForMaskedLM", "pretrained by masked language modelling"),
    "causal_lm": ("text-generation", "AutoModelForCausalLM", "pretrained by causal language modelling"),
    "sequence_classification": (
        "text-classification",
        "AutoModelForSequenceClassification",
        "fine-tuned to classify texts",
    ),
    "token_classification": ("token-classification", "AutoModelForTokenClassification", "that classifies tokens"),
    "question_answering": ("question-answering", "AutoModelForQuestionAnswering", "that finds answers in a text"),
    "replaced_token_detection": ("feature-extraction", "AutoModelForPreTraining", "that finds replaced tokens"),
    "embedding": ("feature-extraction", "AutoModel", "that embeds texts"),
}
"""Task of a run → pipeline, class, and what the model is in words."""


def model_card(run_dir: str | Path) -> str:
    """The card: what the model is, how to load it, its data, settings, results, and the command that made it."""
    run = RunDirectory(run_dir)
    config, summary = (_read(path) for path in (run.config, run.summary))
    pipeline, loader, words = TASKS[config["task"]]
    base = config.get("imported_from") or config.get("init_from") or ""
    front = ["library_name: transformers", f"pipeline_tag: {pipeline}", "tags:", "- espalier", "- jax"]
    if base.startswith("hf:") and not Path(base[3:]).expanduser().exists():
        front.append(f"base_model: {json.dumps(base[3:])}")

    size = f" with {summary['parameters'] / 1e6:,.1f} million parameters" if summary.get("parameters") else ""
    title = run.path.name
    text = ["---", *front, "---", "", f"# {title}", ""]
    text.append(
        f"A model of type {config['model']['model_type']}{size}, {words}, made with Espalier (JAX). It loads with "
        "stock classes of transformers."
    )
    if pipeline in ("fill-mask", "text-generation", "text-classification", "token-classification"):
        text += _code(
            "from transformers import pipeline", "", f'model = pipeline("{pipeline}", "PATH_OR_ID")', "python"
        )
    else:
        text += _code(
            f"from transformers import AutoTokenizer, {loader}",
            "",
            f'model = {loader}.from_pretrained("PATH_OR_ID")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")',
            "python",
        )
    for heading, rows in (
        ("Data", _data(config)),
        ("Results on held-out data", _results(config["task"], summary)),
        ("Settings", _settings(config, summary)),
        ("Environment", summary.get("environment", {})),
    ):
        if rows:
            text += ["", f"## {heading}", "", "| | |", "|---|---|"]
            text += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    text += [
        "",
        "## Limits",
        "",
        "It repeats what its data holds, mistakes and prejudices included; it was checked for neither.",
    ]
    if config.get("command"):
        text += ["", "## Command"] + _code(config["command"], "")
    return "\n".join(text) + "\n"


def _data(config: dict) -> dict[str, str]:
    data, rows = config.get("data", {}), {}
    for name, key in (("text", "files"), ("training file", "train"), ("validation file", "validation")):
        if data.get(key):
            rows[name] = ", ".join(data[key]) if isinstance(data[key], list | tuple) else data[key]
    if config.get("task") in ("masked_lm", "causal_lm") and data and not data.get("files"):
        rows["text"] = f"built-in: {data.get('builtin')}"
    if data.get("validation_files"):
        rows["held-out text"] = ", ".join(data["validation_files"])
    if config.get("labels"):
        rows["labels"] = ", ".join(config["labels"])
    for name, sha in config.get("fingerprints", {}).items():
        rows[f"SHA-256 of {name}"] = f"`{sha[:16]}…`"
    base = config.get("imported_from") or config.get("init_from")
    return ({"started from": base} if base else {}) | rows


def _results(task: str, summary: dict) -> dict[str, str]:
    measured = (summary.get("eval") or {}) | (summary.get("metrics") or {})
    unit = {"masked_lm": "a masked token", "causal_lm": "a token"}.get(task, "an example")
    names: dict[str, str] = {
        "loss": f"loss (nats {unit})",
        "majority": "accuracy of the most frequent label",
        "f1": "F1",
        "macro_f1": "macro F1",
        "matthews": "Matthews correlation",
    }
    if task == "masked_lm":
        names["accuracy"] = "accuracy (masked tokens)"
    return {
        names.get(str(name), str(name).replace("_", " ")): f"{value:.4g}"
        for name, value in measured.items()
        if value is not None
    }


def _settings(config: dict, summary: dict) -> dict[str, Any]:
    optimizer, data, masking = (config.get(name, {}) for name in ("optimizer", "data", "masking"))
    rows = {
        "steps": summary.get("step"),
        "tokens seen": f"{summary['tokens']:,}" if summary.get("tokens") else None,
        "rows in a batch": config.get("batch_size"),
        "tokens in a row": data.get("sequence_length") or data.get("max_length"),
        "mask rate": masking.get("rate"),
        "optimizer": optimizer.get("name"),
        "peak learning rate": optimizer.get("learning_rate"),
        "schedule": optimizer.get("schedule"),
        "weight decay": optimizer.get("weight_decay"),
        "seed": config.get("seed"),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _code(*lines: str) -> list[str]:
    """A block of code; the last argument is its language."""
    return ["", f"```{lines[-1]}", *lines[:-1], "```"]


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
