"""What process 0 prints for people before the first step of a run and at its end."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from espalier import progress
from espalier.goodput import goodput, read_sessions
from espalier.goodput import words as goodput_words
from espalier.training.config import TrainConfig
from espalier.training.run import RunDirectory
from sharding.mesh import AXES


class About(NamedTuple):
    """What an entry point knows of its run, in words."""

    model: Mapping[str, str] = {}
    """Rows about the model and its precision."""
    data: Mapping[str, str] = {}
    """Rows about the training data and the held-out data."""
    row: str = ""
    """How long the rows of a batch are."""
    epochs: str = ""
    """How many passes over the data the schedule makes."""


UNKNOWN = About()
FIGURES = {
    "loss": ("held-out loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "em": ("exact match", "{:.1%}"),
    "bleu": ("BLEU", "{:.1f}"),
    "chrf": ("chrF", "{:.1f}"),
    "rougeL": ("ROUGE-L", "{:.1f}"),
    "f1": ("F1", "{:.1%}"),
    "matthews": ("Matthews correlation", "{:.3f}"),
    "ndcg@10": ("nDCG@10", "{:.3f}"),
    "mrr@10": ("MRR@10", "{:.3f}"),
    "recall@10": ("recall@10", "{:.3f}"),
    "pearson": ("Pearson", "{:.3f}"),
    "spearman": ("Spearman", "{:.3f}"),
    "rmse": ("error", "{:.4g}"),
}
"""Metric → its name and format in a result, in the order in which they are printed."""


def introduce(
    about: About, config: TrainConfig, mesh: Mesh, origin_message: str, start: int, last: int, tokens_per_step: int
) -> None:
    """Print what is about to run: model, devices, data, batch, steps, run directory, and what it starts from."""
    if jax.process_index():
        return
    shape = " × ".join(f"{name}={mesh.shape[name]}" for name in AXES if mesh.shape[name] > 1)
    devices = f"{mesh.size} × {mesh.devices.flat[0].device_kind}" + (f", mesh {shape}" if shape else "")
    if jax.process_count() > 1:
        devices += f", {jax.process_count()} processes"
    batch = f"{config.batch_size} rows of {about.row}" if about.row else f"{config.batch_size} rows"
    if config.accumulation > 1:
        batch += f", in {config.accumulation} micro-batches"
    steps = f"{config.steps:,} = {progress.amount(config.steps * tokens_per_step)} tokens"
    steps += f", {about.epochs}" if about.epochs else ""
    if start or last < config.steps:
        until = f", pausing at {last:,}" if last < config.steps else ""
        steps += f"; {max(last - start, 0):,} to come{until}"
    progress.block(
        {"run": str(config.run_dir), "start": origin_message, **about.model, "devices": devices}
        | {**about.data, "batch": batch, "steps": steps}
    )


def conclude(
    summary: dict, run: RunDirectory, config: TrainConfig, command: str | None, following: list[str] | None
) -> None:
    """Print the result, the time, the report, and the command that comes next.

    summary: as training.run.summarise returns it. command: the command line of this run; None = called from Python,
    where no command follows. following: the command for a finished run, as words of a command line.
    """
    if jax.process_index():
        return
    rows = {}
    if result := result_words(summary):
        rows["result"] = result
    if intervals := interval_words(summary):
        rows["95 % intervals"] = intervals
    if summary["seconds"] is not None:
        rows["time"] = progress.clock(summary["seconds"])
        if summary["tokens_per_second"]:
            rows["time"] += f", {summary['tokens_per_second']:,.0f} tokens/s"
    if (found := goodput(read_sessions(run.sessions))) and found.fraction is not None:
        rows["goodput"] = goodput_words(found)
    if run.report.is_file() and not summary["stopped_by"]:
        rows["report"] = f"{config.run_dir}/{run.report.name}"
    if rows:
        progress.block(rows)
    if command and not summary["finished"]:
        following = without_stop(command)
    if command and following:
        # On one line, however long, so that it can be copied.
        progress.say(f"  {'next':{max(map(len, [*rows, 'next'])) + 2}}{shlex.join(following)}")


def ending_words(summary: dict, steps: int) -> tuple[str, str]:
    """How a session ended: a word for programs (finished, paused, stopped), and a sentence for people."""
    event = "finished" if summary["finished"] else "stopped" if summary["stopped_by"] else "paused"
    words = f"{event} at step {summary['step']:,}" + ("" if event == "finished" else f" of {steps:,}")
    if event == "stopped":
        words += f" by {signal.Signals(summary['stopped_by']).name}, saved"
    fraction = (summary.get("goodput") or {}).get("fraction")
    goodput_said = f"goodput {fraction:.1%}".replace("%", " %") if fraction is not None else ""
    return event, "; ".join(part for part in (words, result_words(summary), goodput_said) if part)


def result_words(summary: dict) -> str:
    """The metrics of a run on held-out data: "accuracy 81.5 % (majority class 50.9 %), F1 82.3 %"."""
    values = summary.get("metrics") or summary.get("eval") or {}
    words = {key: f"{name} {form.format(values[key])}" for key, (name, form) in FIGURES.items() if key in values}
    for key in words:
        if f"{key}_before" in values:
            words[key] += f" (before {FIGURES[key][1].format(values[f'{key}_before'])})"
    if "majority" in values:
        sets = "majority_f1" in values
        words["accuracy"] += f" ({'most frequent set' if sets else 'majority class'} {values['majority']:.1%})"
        if sets:
            words["f1"] += f" (most frequent set {values['majority_f1']:.1%})"
    if "rmse" in values and "baseline_rmse" in values:
        words["rmse"] += f" (of the mean {values['baseline_rmse']:.4g})"
    for key in words:
        if key != "rmse" and (baseline := values.get(f"baseline_{key}")) is not None:
            words[key] += f" (baseline {FIGURES[key][1].format(baseline)})"
    return ", ".join(words.values()).replace("%", " %")


def interval_words(summary: dict) -> str:
    """How sure the metrics are, where a task says so: "accuracy 79.1 to 83.9 %, F1 80.0 to 84.5 %"."""
    values = summary.get("metrics") or {}
    words = []
    for key, (name, form) in FIGURES.items():
        low, high = values.get(f"{key}_interval") or (None, None)
        if low is not None and key in values:
            written = f"{form.format(low).removesuffix('%')} to {form.format(high)}"
            words.append(f"{name} {written}".replace("%", " %"))
    return ", ".join(words)


def without_stop(command: str) -> list[str]:
    """The words of a command line without --stop-at: the command that resumes a paused run."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        flag, _, value = word.replace("_", "-").partition("=")
        if flag != "--stop-at":
            kept.append(word)
        elif not value:
            next(words, None)
    return kept
