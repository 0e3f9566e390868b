"""The model card of a run: the README.md beside exported weights, made from the files of the run."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from espalier.report.run_files import RunFiles, read_run
from espalier.report.task import TaskReport, loss_words, report_of

PIPELINES = ("fill-mask", "text-generation", "text-classification", "token-classification")
"""Pipelines of transformers that the card shows for loading the model; for others it shows the class."""


def model_card(run_dir: str | Path) -> str:
    """The card: what the model is, how to load it, its data, settings, results, and the command that made it."""
    run = read_run(run_dir)
    config, summary = run.config, run.summary
    task = report_of(config)
    base = config.get("imported_from") or config.get("init_from") or ""
    embeds = task.pipeline == "sentence-similarity"
    library = "sentence-transformers" if embeds else "transformers"
    pipeline = task.pipeline if re.fullmatch(r"[\w-]+", task.pipeline) else "other"
    front = [f"library_name: {library}", f"pipeline_tag: {pipeline}", "tags:", "- espalier", "- jax"]
    if base.startswith("hf:") and not Path(base[3:]).expanduser().exists():
        front.append(f"base_model: {json.dumps(base[3:])}")

    size = f" with {summary['parameters'] / 1e6:,.1f} million parameters" if summary.get("parameters") else ""
    title = _cell(run.path.name)
    text = ["---", *front, "---", "", f"# {title}", ""]
    text.append(
        f"A model of type {_cell(config['model']['model_type'])}{size}, {_cell(task.words)}, made with Espalier (JAX). "
        "It loads with "
        f"stock classes of {library}."
    )
    if task.pipeline in PIPELINES:
        text += _code(
            "from transformers import pipeline", "", f'model = pipeline("{task.pipeline}", "PATH_OR_ID")', "python"
        )
    elif embeds:
        text += _code(
            "from sentence_transformers import SentenceTransformer",
            "",
            'model = SentenceTransformer("PATH_OR_ID")',
            'vectors = model.encode(["a text", "another"])',
            "python",
        )
    else:
        text += _code(
            f"from transformers import AutoTokenizer, {task.loader}",
            "",
            f'model = {task.loader}.from_pretrained("PATH_OR_ID")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")',
            "python",
        )
    for heading, rows in (
        ("Data", _data(config)),
        ("Results on held-out data", _results(task, run)),
        ("Settings", _settings(task, run)),
        ("Environment", summary.get("environment", {})),
    ):
        if rows:
            text += ["", f"## {heading}", "", "| | |", "|---|---|"]
            text += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    text += [
        "",
        "## Limits",
        "",
        "The model reproduces what its data contains, errors and biases included; it was evaluated for neither.",
    ]
    if config.get("command"):
        text += ["", "## Command"] + _code(config["command"], "")
    return "\n".join(text) + "\n"


def _data(config: dict) -> dict[str, str]:
    data, rows = config.get("data", {}), {}
    named = (("text", "files"), ("text", "sources"), ("training file", "train"), ("validation file", "validation"))
    for name, key in named:
        if data.get(key):
            rows[name] = ", ".join(data[key]) if isinstance(data[key], list | tuple) else data[key]
    if "builtin" in data and "text" not in rows:
        rows["text"] = f"built-in: {data['builtin']}"
    if data.get("validation_files"):
        rows["held-out text"] = ", ".join(data["validation_files"])
    if config.get("labels"):
        rows["labels"] = ", ".join(config["labels"])
    for name, sha in config.get("fingerprints", {}).items():
        rows[f"SHA-256 of {name}"] = f"`{sha[:16]}…`"
    base = config.get("imported_from") or config.get("init_from")
    return ({"started from": base} if base else {}) | rows


def _results(task: TaskReport, run: RunFiles) -> dict[str, str]:
    """The metrics, with the intervals that hold them in 95 of 100 cases where a task has some."""
    measured = (run.summary.get("eval") or {}) | (run.summary.get("metrics") or {})
    names: dict[str, str] = {"loss": f"loss ({loss_words(task, run.config)})", **task.metric_names}
    found = {}
    for name, value in measured.items():
        if isinstance(value, int | float):
            low_high = measured.get(f"{name}_interval")
            sure = " (95 %: {:.4g} to {:.4g})".format(*low_high) if low_high else ""
            found[names.get(str(name), str(name).replace("_", " "))] = f"{value:.4g}{sure}"
    return found


def _settings(task: TaskReport, run: RunFiles) -> dict[str, Any]:
    config, summary = run.config, run.summary
    optimizer, data = (config.get(name, {}) for name in ("optimizer", "data"))
    rows = {
        "steps": summary.get("step"),
        "tokens seen": f"{summary['tokens']:,}" if summary.get("tokens") else None,
        "rows in a batch": config.get("batch_size"),
        "tokens in a row": data.get("sequence_length") or data.get("max_length"),
        **task.card_settings(config),
        "optimizer": optimizer.get("name"),
        "peak learning rate": optimizer.get("learning_rate"),
        "schedule": optimizer.get("schedule"),
        "weight decay": optimizer.get("weight_decay"),
        "seed": config.get("seed"),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _code(*lines: str) -> list[str]:
    """A code block; the last argument is its language. Its fence is longer than any that is in it."""
    longest = max((len(ticks) for line in lines for ticks in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["", f"{fence}{lines[-1]}", *lines[:-1], fence]


def _cell(value: Any) -> str:
    """On one line, and nothing in it is an element of HTML or the end of the cell."""
    return escape(" ".join(str(value).replace("|", "\\|").split()), quote=False)
