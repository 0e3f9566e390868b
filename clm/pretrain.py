"""Pretrain a decoder by causal LM: `python -m clm.pretrain PRESET [flags]`.

Reads top to bottom: text → tokens → rows → objective → training loop → summary, samples and report.
"""

from __future__ import annotations

import math
from functools import partial

from clm.presets import PRESETS, PretrainConfig
from espalier import cli, progress
from espalier.files import write_json
from sharding.processes.coordination import collected, joined


@joined
def main(config: PretrainConfig, call: cli.Call = cli.FROM_PYTHON) -> dict:
    """Run, or resume, the pretraining that `config` describes; returns the `--json` object.

    With config.init_from, the architecture is that of the weights, but for the model settings given in `call`.
    """
    call.greet()

    from clm.generate import SamplingConfig, continue_texts
    from clm.loss import causal_lm_objective
    from espalier.data.description import describe_epochs, describe_text
    from espalier.data.loader import Batches, Rows, prefetch
    from espalier.data.packing import pack_split
    from espalier.data.prepare import prepare
    from espalier.data.token_tables import token_bytes
    from espalier.data.tokenizer import save_tokenizer, special_ids, tokenizer_of, vocabulary_size
    from espalier.models.counts import count_params, flops_per_token
    from espalier.models.description import describe
    from espalier.models.hub import Pretrained, check_export, save_pretrained
    from espalier.models.layout import open_mesh
    from espalier.models.pretrained import architecture_of, export_to, load_weights
    from espalier.models.published import Published, published_beside
    from espalier.models.transformer import init_params, matrix_axes
    from espalier.report.card import model_card
    from espalier.report.render import write_report
    from espalier.training.introduction import About, conclude
    from espalier.training.loop import train
    from espalier.training.run import RunDirectory, settings, summarise
    from espalier.training.start import find_origin
    from sharding.mesh import host_rows

    length = config.data.sequence_length
    assert config.run_dir is not None
    run = RunDirectory(config.run_dir)
    origin = find_origin(config, run, Pretrained)
    architecture = config.model
    if origin and config.init_from:
        architecture = architecture_of(origin.config, config.model, call.settings_of("model"))
    mesh = open_mesh(config, architecture.fitted(architecture.vocab_size, length), "causal_lm", length)
    mine = host_rows(config.batch_size, mesh)

    of_weights = tokenizer_of(origin.tokenizer_folder, origin.config) if origin else None
    prepared = prepare(config.data, config.model.vocab_size, for_masked_lm=False, of_weights=of_weights)
    tokenizer = prepared.tokenizer
    specials = special_ids(tokenizer, need=("bos", "eos"))
    # Published models have spare rows in their vocabulary.
    model = architecture.fitted(architecture.vocab_size if config.init_from else vocabulary_size(tokenizer), length)
    handed_on = published_beside(origin.config if origin else None)
    published = Published.beside(handed_on)
    exporting = export_to(config.export, run.path, origin, config.steps)
    if exporting:
        check_export(exporting, model, "causal_lm", tokenizer, published)
    config_dict, defaults = settings(
        config, model, task="causal_lm", fingerprints=prepared.fingerprints, command=call.command, **handed_on
    )
    run.check(config_dict, defaults, origin.done if origin else 0)

    bytes_V = token_bytes(tokenizer)
    with progress.waiting("packing rows"):
        rows, held_out = (
            {
                name: Rows(
                    store, pack_split(store.offsets, length), length, specials, kind="causal_lm", token_bytes=bytes_V
                )
                for name, store in stores.items()
            }
            for stores in (prepared.train, prepared.validation)
        )
    weights = config.data.weights()
    batches = Batches(rows, config.batch_size, config.seed, weights)
    eval_batches = Batches(held_out, config.batch_size, weights=None if "validation" in held_out else weights).fixed(
        config.eval_rows, mine
    )
    objective = causal_lm_objective(model, execution=config.execution)

    def init(key):
        return init_params(model, key, heads=("causal_lm",))

    about = About(
        model=describe(model, "causal_lm", config.execution, length, mesh),
        data=describe_text(config.data, prepared, rows, held_out, config.eval_rows),
        row=f"{length} tokens",
        epochs=describe_epochs(batches, config.steps),
    )
    result = train(
        config,
        init_params=init,
        matrix_axes=matrix_axes,
        objective=objective,
        eval_objective=objective,
        batches_from=lambda step: prefetch(
            lambda step: batches.batch(step, mine), step, config.prefetch, config.workers
        ),
        eval_batches=eval_batches,
        finalize_eval=lambda metrics: metrics | {"perplexity": math.exp(min(metrics["loss"], 700.0))},
        run=run,
        config_dict=config_dict,
        save_tokenizer=partial(save_tokenizer, tokenizer),
        origin=origin,
        load_params=load_weights(origin, model, "causal_lm", init, config.seed) if origin else None,
        mesh=mesh,
        tokens_per_step=config.batch_size * length,
        flops_per_step=config.batch_size * length * flops_per_token(model, length, 1.0),
        about=about,
    )

    summary = summarise(run, result, parameters=count_params(model, "causal_lm"), data=batches.epochs(result.step))
    params = None if result.stopped_by else collected(result.state.params)
    if params is not None:
        longest = model.max_length or length
        sampling = SamplingConfig(max_new_tokens=min(100, longest - 1))
        with progress.waiting("writing samples of text"):
            texts = continue_texts(model, params, tokenizer, [""] * 3, sampling)
        write_json(run.path / "samples.json", {"texts": texts})
        with progress.waiting("drawing the report"):
            write_report(run.path)
        if exporting and result.finished:
            with progress.waiting(f"exporting to {config.export}"):
                save_pretrained(exporting, model, params, tokenizer, card=model_card(run.path), published=published)
            progress.say(f"exported to {config.export}")
    following = ["./launch.sh", "generate", "--run-dir", config.run_dir, "--prompt", "Once upon a time"]
    conclude(summary, run, config, call.command, following)
    return summary


if __name__ == "__main__":
    cli.run(main, PRESETS, prog="clm", description="Pretrain a decoder by causal LM.")
