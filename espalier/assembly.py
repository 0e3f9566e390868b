"""How a run goes, whatever it trains: read it once and every run is known.

origin → architecture → mesh → data → settings checked → training loop → what is written at the end → summary → report →
export. What is trained is a `Task` (espalier/task.py); nothing here knows which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from espalier import cli, progress
from espalier import task as tasks
from espalier.contracts import Origin
from espalier.data.loader import prefetch
from espalier.data.tokenizer import save_tokenizer, tokenizer_of
from espalier.models.counts import count_params
from espalier.models.description import describe
from espalier.models.hub import Pretrained, check_export, save_pretrained
from espalier.models.layout import open_mesh
from espalier.models.pretrained import beside_of, export_to, load_weights, part_of
from espalier.models.published import Published, published_beside
from espalier.models.sentence_transformers import module_files
from espalier.models.transformer import layer_depths, matrix_axes
from espalier.report.card import model_card
from espalier.report.render import write_report
from espalier.report.task import kept
from espalier.task import Start, Task, TaskRecord, Trained
from espalier.trackers.contract import check as check_trackers
from espalier.trackers.notify import PATIENCE, Notifier
from espalier.training import loop
from espalier.training.adapters import merged
from espalier.training.introduction import About, conclude, ending_words
from espalier.training.run import RunDirectory, one_line, settings, summarise, tuned_file
from espalier.training.start import find_origin
from espalier.training.state import combined
from espalier.training.trainable import Trainable


def train(
    config: Any, record: TaskRecord | None = None, call: cli.Call = cli.FROM_PYTHON, *, objective: Any = None
) -> dict:
    """Run, or resume, what `config` describes; returns the `--json` object.

    config: a training.config.TrainConfig with its run_dir. record: of what is trained; unset = what config.task names.
    objective: one of the user's own, as config.objective names it or that function or record itself.
    call: how the run was asked for. With config.init_from, the settings of the model that `call` names change that of
    the weights.
    """
    with _notifying(config) as notify:
        return fit(*opened(config, record, call, objective=objective), call, notify)


class Opened(NamedTuple):
    """What is about to be trained."""

    record: TaskRecord
    task: Task
    run: RunDirectory
    mesh: Mesh
    origin: Origin | None
    """Where it goes on from; None = scratch."""


def opened(
    config: Any,
    record: TaskRecord | None = None,
    call: cli.Call = cli.FROM_PYTHON,
    *,
    objective: Any = None,
    origin_of: Callable[[Any, RunDirectory, Callable[[str], Origin]], Origin | None] = find_origin,
) -> Opened:
    """The task of a configuration with its data read; arguments as in `train`. Nothing is written into the run.

    origin_of: where it goes on from, if that is not what is newest.
    """
    assert config.run_dir is not None
    check_trackers(config.trackers)
    record = (record or tasks.find(config.task)).chosen(config, objective)
    run = RunDirectory(config.run_dir, call.began)
    origin = origin_of(config, run, Pretrained)
    model, longest = record.architecture(config, origin, call.settings_of("model"))
    mesh = open_mesh(config, model, record.head, longest, split=record.splits_rows, mixed=record.mixed)
    tokenizer = tokenizer_of(origin.tokenizer_folder, origin.config) if origin else None
    task = record.open(config, Start(run, origin, model, tokenizer, mesh))
    return Opened(record, task, run, mesh, origin)


def fit(
    record: TaskRecord,
    task: Task,
    run: RunDirectory,
    mesh: Mesh,
    origin: Origin | None,
    call: cli.Call,
    notify: Notifier,
) -> dict:
    """Train an open task to its end and write what a person needs of it. All that can be refused is refused first."""
    config, model, head = task.config, task.model, record.head
    published, tokenizer = Published.beside(_handed_on(task, origin)), task.tokenizer
    exporting = export_to(config.export, run.path, origin, config.steps)
    config_dict, defaults = recorded_settings(record, task, origin, call.command)
    if exporting:
        key = jax.random.key(0)
        base = jax.eval_shape(task.frozen.init, key) if task.frozen else {}
        shapes = part_of(merged(combined(jax.eval_shape(task.init_params, key), base)), config_dict)
        check_export(exporting, model, head, tokenizer, published, shapes, beside_of(None, config_dict))
    run.check(config_dict, defaults, origin.done if origin else 0, task.schedules)
    first = jax.process_index() == 0
    if first:
        for fact in task.facts:
            progress.say(fact)
        if task.frozen is not None and not (origin and origin.resumed):
            progress.say(f"frozen parameters: {task.frozen.origin}")
    learnt, begins_at = learnable(record, task, mesh, origin)
    done = begins_at.done if begins_at else 0
    started = f"{'goes on' if done else 'started'} at step {done:,} of {config.steps:,}"
    notify.tell("started", started, step=done, steps=config.steps)
    result = loop.train(config, learnt, run, mesh, config_dict, begins_at, notify)

    # From here on every process takes part where parameters are asked for, and the first writes.
    trained, ended = Trained(run, result, mesh), not result.stopped_by
    facts = {"parameters": count_params(model, head)} | task.summary(result.step)
    # Before what may fail or take long, and again with what that finds.
    summary = summarise(run, result, **facts)
    if ended:
        summary = summarise(run, result, **(facts | task.finish(trained)))
    params = trained.collected if exporting and result.finished and ended else None
    if first and ended:
        with progress.waiting("drawing the report"):
            write_report(run.path)
    if exporting and params is not None:
        if task.exported:
            tokenizer, published = task.exported(published)
        with progress.waiting(f"exporting to {config.export}"):
            save_pretrained(
                exporting,
                model,
                part_of(params, config_dict),
                tokenizer,
                head=head,
                card=model_card(run.path),
                published=published,
                also=module_files(config_dict, model.hidden_size) | tuned_file(run),
                beside=beside_of(params, config_dict),
            )
        progress.say(f"exported to {config.export}")
    conclude(summary, run, config, call.command, list(task.following) if task.following else None)
    event, words = ending_words(summary, config.steps)
    facts = {name: summary.get(name) for name in ("loss", "eval", "metrics", "goodput", "best")}
    notify.tell(event, words, step=result.step, steps=config.steps, **facts)
    return summary


@contextlib.contextmanager
def _notifying(config: Any) -> Iterator[Notifier]:
    """The webhook of a run, which is told of an error that ends the block."""
    notify, patience = Notifier(config.notify, str(config.run_dir), lambda: jax.process_index() != 0), PATIENCE
    try:
        yield notify
    except Exception as error:
        notify.tell("failed", f"failed: {one_line(error)}", error=one_line(error))
        raise
    except KeyboardInterrupt:
        patience = 0.0
        raise
    finally:
        notify.close(patience)


def recorded_settings(record: TaskRecord, task: Task, origin: Origin | None, command: str | None) -> tuple[dict, dict]:
    """What config.json says of a run, JSON values, and the defaults for `RunDirectory.check`."""
    recorded = {"task": record.name, "fingerprints": dict(task.fingerprints), "command": command}
    if record.head != record.name:
        recorded["head"] = record.head
    if record.name not in tasks.TASKS and record.report:
        recorded["report"] = kept(record.report)
    if task.part:
        recorded["part"] = task.part
    if task.beside:
        recorded["beside"] = {name: {"head": one.head, "model": asdict(one.model)} for name, one in task.beside.items()}
    if task.user_code:
        recorded["user_code"] = task.user_code
    # A task may say what an unset setting came to be, and nothing else in the place of a setting.
    assert all(vars(task.config).get(name) in (None, said) for name, said in task.settings.items()), task.settings
    return settings(task.config, task.model, **recorded, **task.settings, **_handed_on(task, origin))


def learnable(record: TaskRecord, task: Task, mesh: Mesh, origin: Origin | None) -> tuple[Trainable, Origin | None]:
    """What the loop trains of an open task, and where it goes on from."""
    config, model, head = task.config, task.model, record.head
    fresh = origin is None or task.scratch and not origin.resumed
    about = About(
        model=describe(model, head, config.execution, task.longest, mesh, packed=task.packed, mixed=record.mixed),
        data=task.data,
        row=task.row,
        epochs=task.epochs,
    )
    learnt = Trainable(
        init_params=task.init_params,
        load_params=task.load_params or load_weights(origin, model, head, task.init_params, config.seed)
        if origin and not fresh
        else None,
        frozen=task.frozen,
        matrix_axes=task.matrix_axes or matrix_axes,
        depths=partial(layer_depths, model) if not task.part else None,
        objective=task.objective,
        batches_from=lambda step: prefetch(task.batch, step, config.prefetch, config.workers),
        documents=task.documents,
        eval_batches=task.eval_batches,
        finalize_eval=task.finalize_eval,
        save_tokenizer=partial(save_tokenizer, task.tokenizer),
        tokens_per_step=round(task.tokens_per_step),
        flops_per_step=task.flops_per_step,
        about=about,
    )
    return learnt, None if fresh else origin


def _handed_on(task: Task, origin: Origin | None) -> dict:
    """What the run keeps of the model that it started from: of what was imported, its words and files."""
    return published_beside(origin.config if origin and not task.scratch else None)
