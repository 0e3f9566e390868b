"""Pretrain an encoder by masked LM: `python -m mlm.pretrain PRESET [flags]`.

Reads top to bottom: text → tokens → rows → objective → training loop → summary, samples and report.
"""

from __future__ import annotations

import math
from functools import partial

from espalier import cli, progress
from espalier.files import write_json
from mlm.presets import PRESETS, PretrainConfig
from sharding.processes.coordination import collected, joined


@joined
def main(config: PretrainConfig, call: cli.Call = cli.FROM_PYTHON) -> dict:
    """Run, or resume, the pretraining that `config` describes; returns the `--json` object.

    With config.init_from, the architecture is that of the weights, but for the model settings given in `call`.
    """
    call.greet()
    import numpy as np

    from espalier.data.description import describe_epochs, describe_text
    from espalier.data.loader import Batches, Rows, prefetch
    from espalier.data.packing import pack_best_fit
    from espalier.data.prepare import prepare
    from espalier.data.token_tables import token_texts, word_table
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
    from mlm.loss import masked_lm_objective
    from mlm.masking import Vocabulary, mask_rates, rate_at
    from mlm.samples import masked_samples, unigram_entropy
    from sharding.mesh import host_rows

    length = config.data.sequence_length
    assert config.run_dir is not None
    run = RunDirectory(config.run_dir)
    origin = find_origin(config, run, Pretrained)
    architecture = config.model
    if origin and config.init_from:
        architecture = architecture_of(origin.config, config.model, call.settings_of("model"))
    mesh = open_mesh(config, architecture.fitted(architecture.vocab_size, length), "masked_lm", length)
    mine = host_rows(config.batch_size, mesh)

    of_weights = tokenizer_of(origin.tokenizer_folder, origin.config) if origin else None
    prepared = prepare(
        config.data,
        config.model.vocab_size,
        for_masked_lm=True,
        of_weights=of_weights,
        whole_words=config.masking.whole_words,
        words=origin.config.get("words", {}) if origin and origin.resumed else None,
    )
    tokenizer = prepared.tokenizer
    specials = special_ids(tokenizer, need=("cls", "sep", "mask"))
    # Published models have spare rows in their vocabulary.
    model = architecture.fitted(architecture.vocab_size if config.init_from else vocabulary_size(tokenizer), length)
    handed_on = published_beside(origin.config if origin else None)
    published = Published.beside(handed_on)
    exporting = export_to(config.export, run.path, origin, config.steps)
    if exporting:
        check_export(exporting, model, "masked_lm", tokenizer, published)
    config_dict, defaults = settings(
        config,
        model,
        task="masked_lm",
        fingerprints=prepared.fingerprints,
        command=call.command,
        **handed_on,
        **({"words": prepared.words} if prepared.words else {}),
    )
    run.check(config_dict, defaults, origin.done if origin else 0, [mask_rates])

    assert specials.mask is not None
    ids_V = np.arange(model.vocab_size)
    ordinary_V = ~np.isin(ids_V, specials.all) & (ids_V < vocabulary_size(tokenizer))
    vocabulary = Vocabulary(specials.mask, ordinary_V, word_table(tokenizer))
    by_words = config.masking.whole_words and bool(prepared.words)
    with progress.waiting("packing rows"):
        rows, held_out = (
            {
                name: Rows(
                    store,
                    pack_best_fit(store.offsets, length),
                    length,
                    specials,
                    kind="masked_lm",
                    word_starts=by_words,
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

    mean_rate = (config.masking.rate + (config.masking.final_rate or config.masking.rate)) / 2

    def objective(rate):
        return masked_lm_objective(model, config.masking, vocabulary, rate=rate, execution=config.execution)

    def init(key):
        return init_params(model, key, heads=("masked_lm",))

    about = About(
        model=describe(model, "masked_lm", config.execution, length, mesh),
        data=describe_text(config.data, prepared, rows, held_out, config.eval_rows),
        row=f"{length} tokens",
        epochs=describe_epochs(batches, config.steps),
    )
    result = train(
        config,
        init_params=init,
        matrix_axes=matrix_axes,
        objective=objective(lambda step: rate_at(config.masking, step, config.steps)),
        eval_objective=objective(lambda step: rate_at(config.masking, config.steps, config.steps)),
        batches_from=lambda step: prefetch(
            lambda step: batches.batch(step, mine), step, config.prefetch, config.workers
        ),
        eval_batches=eval_batches,
        finalize_eval=lambda metrics: metrics | {"perplexity": math.exp(min(metrics["loss"], 700.0))},
        run=run,
        config_dict=config_dict,
        save_tokenizer=partial(save_tokenizer, tokenizer),
        origin=origin,
        load_params=load_weights(origin, model, "masked_lm", init, config.seed) if origin else None,
        mesh=mesh,
        tokens_per_step=config.batch_size * length,
        flops_per_step=config.batch_size * length * flops_per_token(model, length, mean_rate),
        about=about,
    )

    summary = summarise(run, result, parameters=count_params(model, "masked_lm"), data=batches.epochs(result.step))
    params = None if result.stopped_by else collected(result.state.params)
    if params is not None:
        texts = token_texts(tokenizer)
        texts += ["?"] * (model.vocab_size - len(texts))
        with progress.waiting("filling in masked words"):
            samples = masked_samples(
                model, params, eval_batches[0], texts, vocabulary, config.masking, config.execution, seed=config.seed
            )
        train_V, held_out_V = (
            np.sum([store.counts(model.vocab_size) for store in stores.values()], axis=0)
            for stores in (prepared.train, prepared.validation)
        )
        entropy = unigram_entropy(train_V, held_out_V, vocabulary)
        write_json(run.path / "samples.json", {"samples": samples, "unigram_entropy": entropy})
        with progress.waiting("drawing the report"):
            write_report(run.path)
        if exporting and result.finished:
            with progress.waiting(f"exporting to {config.export}"):
                save_pretrained(exporting, model, params, tokenizer, card=model_card(run.path), published=published)
            progress.say(f"exported to {config.export}")
    examples = ["--data.train", "TRAIN.tsv", "--data.validation", "VALIDATION.tsv"]
    following = ["./launch.sh", "finetune", "classify", "--init-from", config.run_dir, *examples]
    conclude(summary, run, config, call.command, following)
    return summary


if __name__ == "__main__":
    cli.run(main, PRESETS, prog="mlm", description="Pretrain an encoder by masked LM.")
