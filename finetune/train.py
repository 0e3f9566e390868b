"""Fine-tune a pretrained model on labelled data: `python -m finetune.train PRESET --init-from RUN [flags]`.

Reads top to bottom: checkpoint → task (its data, objective and head) → training loop → metrics, summary and report.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from espalier import cli, progress
from espalier.errors import UserError
from finetune.presets import PRESETS, FinetuneConfig
from sharding.processes.coordination import collected, joined


@joined
def main(config: FinetuneConfig, call: cli.Call = cli.FROM_PYTHON) -> dict:
    """Run, or resume, the fine-tuning that `config` describes; returns the `--json` object."""
    call.greet()
    import jax

    from espalier.data.description import epochs_words
    from espalier.data.loader import prefetch
    from espalier.data.tokenizer import fingerprint, framed_tokenizer, save_tokenizer, tokenizer_of
    from espalier.models.config import ModelConfig
    from espalier.models.counts import flops_per_token
    from espalier.models.description import describe
    from espalier.models.hub import Pretrained, check_export, save_pretrained
    from espalier.models.layout import open_mesh
    from espalier.models.pretrained import export_to, load_weights
    from espalier.models.published import Published, published_beside
    from espalier.models.transformer import matrix_axes
    from espalier.report.card import model_card
    from espalier.report.render import write_report
    from espalier.training.introduction import About, conclude
    from espalier.training.loop import train
    from espalier.training.run import RunDirectory, settings, summarise
    from espalier.training.start import find_origin
    from finetune.examples import max_length
    from finetune.tasks import open_task

    assert config.run_dir is not None
    run = RunDirectory(config.run_dir)

    if not config.init_from:
        raise UserError(
            "no --init-from given: name the run directory of the model that is to be fine-tuned, or hf:PATH_OR_ID"
        )
    origin = find_origin(config, run, Pretrained)
    assert origin is not None
    tokenizer = tokenizer_of(origin.tokenizer_folder, origin.config)
    model = ModelConfig.from_dict(origin.config["model"])
    model = replace(model, hidden_dropout=config.dropout, attention_dropout=config.dropout)
    mesh = open_mesh(config, model, config.task, max_length(config.data, model), split=False)
    task = open_task(config, model, tokenizer, mesh)
    handed_on = published_beside(None if config.scratch else origin.config)
    published = Published.beside(handed_on)
    config = resolved(config, task.examples, model.hidden_size)
    assert config.steps is not None
    exporting = export_to(config.export, run.path, origin, config.steps)
    if exporting:
        check_export(exporting, task.model, config.task, tokenizer, published)
    fingerprints = {"tokenizer": fingerprint(tokenizer)} | task.fingerprints
    config_dict, defaults = settings(
        config, task.model, fingerprints=fingerprints, command=call.command, **task.settings, **handed_on
    )
    run.check(config_dict, defaults, origin.done)
    if jax.process_index() == 0:
        for fact in task.facts:
            progress.say(fact)

    tokens_per_step = config.batch_size * task.tokens_per_row
    fresh = config.scratch and not origin.resumed
    load = load_weights(origin, task.model, config.task, task.init_params, config.seed)
    longest = max_length(config.data, model)
    about = About(
        model=describe(task.model, config.task, config.execution, longest, mesh),
        data=task.about,
        row=f"up to {longest} tokens, {task.tokens_per_row:.0f} on average",
        epochs=epochs_words(config.steps * config.batch_size / task.examples),
    )
    result = train(
        config,
        init_params=task.init_params,
        matrix_axes=matrix_axes,
        objective=task.objective,
        eval_objective=task.objective,
        batches_from=lambda step: prefetch(task.batch, step, config.prefetch, config.workers),
        eval_batches=task.eval_batches,
        run=run,
        config_dict=config_dict,
        save_tokenizer=partial(save_tokenizer, tokenizer),
        mesh=mesh,
        tokens_per_step=round(tokens_per_step),
        flops_per_step=tokens_per_step * flops_per_token(model, round(task.tokens_per_row), 0.0),
        origin=None if fresh else origin,
        load_params=None if fresh else load,
        about=about,
    )

    measured = {} if result.stopped_by else task.finish(run, result.state.params, mesh)
    summary = summarise(run, result, metrics=measured)
    params = collected(result.state.params) if exporting and result.finished else None
    if jax.process_index() == 0 and not result.stopped_by:
        with progress.waiting("drawing the report"):
            write_report(run.path)
        if exporting and params is not None:
            as_trained = framed_tokenizer(tokenizer, model.causal)
            if published and model.causal:
                published = published.padded_by(as_trained)
            with progress.waiting(f"exporting to {config.export}"):
                card = model_card(run.path)
                save_pretrained(exporting, task.model, params, as_trained, card=card, published=published)
            progress.say(f"exported to {config.export}")
    name = run.path.name
    following = None if config.export else ["./launch.sh", "export", config.run_dir, f"exported/{name}"]
    conclude(summary, run, config, call.command, following)
    return summary


def resolved(config: FinetuneConfig, examples: int, width: int) -> FinetuneConfig:
    """The configuration with everything filled in that depends on the data (examples) or the model (width D)."""
    epoch = math.ceil(examples / config.batch_size)
    steps = config.steps or max(200, math.ceil(3 * examples / config.batch_size))
    if config.epochs is not None:
        steps = math.ceil(config.epochs * examples / config.batch_size)
    rate = config.optimizer.learning_rate
    if rate is None:
        # Wide models want small rates: about 1/D under Adam (Yang et al. 2022); 5e-5 is BERT-base's.
        rate = min(3e-4, 5e-5 * 768 / width)
    return replace(
        config,
        steps=steps,
        eval_every=config.eval_every or max(epoch, math.ceil(steps / 10)),
        optimizer=replace(config.optimizer, learning_rate=rate),
    )


if __name__ == "__main__":
    cli.run(main, PRESETS, prog="finetune", description="Fine-tune a pretrained model on labelled data.")
