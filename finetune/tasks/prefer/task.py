"""Learning from preferences: a decoder is moved towards chosen answers and away from rejected ones, by a loss of
finetune/tasks/prefer/losses.py.

Both answers of a pair stand in one row, as two segments that do not see each other, and a row holds N pairs. KTO's
pairs are an answer, and behind the same prompt an answer to another one, by which the divergence from the reference is
estimated.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.data.chat import chat_template, end_of_turn, plain_chat
from espalier.data.examples import LabelledBatches
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.files import sha256_of_text
from espalier.models.config import Execution, ModelConfig
from espalier.models.logprobs import label_logprobs
from espalier.models.transformer import init_params
from espalier.task import Evaluation
from espalier.training.adapters import without
from espalier.training.step import Objective, micro_batches
from finetune.config import max_length
from finetune.preferences import Preferences, as_verdicts, read_preferences
from finetune.task import Labelled, check_decoder, row_words, shared_row
from finetune.tasks.instruct.examples import endless
from finetune.tasks.prefer import losses
from finetune.tasks.prefer.examples import Encoded, encode_preferences, with_template
from finetune.tasks.prefer.reference import Reference, answer_logprobs
from sharding.mesh import host_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.published import Published
    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.prefer.record import PreferConfig, PreferData

PARTS = ("train", "validation")


class Preferring(Labelled):
    """The preferences of two files."""

    answers_per_row = 2

    def __init__(self, config: PreferConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        check_decoder(model, "answers", "a clm or instruct run")
        data, longest = config.data, max_length(config.data, model)
        read = [read_preferences(data, side) for side in PARTS]
        tokenizer, chat = with_template(tokenizer, data, read)
        parts = [encode(part, config.loss, tokenizer, longest, chat, config.seed) for part in read]
        self._config, self._validation, self._pad_id = config, parts[1], special_ids(tokenizer).pad
        self.model, self.settings = model, {"chat": chat}
        template = chat_template(tokenizer) if chat else None
        self.fingerprints = {side: part.fingerprint for side, part in zip(PARTS, read, strict=True)} | (
            {"chat_template": sha256_of_text(template)} if template else {}
        )
        facts = [fact for part, encoded in zip(read, parts, strict=True) for fact in (*part.facts, *encoded.facts)]
        if template and (warning := endless(tokenizer)):
            facts.append(f"warning: {warning}")
        self.facts: Sequence[str] = tuple(dict.fromkeys(facts))
        self._referenced = config.loss not in losses.WITHOUT_REFERENCE
        # Computed at each step where that was asked for; the validation file is gone through many times.
        self._kept = {
            side: part.examples
            for side, part in zip(PARTS, parts, strict=True)
            if self._referenced and (side == "validation" or config.reference == "precomputed")
        }
        self._reference: Reference | None = None
        sizes = [len(example.ids) for example in parts[0].examples]
        both = [sum(two) for two in zip(sizes[::2], sizes[1::2], strict=True)]
        per_row = shared_row(data.pairs_per_row, both, config, mesh, "data.pairs_per_row")
        self.data, self._per_row = dataclasses.replace(data, pairs_per_row=per_row), per_row
        self._rows = host_rows(config.batch_size // per_row, mesh)
        self._batches, held_out = (self._rows_of(part, longest) for part in parts)
        self.eval_batches: Sequence[dict] = held_out.fixed(self._rows)
        if self._referenced:
            self.eval_batches = [
                batch | {"reference": np.zeros(batch["index"].shape, np.float32)} for batch in self.eval_batches
            ]
        train = parts[0].examples
        self.examples, self.predicted = len(train) // 2, 1.0
        self.tokens_per_row = 2 * sum(len(example.ids) for example in train) / len(train)
        what = "pairs" if parts[0].pairs else "single answers"
        self.about = {
            "training": f"{read[0].path}: {self.examples:,} {what}",
            "validation": f"{read[1].path}: {len(held_out) // 2:,} {what}",
        }
        if per_row > 1:
            self.about["rows"] = row_words(self._batches, f"{per_row} pairs")
        self.objective = preference_objective(model, config, execution=config.execution)

    def _rows_of(self, part: Encoded, longest: int) -> LabelledBatches:
        good = [verdict.good for verdict in part.verdicts]
        examples = [
            example._replace(of_row={"index": at} | ({"good": int(good[at // 2])} if good else {}))
            for at, example in enumerate(part.examples)
        ]
        settings: dict[str, Any] = {"pad_id": self._pad_id, "max_length": longest, "together": 2}
        return LabelledBatches(
            *(examples, 2 * self._config.batch_size, self._config.seed),
            examples_per_row=2 * self._per_row,
            **settings,
        )

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("causal_lm",))

    def begins(self, run: Path, resumed: bool) -> Callable[[dict], None] | None:
        """The reference is computed where a run begins, and read where it goes on."""
        if not self._referenced:
            return None
        reference = self._reference = Reference(run, self._kept, self._pad_id)
        if resumed:
            reference.read()
            self._fill()
            return None

        def compute(params: dict) -> None:
            reference.compute(self.model, self._config.execution, params)
            self._fill()

        return compute

    def _fill(self) -> None:
        assert self._reference is not None
        known_N = self._reference.of["validation"].reshape(-1)
        for batch in self.eval_batches:
            batch["reference"][:] = np.where(batch["example_weights"] > 0, known_N[batch["index"]], 0)

    def batch(self, step: int) -> dict:
        batch = self._batches.batch(step, self._rows)
        if self._reference is not None:
            # The first batch is asked for when the run has its folder.
            self._reference.write()
            if "train" in self._kept:
                batch["reference"] = self._reference.of["train"].reshape(-1)[batch["index"]]
        return batch

    def finalize_eval(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return with_margin(metrics)

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """The metrics of `measured`; predictions.jsonl."""
        reference = self._reference.of["validation"] if self._reference is not None else None
        return measured(model, self._validation, reference, self._config)

    def exported(
        self, tokenizer: PreTrainedTokenizerFast, published: Published | None
    ) -> tuple[PreTrainedTokenizerFast, Published | None]:
        """The tokenizer with its chat template, and what ends its answers."""
        if published and self.settings["chat"]:
            published = published.ended_by(end_of_turn(tokenizer))
        return tokenizer, published


def encode(
    part: Preferences, loss: str, tokenizer: PreTrainedTokenizerFast, longest: int, chat: bool, seed: int
) -> Encoded:
    """The rows of a file for a loss: pairs, of KTO single answers. UserError where pairs are wanted and not there."""
    if loss != "kto" and not part.pairs:
        raise UserError(
            f"{part.path} holds single answers with a label, from which --loss kto learns; {loss} needs pairs (prompt, "
            "chosen, rejected)"
        )
    verdicts = (part.verdicts or as_verdicts(part.pairs)) if loss == "kto" else []
    if verdicts and len({verdict.good for verdict in verdicts}) < 2:
        raise UserError(f"{part.path}: every answer has the same label; KTO learns from good and bad ones")
    return encode_preferences(part, [] if verdicts else part.pairs, verdicts, tokenizer, longest, chat, seed)


def answer_sums(
    model: ModelConfig, execution: Execution, params: Any, batch: dict, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(log π(y|x) summed over the tokens of each answer, how many these are), float32 [B·N, 2]; a key turns dropout on.

    batch: rows [B, T] of N pairs, as 2 N segments, with `loss_weights` float32 [B, T] and `example_weights` [B, 2 N].
    """
    rows = {name: batch[name] for name in ("input_ids", "segment_ids", "positions", "token_type_ids")}
    labels_BT = jnp.roll(batch["input_ids"], -1, axis=1)
    logprob_BT, _ = label_logprobs(model, params, rows, labels_BT, execution, key=key)
    # The first token of a segment is never an answer's, so that none is predicted from another segment.
    weights_BT = jnp.roll(batch["loss_weights"], -1, axis=1)
    numbers_E1 = jnp.arange(1, batch["example_weights"].shape[1] + 1)[:, None]
    own_BET = jnp.where(batch["segment_ids"][:, None] == numbers_E1, weights_BT[:, None], 0.0)
    return _pairs(jnp.sum(own_BET * logprob_BT[:, None], axis=2)), _pairs(jnp.sum(own_BET, axis=2))


