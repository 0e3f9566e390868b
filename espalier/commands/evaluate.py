"""Measure a model without training: `./launch.sh evaluate RUN|hf:ID --data.validation F`.

Which figures, and which flags say what the files hold, follows from the task of the model (TaskRecord.data).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier import cli, progress
from espalier.commands.asked_model import AskedModel, limited
from espalier.errors import UserError
from espalier.exits import one_line_errors
from espalier.flags import nearest
from espalier.task import TASKS, TaskRecord, find

PREFIX = "hf:"


@dataclass(frozen=True)
class EvaluateConfig(AskedModel):
    """Measure a model on files: `evaluate RUN --data.validation F`; `evaluate RUN --help` shows the flags of its task.

    A fine-tuned model gets the metrics of its task, a decoder perplexity and bits per byte, an encoder
    pseudo-perplexity.
    """

    task: str | None = None
    """The task by which it is measured; unset = that of the run, or the first that trains such a head."""
    output: str | None = None
    """A folder for what was predicted (predictions.jsonl, and the files that a report draws); unset = none."""


def main(config: Any) -> dict[str, Any]:
    """Print the metrics as a table; returns the `--json` object. config: of `config_for`."""
    from espalier.predict.loaded import on_all_devices

    if config.output and (path := Path(config.output).expanduser()).exists() and not path.is_dir():
        raise UserError(f"--output {config.output} is a file; name a folder, or one that is not there yet")
    record = record_of(*described(config), config.task)
    with progress.waiting(f"loading {config.model}"):
        model = limited(config.loaded(), getattr(config.data, "max_length", None))
    with progress.waiting("measuring"), on_all_devices(model) as model:
        evaluation = record.evaluate(model, config.data)
    if config.output:
        from espalier.files import make_folder
        from finetune.task import write_evaluation

        folder = Path(config.output).expanduser()
        make_folder(folder)
        write_evaluation(folder, evaluation)
    else:
        for warning in evaluation.warnings:
            progress.say(warning)
    progress.block(table(evaluation.metrics))
    return {"model": config.model, "task": record.name, "metrics": dict(evaluation.metrics)}


def table(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Each figure in words, with its interval where there is one; figures within figures by their path."""
    rows: dict[str, str] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            rows |= {f"{name} {inner}": words for inner, words in table(value).items()}
        elif not (name.endswith("_interval") and name.removesuffix("_interval") in metrics):
            rows[name] = _words(value)
            if bounds := metrics.get(f"{name}_interval"):
                rows[name] += f"   95 % interval {_words(bounds[0])} … {_words(bounds[1])}"
    return rows


def _words(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def described(config: EvaluateConfig) -> tuple[dict[str, Any], str]:
    """(what the run recorded; of a model in Hugging Face format nothing, the head)."""
    if config.model.startswith(PREFIX):
        from espalier.models.hub import Pretrained

        return {}, Pretrained(config.model, config.revision).head
    from espalier.training.restore import read_config

    saved = read_config(config.model, config.step)
    if "task" not in saved:
        raise UserError(
            f"{config.model} holds no run of a model; name a run directory, or {PREFIX} before another model"
        )
    return saved, saved.get("head", saved["task"])


def record_of(saved: Mapping[str, Any], head: str, task: str | None) -> TaskRecord:
    """The record of the task by which a model with this head is measured."""
    if task is not None:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}{nearest(task, TASKS)}; there are {', '.join(TASKS)}")
        record = find(task)
        heads = (record.head, *record.measures_heads)
        if head not in heads:
            raise UserError(f"task {task} is of models with the head {' or '.join(heads)}, and this one has {head}")
    else:
        names = [name for name in (saved.get("task"),) if name in TASKS]
        record = next((one for one in map(find, [*names, *TASKS]) if one.head == head), None)
    if record is None or record.data is None:
        raise UserError(f"a model with the head {head} is not measured without training; try `predict`")
    return record


def config_for(record: TaskRecord, saved: Mapping[str, Any], model: str, base: type = EvaluateConfig) -> type:
    """The configuration `base` with the settings of the task's data. Those of a fine-tuning are the defaults: its own
    files are measured where no others are named."""
    from espalier import saved_config
    from finetune.task import FinetuneTask

    kind = record.data
    assert kind is not None
    default = kind()
    if isinstance(record, FinetuneTask) and saved.get("task") == record.name and "data" in saved:
        default = saved_config.part_of(kind, saved["data"], model, "data.")
    made = dataclasses.make_dataclass(
        base.__name__, [("data", kind, field(default=default))], bases=(base,), frozen=True
    )
    made.__doc__ = base.__doc__
    return made


def command(
    arguments: Sequence[str],
    base: type = EvaluateConfig,
    main: Callable[[Any], Any] = main,
    prog: str = "evaluate",
) -> None:
    """`evaluate MODEL [flags]`: the model is looked at first, for its task has flags of its own.

    base: a configuration with `task`, to which the settings of the task's data are added; main: what is called with it.
    """
    given = list(arguments)
    model = _value(given, "--model") or next((one for one in given[:1] if not one.startswith("-")), None)
    if model is None:
        cli.run_config(main, base, prog=prog, argv=given)
        return
    with one_line_errors("--debug" in given):
        step = _value(given, "--step")
        first = EvaluateConfig(
            model, step=int(step) if step and step.isdecimal() else None, revision=_value(given, "--revision")
        )
        saved, head = described(first)
        kind = config_for(record_of(saved, head, _value(given, "--task")), saved, model, base)
    cli.run_config(main, kind, prog=prog, argv=given)


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """What stands behind a flag, or behind its =."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            return value if equals else next(iter(arguments[at + 1 : at + 2]), None)
    return None


if __name__ == "__main__":
    from espalier import library_log

    library_log.begin()
    command(sys.argv[1:])
