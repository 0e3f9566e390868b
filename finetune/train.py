"""Fine-tune a pretrained model on labelled data: `python -m finetune.train PRESET --init-from RUN [flags]`.

Reads top to bottom: checkpoint → labelled texts → rows → objective → training loop → predictions, summary and report.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import cli
from finetune.presets import PRESETS, FinetuneConfig


def main(config: FinetuneConfig) -> dict:
    """Run, or resume, the fine-tuning that `config` describes; returns the `--json` object."""
    import jax
    import numpy as np

    from data.labelled import LabelledBatches
    from data.loader import prefetch
    from data.tokenizer import fingerprint, save_tokenizer, special_ids
    from finetune.evaluate import class_probabilities, confusion, metrics, write_predictions
    from finetune.examples import max_length, read_examples
    from finetune.pretrained import load_trunk, open_pretrained
    from finetune.tasks.classify import classification_objective
    from models.transformer import flops_per_token, init_params, matrix_axes
    from sharding.mesh import build_mesh, check_batch, host_rows
    from training.loop import train
    from training.report import write_report
    from training.run import RunDirectory, settings, summarise, write_json

    check_batch(config.mesh, jax.device_count(), config.batch_size, config.accumulation)
    mesh = build_mesh(config.mesh)
    assert config.run_dir is not None
    run = RunDirectory(config.run_dir)

    pretrained = open_pretrained(config, run)
    tokenizer = pretrained.tokenizer
    model = replace(pretrained.model, hidden_dropout=config.dropout, attention_dropout=config.dropout)
    examples = read_examples(config.data, tokenizer, model)
    config = resolved(config, len(examples.train.labels), model.hidden_size)
    fingerprints = {"tokenizer": fingerprint(tokenizer)} | examples.fingerprints
    config_dict, defaults = settings(
        config, model, task="classification", labels=examples.names, fingerprints=fingerprints
    )
    run.check(config_dict, defaults)

    def init(key: jax.Array) -> dict:
        return init_params(model, key, heads=("sequence_classification",), num_labels=len(examples.names))

    batches, held_out = (
        LabelledBatches(
            part.encoded,
            part.labels,
            config.batch_size,
            config.seed,
            pad_id=special_ids(tokenizer).pad,
            max_length=max_length(config.data, model),
        )
        for part in (examples.train, examples.validation)
    )
    eval_batches = held_out.fixed(host_rows(config.batch_size))
    tokens_per_row = sum(len(example.ids) for example in examples.train.encoded) / len(batches)
    objective = classification_objective(model, execution=config.execution)

    fresh = config.scratch and not pretrained.origin.resumed
    result = train(
        config,
        init_params=init,
        matrix_axes=matrix_axes,
        objective=objective,
        eval_objective=objective,
        batches_from=lambda step: prefetch(
            lambda step: batches.batch(step, host_rows(config.batch_size)), step, config.prefetch
        ),
        eval_batches=eval_batches,
        run=run,
        config_dict=config_dict,
        save_tokenizer=partial(save_tokenizer, tokenizer),
        mesh=mesh,
        tokens_per_step=round(config.batch_size * tokens_per_row),
        flops_per_step=config.batch_size * tokens_per_row * flops_per_token(model, round(tokens_per_row), 0.0),
        origin=None if fresh else pretrained.origin,
        load_params=None if fresh else load_trunk(pretrained, init, config.seed, mesh),
    )

    if result.stopped_by:
        return summarise(run, result, metrics={})
    labels_N = np.array(examples.validation.labels)
    probability_NC = class_probabilities(model, result.state.params, eval_batches, mesh, config.execution)
    predictions_N = probability_NC.argmax(1)
    summary = summarise(run, result, metrics=metrics(labels_N, predictions_N, len(examples.names)))
    if jax.process_index() == 0:
        path = run.path / "predictions.jsonl"
        write_predictions(path, examples.validation.texts, labels_N, probability_NC, examples.names)
        write_json(run.path / "confusion.json", confusion(labels_N, predictions_N, examples.names))
        write_report(run.path)
        figures = "  ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items())
        print(f"{figures}  on {len(labels_N):,} examples; predictions in {path}", flush=True)
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