def _pairs(of_examples_BE: jax.Array) -> jax.Array:
    """What is said of 2 N answers in each row, [B·N, 2]."""
    return of_examples_BE.reshape(-1, 2)


def preference_objective(model: ModelConfig, config: PreferConfig, *, execution: Execution) -> Objective:
    """The pure functions of the objective; metrics: loss (mean over pairs), accuracy (equal rewards count half),
    margin; with a reference also kl (nats an answer), of KTO reward_good and reward_bad.

    batch: rows of N pairs (`answer_sums`), `example_weights` float32 [B, 2 N], and with a reference its
    log-probabilities `reference` float32 [B, 2 N]; without these they are those of the model without its adapters. KTO:
    also `good`, int32 [B, 2 N].
    """
    beta = config.beta if config.beta is not None else losses.BETA[config.loss]
    referenced = config.loss not in losses.WITHOUT_REFERENCE

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(_pairs(batch["example_weights"])[:, 0]), 1.0)

    def log_ratio(params, batch, key, policy_B2):
        if "reference" in batch:
            return policy_B2 - _pairs(batch["reference"])
        reference_B2, _ = answer_sums(model, execution, without(params), batch)
        return policy_B2 - jax.lax.stop_gradient(reference_B2)

    def pairs(params, batch, key, norms, train):
        policy_B2, size_B2 = answer_sums(model, execution, params, batch, key if train else None)
        weights_B = _pairs(batch["example_weights"])[:, 0]
        # Where there is no pair, there are no tokens.
        size_B2 = jnp.maximum(size_B2, 1.0)
        if config.loss == "orpo":
            loss_B, reward_B2 = losses.orpo(policy_B2, size_B2, beta), beta * policy_B2 / size_B2
        elif config.loss == "simpo":
            loss_B, reward_B2 = losses.simpo(policy_B2, size_B2, beta, config.gamma), beta * policy_B2 / size_B2
        else:
            ratio_B2 = log_ratio(params, batch, key, policy_B2)
            function = losses.dpo if config.loss == "dpo" else losses.ipo
            loss_B, reward_B2 = function(ratio_B2, jnp.zeros_like(ratio_B2), beta), beta * ratio_B2
        margin_B = reward_B2[:, 0] - reward_B2[:, 1]
        loss_B = jnp.where(weights_B > 0, loss_B, 0.0)
        loss_sum, weight = jnp.sum(weights_B * loss_B), jnp.sum(weights_B)
        sums = {
            "loss": (loss_sum, weight),
            "accuracy": (jnp.sum(weights_B * (1.0 + jnp.sign(margin_B)) / 2.0), weight),
            "margin": (jnp.sum(weights_B * margin_B), weight),
        }
        if referenced:
            sums["kl"] = (-jnp.sum(weights_B[:, None] * reward_B2) / beta, 2.0 * weight)
        return loss_sum / norms, jax.lax.stop_gradient(sums)

    if config.loss != "kto":
        return Objective(prepare, pairs)

    def ratios(params, batch, key, train):
        policy_B2, _ = answer_sums(model, execution, params, batch, key if train else None)
        return log_ratio(params, batch, key, policy_B2)

    def divergence(ratio_B2, batch):
        """Σ of log π(y'|x)/π_ref(y'|x) over answers y' to other prompts."""
        return jnp.sum(_pairs(batch["example_weights"])[:, 0] * ratio_B2[:, 1])

    def against(params, batch, key, norms, train, kl=None):
        """kl: over the whole batch; None = this is the whole batch."""
        ratio_B2 = ratios(params, batch, key, train)
        weights_B, good_B = _pairs(batch["example_weights"])[:, 0], _pairs(batch["good"])[:, 0]
        if kl is None:
            kl = losses.kto_kl(divergence(ratio_B2, batch), norms)
        loss_B = losses.kto(ratio_B2[:, 0], good_B, kl, beta, config.desirable, config.undesirable)
        loss_sum, weight = jnp.sum(weights_B * loss_B), jnp.sum(weights_B)
        right_B = jnp.where(good_B > 0, 1.0, -1.0) * (ratio_B2[:, 0] - kl)
        sums = {
            "loss": (loss_sum, weight),
            "accuracy": (jnp.sum(weights_B * (1.0 + jnp.sign(right_B)) / 2.0), weight),
            "kl": (kl * weight, weight),
        }
        for name, is_good in (("reward_good", True), ("reward_bad", False)):
            these_B = weights_B * ((good_B > 0) == is_good).astype(jnp.float32)
            sums[name] = (jnp.sum(these_B * beta * ratio_B2[:, 0]), jnp.sum(these_B))
        return loss_sum / norms, jax.lax.stop_gradient(sums)

    def gradient(complete, params, batch, key, norms, accumulation):
        """Micro-batches twice: once for the divergence of the whole batch, once for its gradient."""
        parts = jnp.arange(accumulation), micro_batches(batch, accumulation)

        def summed(numbered):
            number, part = numbered
            return divergence(ratios(complete(params), part, jax.random.fold_in(key, number), True), part)

        kl = losses.kto_kl(jnp.sum(jax.lax.map(summed, parts)), norms)

        def part_of_it(numbered):
            number, part = numbered

            def loss(params):
                return against(complete(params), part, jax.random.fold_in(key, number), norms, True, kl)

            return jax.value_and_grad(loss, has_aux=True)(params)

        found = jax.lax.map(part_of_it, parts)
        return jax.tree.map(lambda stacked: jnp.sum(stacked, axis=0), found)

    return Objective(prepare, against, divisible=False, gradient=gradient)


