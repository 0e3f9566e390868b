"""A pretraining task with its text at hand: text → tokens → rows → batches."""

from __future__ import annotations

from typing import Any

from espalier import progress, user_code
from espalier.contracts import Origin
from espalier.data.description import describe_epochs, describe_text
from espalier.data.loader import Batches, Rows
from espalier.data.packing import pack_best_fit, pack_split
from espalier.data.prepare import prepare
from espalier.data.sources import user_sources
from espalier.data.token_tables import token_bytes
from espalier.data.tokenizer import special_ids, vocabulary_size
from espalier.errors import UserError
from espalier.models.counts import flops_per_token
from espalier.pretraining.objective import HeldOut, Setup, TextObjective
from espalier.task import Start, Task
from sharding.mesh import host_rows


def own_code(record: TextObjective, config: Any) -> dict[str, dict[str, str]]:
    """What of the run is code of the user's own: objective, masking, and functions that give text."""
    given = {"objective": record.own} | record.own_code(config)
    # By name and number, for files may be moved.
    sources = [(name.rpartition(":")[2], name) for name in dict.fromkeys(user_sources(config.data))]
    for number, (name, source) in enumerate(sources):
        before = [other for other, _ in sources[:number]].count(name)
        given[f"text {name}" + (f" ({before + 1})" if before else "")] = source
    return {what: user_code.recorded(code) for what, code in given.items() if code is not None}


def open_text(record: TextObjective, config: Any, start: Start) -> Task:
    """Prepare the text that `config` names, and pack it into rows."""
    length, framed, origin = config.data.sequence_length, record.layout == "framed", start.origin
    asked = _asked_vocabulary(config, origin)
    of_weights = record.tokenizer_for(config, start.tokenizer)
    prepared = prepare(
        config.data,
        config.model.vocab_size,
        for_masked_lm=framed or "mask" in record.specials,
        of_weights=of_weights,
        whole_words=record.word_starts(config),
        words=origin.config.get("words", {}) if origin and origin.resumed else None,
    )
    tokenizer = prepared.tokenizer
    specials = special_ids(tokenizer, need=record.needs)
    # Published models have spare rows in their vocabulary.
    size = start.model.vocab_size if config.init_from else vocabulary_size(tokenizer)
    model = start.model.fitted(size, length)
    if not config.init_from:
        model = record.fitted(model, tokenizer)

    def rows_of(store):
        if framed:
            by_words = record.word_starts(config) and bool(prepared.words)
            plan = pack_best_fit(store.offsets, length)
            return Rows(store, plan, length, specials, "framed", word_starts=by_words)
        plan = pack_split(store.offsets, length)
        return Rows(store, plan, length, specials, "shifted", token_bytes=bytes_V)

    bytes_V = None if framed else token_bytes(tokenizer)
    with progress.waiting("packing rows"):
        rows, held_out = (
            {name: rows_of(store) for name, store in stores.items()} for stores in (prepared.train, prepared.validation)
        )
    mine, weights = host_rows(config.batch_size, start.mesh), config.data.weights()
    batches = Batches(rows, config.batch_size, config.seed, weights)
    of_held_out = None if "validation" in held_out else weights
    eval_batches = Batches(held_out, config.batch_size, weights=of_held_out).fixed(config.eval_rows, mine)

    setup, text = Setup(config, model, tokenizer), HeldOut(prepared, eval_batches)
    tokens = config.batch_size * length
    # All the models of another run of this kind are there.
    whole = bool(record.part and origin and origin.config.get("part") == record.part)
    whole = whole and origin is not None and origin.config.get("task") == record.name

    return Task(
        config=config,
        model=model,
        tokenizer=tokenizer,
        init_params=lambda key: record.fresh(setup, key),
        objective=record.build(setup),
        batch=lambda step: batches.batch(step, mine),
        documents=batches.documents,
        eval_batches=eval_batches,
        finalize_eval=record.finalize,
        frozen=start.base(record.frozen(setup)),
        matrix_axes=record.matrix_axes,
        part=record.part,
        beside=record.beside(config, model),
        load_params=origin.restore_params if origin and whole else None,
        scratch=record.init_params is not None and not whole,
        fingerprints=prepared.fingerprints,
        user_code=own_code(record, config),
        settings={"asked_vocabulary": asked} | ({"words": prepared.words} if prepared.words else {}),
        schedules=[schedule() for schedule in record.schedules],
        tokens_per_step=tokens,
        flops_per_step=config.batch_size * record.flops(config, model)
        if record.flops
        else tokens * flops_per_token(model, length, record.predicted(config)),
        longest=length,
        data=describe_text(config.data, prepared, rows, held_out, config.eval_rows),
        row=f"{length} tokens",
        epochs=describe_epochs(batches, config.steps),
        finish=lambda trained: record.finish(setup, text, trained) or {},
        summary=lambda step: {"data": batches.epochs(step)},
        following=record.following(config.run_dir),
    )


def _asked_vocabulary(config: Any, origin: Origin | None) -> int:
    """The tokens that a tokenizer was asked for, which may have found fewer; UserError where a run asked for others."""
    asked = config.model.vocab_size
    if origin is None or not origin.resumed:
        return asked
    # Runs of earlier versions do not say; a saved configuration has what was found.
    before, found = origin.config.get("asked_vocabulary", asked), origin.config["model"]["vocab_size"]
    if asked not in (before, found) and not (config.init_from or config.data.tokenizer):
        raise UserError(
            f"{config.run_dir} holds a run with another tokenizer: model.vocab_size was {before}, now {asked}; to go "
            f"on with it, give --model.vocab-size {before}; to train anew, another --run-dir"
        )
    return before
