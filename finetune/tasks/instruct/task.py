"""Instruction tuning: maximise Σ log p(token | all before it in its example) over the tokens of answers.

Examples are packed into rows, and none sees another (data.packed_examples).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.data.chat import chat_template, end_of_turn
from espalier.data.loader import Batches
from espalier.data.packed_examples import ExampleRows
from espalier.data.tokenizer import special_ids
from espalier.files import sha256_of_text
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head
from espalier.models.transformer import apply, init_params
from espalier.models.vocabulary import token_logprobs
from espalier.predict.generate import TUNED, generate, prompt_ids
from espalier.predict.outputs import outputs
from espalier.predict.sampling import SamplingConfig
from espalier.task import Evaluation
from espalier.training.step import Objective
from finetune.config import max_length
from finetune.task import Labelled, check_decoder
from finetune.tasks.instruct.examples import Item, Part, describe_part, endless, read_part, shown, with_template
from finetune.tasks.instruct.metrics import answer_metrics
from sharding.mesh import host_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.published import Published
    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.instruct.record import InstructConfig, InstructData

STEP = 16
"""Rows are a multiple of so many tokens long."""


class InstructionTuning(Labelled):
    """The examples of two files, packed into rows."""

    def __init__(self, config: InstructConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        check_decoder(model, "answers")
        self._data = config.data
        tokenizer = with_template(tokenizer, config.data)
        rows = host_rows(config.batch_size, mesh)
        train, self._validation = (read_part(config.data, side, tokenizer, model) for side in ("train", "validation"))
        self.model, self.settings, self._rows = model, {}, rows
        template = chat_template(tokenizer) if config.data.template is None else None
        self.fingerprints = {"train": train.fingerprint, "validation": self._validation.fingerprint} | (
            {"chat_template": sha256_of_text(template)} if template else {}
        )
        facts = [*train.facts, *self._validation.facts]
        if template and (warning := endless(tokenizer)):
            facts.append(f"warning: {warning}")
        facts += [shown(*pair, tokenizer) for pair in zip(train.items, train.encoded, strict=True)][: config.show]
        self.facts: Sequence[str] = tuple(dict.fromkeys(facts))
        longest, pad = max_length(config.data, model), special_ids(tokenizer).pad
        length = row_length([len(example.ids) for example in train.encoded], longest, config.batch_size)
        packed = ExampleRows(train.encoded, length, pad_id=pad)
        held_out = ExampleRows(self._validation.encoded, longest, pad_id=pad)
        self._batches = Batches({"train": packed}, config.batch_size, config.seed)
        self.eval_batches: Sequence[dict] = Batches({"validation": held_out}, config.batch_size).fixed(
            len(held_out), rows
        )
        self.examples, self.tokens_per_row, self.predicted = len(packed), packed.fill * length, 1.0
        self.about = {
            "training": describe_part(train),
            "validation": describe_part(self._validation),
            "packed": f"{len(packed):,} rows of {length} tokens, {packed.fill:.1%} of them filled".replace("%", " %"),
        }
        self.objective = instruction_objective(model, execution=config.execution)

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("causal_lm",))

    def batch(self, step: int) -> dict:
        return self._batches.batch(step, self._rows)

    def finalize_eval(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return metrics | {"perplexity": math.exp(min(metrics["loss"], 700.0))}

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """The metrics of `measured`; predictions.jsonl."""
        return measured(model, self._validation, self._data)

    def exported(
        self, tokenizer: PreTrainedTokenizerFast, published: Published | None
    ) -> tuple[PreTrainedTokenizerFast, Published | None]:
        """The tokenizer with its chat template, which puts special tokens where they are, and what ends its answers."""
        if published and self._data.template is None:
            published = published.ended_by(end_of_turn(tokenizer))
        return tokenizer, published


def row_length(sizes: Sequence[int], longest: int, batch_size: int) -> int:
    """Tokens of a packed row: `longest`, or where there are few examples so many that a batch has a row for each."""
    even = -(-sum(sizes) // batch_size // STEP) * STEP
    return min(longest, max(even, -(-max(sizes) // STEP) * STEP))


def instruction_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats a token of an answer), accuracy.

    batch: that of data.packed_examples, with `labels` int32 and `loss_weights` float32, [B, T].
    """

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)

    def loss(params, batch, key, norms, train):
        logprob_BT, correct_BT = label_scores(model, execution, params, batch, key if train else None)
        weights_BT = batch["loss_weights"]
        loss_sum, weight = -jnp.sum(weights_BT * logprob_BT), jnp.sum(weights_BT)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_BT * correct_BT), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def label_scores(
    model: ModelConfig, execution: Execution, params: Any, batch: dict, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(log p(label), 1.0 where the label is the most probable token), float32 [B, T]; a key turns dropout on."""
    x_BTD = apply(model, params, batch, execution=execution, key=key)
    head = causal_lm_head(model, params, x_BTD, execution)
    return token_logprobs(*head, batch["labels"], vocab_size=model.vocab_size, softcap=model.final_logit_softcapping)


def next_scores(model: ModelConfig, execution: Execution, params: Any, batch: dict) -> tuple[jax.Array, jax.Array]:
    """`label_scores` where each token's label is the one behind it."""
    labels_BT = jnp.roll(batch["input_ids"], -1, axis=1)
    return label_scores(model, execution, params, batch | {"labels": labels_BT})


def measure(model: LoadedModel, data: InstructData) -> Evaluation:
    """A decoder on a file of examples, asked as one that was tuned so; by its own template where none is given."""
    tokenizer = with_template(copy.deepcopy(model.tokenizer), data)
    saved = {**model.saved, "task": TUNED, "data": dataclasses.asdict(data)}
    model = dataclasses.replace(model, tokenizer=tokenizer, saved=saved)
    return measured(model, read_part(data, "validation", tokenizer, model.config), data)


def measured(model: LoadedModel, part: Part, data: InstructData) -> Evaluation:
    """loss, perplexity and accuracy of the tokens of all answers; BLEU, chrF and ROUGE of `data.answers` answers that
    the model writes itself, beside those of the source as it is.

    Rows: prompt, reference and prediction.
    """
    scores = outputs(
        *(next_scores, (model.config, model.execution), model.params, part.encoded),
        pad_id=special_ids(model.tokenizer).pad,
        longest=model.config.max_length,
    )
    total, correct, weight = np.zeros(3)
    for example, (logprob_T, correct_T) in zip(part.encoded, scores, strict=True):
        weight_T = np.asarray(example.of_tokens["loss_weights"], np.float64)[1:]
        total -= weight_T @ logprob_T[: len(weight_T)]
        correct += weight_T @ correct_T[: len(weight_T)]
        weight += weight_T.sum()
    found = {
        "loss": float(total / weight),
        "perplexity": math.exp(min(total / weight, 700.0)),
        "accuracy": float(correct / weight),
        "tokens": int(weight),
    }
    asked = evenly(part.items, data.answers)
    room = model.config.max_length
    if not asked:
        return Evaluation(found)
    way = SamplingConfig(
        max_new_tokens=data.max_new_tokens if room is None else min(data.max_new_tokens, max(room // 2, 1)),
        temperature=0.0,
        beams=data.beams,
    )
    asked, left_out = answerable(model, asked, way)
    written = generate(model, [item.prompt for item in asked], way) if asked else []
    references = [item.reference for item in asked]
    figures, said = answer_metrics(written, references) if asked else ({}, [])
    if asked:
        copied, _ = answer_metrics([item.source for item in asked], references)
        figures |= {f"baseline_{name}": copied[name] for name in ("bleu", "chrf", "rougeL")}
    rows = [
        {"prompt": item.prompt, "reference": item.reference, "prediction": text}
        for item, text in zip(asked, written, strict=True)
    ]
    if left_out:
        said.append(f"{left_out:,} prompts leave no room for an answer of {way.max_new_tokens} tokens and got none")
    return Evaluation(found | figures | {"answers": len(asked)}, rows, {}, said)


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of them, evenly spaced."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def answerable(model: LoadedModel, items: Sequence[Item], way: SamplingConfig) -> tuple[list[Item], int]:
    """Those whose prompt leaves room for an answer, and how many do not."""
    room = model.config.max_length
    if room is None:
        return list(items), 0
    kept = [item for item in items if len(prompt_ids(model, item.prompt)) + way.max_new_tokens <= room]
    return kept, len(items) - len(kept)