def with_margin(metrics: dict[str, Any]) -> dict[str, Any]:
    """Of KTO, whose good and bad answers are apart, the margin between their rewards."""
    if "reward_good" in metrics and "margin" not in metrics:
        return metrics | {"margin": metrics["reward_good"] - metrics["reward_bad"]}
    return metrics


def measure(model: LoadedModel, data: PreferData) -> Evaluation:
    """A decoder on a file of pairs, without a reference: how often it finds the chosen answer likelier."""
    from finetune.tasks.prefer.record import PreferConfig

    part = read_preferences(data, "validation")
    if not part.pairs:
        raise UserError(f"{part.path} holds single answers; without a training a decoder is measured on pairs")
    tokenizer, chat = with_template(copy.deepcopy(model.tokenizer), data, [part])
    longest = max_length(data, model.config)
    encoded = encode_preferences(part, part.pairs, [], tokenizer, longest, chat, 0)
    return measured(model, encoded, None, PreferConfig(loss="simpo"))


def measured(model: LoadedModel, part: Encoded, reference_N2: np.ndarray | None, config: PreferConfig) -> Evaluation:
    """Of pairs `likelier`: how often the chosen answer has the higher probability; with a reference also accuracy,
    margin, kl (as `preference_objective`) and baseline_likelier. Of single answers reward_good, reward_bad and their
    margin.

    Rows: report.py says which.
    """
    pad_id = special_ids(model.tokenizer).pad
    policy_N2 = answer_logprobs(model.config, model.execution, model.params, part.examples, pad_id).astype(np.float64)
    beta = config.beta if config.beta is not None else losses.BETA[config.loss]
    metrics: dict[str, Any] = {}
    if part.verdicts:
        assert reference_N2 is not None
        good_N = np.array([verdict.good for verdict in part.verdicts])
        reward_N = beta * (policy_N2[:, 0] - reference_N2[:, 0])
        metrics = {"reward_good": float(reward_N[good_N].mean()), "reward_bad": float(reward_N[~good_N].mean())}
        metrics = with_margin(metrics) | {"answers": len(good_N)}
        rows = [
            {
                "prompt": plain_chat(verdict.prompt),
                "answer": plain_chat(verdict.answer),
                "good": verdict.good,
                "logprob": float(policy_N2[at, 0]),
                "reference_logprob": float(reference_N2[at, 0]),
            }
            for at, verdict in enumerate(part.verdicts)
        ]
        return Evaluation(metrics, rows)
    metrics["likelier"] = _preferred(policy_N2)
    if reference_N2 is not None:
        ratio_N2 = policy_N2 - reference_N2
        metrics["baseline_likelier"] = _preferred(reference_N2)
        metrics |= {"accuracy": _preferred(ratio_N2), "margin": float(beta * (ratio_N2[:, 0] - ratio_N2[:, 1]).mean())}
        metrics["kl"] = float(-ratio_N2.mean())
    rows = []
    for at, pair in enumerate(part.pairs):
        said = {name: plain_chat(getattr(pair, name)) for name in ("prompt", "chosen", "rejected")}
        row: dict[str, Any] = said | _named("logprob", policy_N2[at])
        rows.append(row if reference_N2 is None else row | _named("reference", reference_N2[at]))
    return Evaluation(metrics | {"pairs": len(part.pairs)}, rows)


def _named(name: str, two: np.ndarray) -> dict[str, float]:
    return {f"{name}_chosen": float(two[0]), f"{name}_rejected": float(two[1])}


def _preferred(score_N2: np.ndarray) -> float:
    """How often the first is higher; equal ones count half."""
    return float((1 + np.sign(score_N2[:, 0] - score_N2[:, 1])).mean() / 2)
