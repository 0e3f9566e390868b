"""One text from another (Sutskever et al. 2014): maximise Σ log p(token | those before it, what is read) of what is
written. An example is a row: the encoder reads the prefix, the source and the end token; the decoder writes the target.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier import progress
from espalier.data.examples import Example
from espalier.data.tokenizer import plain_backend, special_ids
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.counts import flops_per_pair
from espalier.models.encoder_decoder import encode_decode
from espalier.models.heads import seq2seq_lm_head
from espalier.models.transformer import init_params
from espalier.models.vocabulary import token_logprobs
from espalier.predict.generate import generate
from espalier.predict.sampling import SamplingConfig
from espalier.task import Evaluation
from espalier.training.step import Objective
from finetune.config import max_length
from finetune.task import OfExamples
from finetune.tasks.instruct.examples import ANSWERS, PAIRS, read_records
from finetune.tasks.instruct.metrics import answer_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.published import Published
    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.rewrite.record import RewriteConfig, RewriteData


class Part(NamedTuple):
    """The pairs of one file, in its order."""

    name: str
    pairs: list[tuple[str, str]]
    fingerprint: str
    facts: tuple[str, ...]


class Rewriting(OfExamples):
    """The pairs of two files, a pair a row."""

    def __init__(self, config: RewriteConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        if not model.num_decoder_layers:
            raise UserError(
                f"--init-from names a model of one stack ({model.model_type}), and an encoder-decoder is wanted: an "
                "`mlm t5-small` run, or hf: with T5; decoders learn this by `finetune instruct` or `translate`"
            )
        data, length = config.data, max_length(config.data, model)
        train, self._validation = (read_pairs(data, side) for side in ("train", "validation"))
        encoded, held_out = (encoded_pairs(part.pairs, tokenizer, data, length) for part in (train, self._validation))
        self.model, self.settings, self._data = model, {}, data
        self.fingerprints = {"train": train.fingerprint, "validation": self._validation.fingerprint}
        self.facts = tuple(dict.fromkeys([*train.facts, *self._validation.facts]))
        self.about = {
            name: f"{part.name}: {len(part.pairs):,} pairs"
            for name, part in (("training", train), ("validation", self._validation))
        }
        self.take(config, tokenizer, mesh, encoded, held_out)
        target = float(np.mean([example.of_row["target_length"] for example in encoded]))
        self.flops_per_row = flops_per_pair(model, round(self.tokens_per_row), round(target))
        self.objective = rewriting_objective(model, execution=config.execution)

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("seq2seq_lm",))

    def finalize_eval(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return metrics | {"perplexity": math.exp(min(metrics["loss"], 700.0))}

    def evaluate(self, model: LoadedModel) -> Evaluation:
        return measured(model, self._validation, self._data)

    def exported(
        self, tokenizer: PreTrainedTokenizerFast, published: Published | None
    ) -> tuple[PreTrainedTokenizerFast, Published | None]:
        return tokenizer, published


def read_pairs(data: RewriteData, side: str) -> Part:
    """The pairs of `train` or `validation`. UserError where the file will not do."""
    paths = tuple(os.path.expanduser(path) for path in getattr(data, side))
    if not paths:
        raise UserError(
            f"no --data.{side} FILE given: name pairs of texts (.jsonl, .json, .csv, .tsv, hf:…), or two text files of "
            "parallel lines"
        )
    name = " and ".join(paths)
    with progress.waiting(f"reading {name}"):
        records, notes, fingerprint = read_records(paths, data.encoding)
    columns = set(records[0].columns)
    names = [*PAIRS, *(("prompt", answer) for answer in ANSWERS)]
    pair = next((pair for pair in names if set(pair) <= columns), None)
    if pair is None:
        raise UserError(
            f"{name} has {', '.join(map(repr, records[0].columns))}; it must have "
            f"{' or '.join(f'{one!r} and {other!r}' for one, other in names)}"
        )
    pairs = []
    for record in records:
        values = dict(zip(record.columns, record.values, strict=True))
        source, target = (values.get(column) for column in pair)
        if not isinstance(source, str) or not isinstance(target, str):
            raise UserError(f"{record.name}: no text under {pair[0]!r} or {pair[1]!r}; correct or remove it")
        if target.strip():
            pairs.append((source, target))
    if not pairs:
        raise UserError(f"{name}: every text under {pair[1]!r} is empty; there is nothing to learn")
    facts = [*notes, f"{name}: {pair[0]!r} is read, {pair[1]!r} is written"]
    if left := len(records) - len(pairs):
        facts.append(f"{name}: {left:,} pairs with nothing to write are left out")
    return Part(name, pairs, fingerprint, tuple(facts))


def encoded_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, data: RewriteData, length: int
) -> list[Example]:
    """Examples of what is read, with the targets `target_ids` int32 [M], 0 behind their end, and `target_length`; both
    texts end with the end token, and too long ones are cut before it."""
    backend, eos = plain_backend(tokenizer), special_ids(tokenizer, need=("eos",)).eos
    sources, targets = (
        [
            [*encoding.ids[: room - 1], eos]
            for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        for texts, room in (
            ((data.prefix + source for source, _ in pairs), length),
            ((target for _, target in pairs), data.max_target_length),
        )
    )
    # One length for all, so that a step is not compiled anew for each.
    most = min(-(-max(map(len, targets)) // 16) * 16, data.max_target_length)
    return [
        Example(
            source,
            [0] * len(source),
            of_row={
                "target_ids": np.pad(np.array(target, np.int32), (0, most - len(target))),
                "target_length": len(target),
            },
        )
        for source, target in zip(sources, targets, strict=True)
    ]


def rewriting_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats a token of what is written), accuracy."""

    def written(batch):
        place_1M = jnp.arange(batch["target_ids"].shape[1], dtype=jnp.int32)[None]
        return place_1M < batch["target_length"][:, None]

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(written(batch).astype(jnp.float32)), 1.0)

    def loss(params, batch, key, norms, train):
        labels_BM, real_BM = batch["target_ids"], written(batch)
        inputs_BM = jnp.pad(labels_BM, ((0, 0), (1, 0)), constant_values=model.decoder_start_token_id)[:, :-1]
        source = {name: batch[name] for name in ("input_ids", "segment_ids", "positions", "row_lengths")}
        target = {"input_ids": inputs_BM, "segment_ids": real_BM.astype(jnp.int32)}
        x_BMD = encode_decode(model, params, source, target, execution=execution, key=key if train else None)
        head, softcap = seq2seq_lm_head(model, params, x_BMD, execution), model.final_logit_softcapping
        logprob_BM, correct_BM = token_logprobs(*head, labels_BM, vocab_size=model.vocab_size, softcap=softcap)
        weights_BM = real_BM.astype(jnp.float32)
        loss_sum, weight = -jnp.sum(weights_BM * logprob_BM), jnp.sum(weights_BM)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_BM * correct_BM), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def measure(model: LoadedModel, data: RewriteData) -> Evaluation:
    """An encoder-decoder on a file of pairs, without training."""
    return measured(
        replace(model, saved={**model.saved, "data": {"prefix": data.prefix}}), read_pairs(data, "validation"), data
    )


def measured(model: LoadedModel, part: Part, data: RewriteData) -> Evaluation:
    """BLEU, chrF and ROUGE of `data.answers` texts that the model writes, beside those of the source as it is.

    Rows: prompt, reference and prediction.
    """
    count = min(data.answers, len(part.pairs))
    if not count:
        return Evaluation({})
    asked = [part.pairs[number * len(part.pairs) // count] for number in range(count)]
    way = SamplingConfig(max_new_tokens=data.max_target_length, temperature=0.0, beams=data.beams)
    said = generate(model, [source for source, _ in asked], way)
    references = [target for _, target in asked]
    figures, warnings = answer_metrics(said, references)
    copied, _ = answer_metrics([source for source, _ in asked], references)
    figures |= {f"baseline_{name}": copied[name] for name in ("bleu", "chrf", "rougeL")}
    rows = [
        {"prompt": source, "reference": target, "prediction": text}
        for (source, target), text in zip(asked, said, strict=True)
    ]
    return Evaluation(figures | {"answers": count}, rows, {}, warnings)
