"""A reward model (Bradley and Terry 1952; Stiennon et al. 2020; Ouyang et al. 2022, eq. 1):

    p(chosen is preferred) = σ(r(x, chosen) - r(x, rejected)),   loss = -log of it, mean over the pairs

Both answers of a pair stand in one row, as two segments that do not see each other, and a row holds N pairs: a pair is
never cut by the mesh or by micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.data.chat import plain_chat
from espalier.data.examples import Example, LabelledBatches, cut_words
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import sequence_logits
from espalier.models.transformer import apply, init_params
from espalier.predict.score import encode_answers, rewards
from espalier.task import Evaluation
from espalier.training.step import Objective
from finetune.config import max_length
from finetune.preferences import Pair, Preferences, read_preferences
from finetune.task import Labelled, row_words, shared_row
from sharding.mesh import host_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.reward.record import RewardConfig, RewardData

LABEL = "reward"


class Reward(Labelled):
    """The pairs of two files."""

    answers_per_row = 2

    def __init__(self, config: RewardConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        data, longest = config.data, max_length(config.data, model)
        train, self._validation = (read_pairs(data, side) for side in ("train", "validation"))
        # A model that scores texts goes on with its head, whatever its one output is called.
        one = model if len(model.labels) == 1 else dataclasses.replace(model, labels=(LABEL,), problem_type=None)
        self.model, self.settings = one, {"labels": list(one.labels)}
        self.fingerprints = {"train": train.fingerprint, "validation": self._validation.fingerprint}
        facts: list[str] = []
        batches: list[LabelledBatches] = []
        per_row = data.pairs_per_row
        for part in (train, self._validation):
            encoded = encode_answers(tokenizer, both(part.pairs), longest, model.causal)
            kept = differing(encoded)
            facts += [*part.facts, *cut_words(part.path, encoded, longest, "answers"), *alike(part, encoded, kept)]
            if not kept:
                raise UserError(
                    f"{part.path}: what chosen and rejected differ by lies behind the first {longest} tokens of every "
                    "pair; give more with --data.max-length"
                )
            if part is train:
                sizes = list(map(_tokens, kept))
                both_sizes = [sum(two) for two in zip(sizes[::2], sizes[1::2], strict=True)]
                per_row = shared_row(data.pairs_per_row, both_sizes, config, mesh, "data.pairs_per_row")
                self.examples, self.tokens_per_row = len(kept) // 2, sum(sizes) / len(kept) * 2
            settings: dict[str, Any] = {"pad_id": special_ids(tokenizer).pad, "max_length": longest, "together": 2}
            batches.append(
                LabelledBatches(kept, 2 * config.batch_size, config.seed, examples_per_row=2 * per_row, **settings)
            )
        self.data = dataclasses.replace(data, pairs_per_row=per_row)
        self.facts: Sequence[str] = tuple(dict.fromkeys(facts))
        self._rows = host_rows(config.batch_size // per_row, mesh)
        self._batches = batches[0]
        self.eval_batches: Sequence[dict] = batches[1].fixed(self._rows)
        self.about = {
            "training": f"{train.path}: {self.examples:,} pairs",
            "validation": f"{self._validation.path}: {len(batches[1]) // 2:,} pairs",
        }
        if per_row > 1:
            self.about["rows"] = row_words(self._batches, f"{per_row} pairs")
        self.objective = reward_objective(self.model, execution=config.execution)

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("sequence_classification",))

    def batch(self, step: int) -> dict:
        return self._batches.batch(step, self._rows)

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """The metrics of `measured`; predictions.jsonl."""
        return measured(model, self._validation.pairs)


def read_pairs(data: RewardData, side: str) -> Preferences:
    """UserError where a file holds single answers."""
    found = read_preferences(data, side)
    if not found.pairs:
        raise UserError(
            f"{found.path} holds single answers with a label; a reward model learns from pairs (prompt, chosen, "
            "rejected), a classifier from such labels: ./launch.sh finetune classify"
        )
    return found


def both(pairs: Sequence[Pair]) -> list[tuple[Any, Any]]:
    """Prompt with chosen, prompt with rejected, of each pair in turn."""
    return [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def differing(encoded: Sequence[Example]) -> list[Example]:
    """The pairs (two examples in turn) that are two different ones also as tokens, after the cut."""
    twos = zip(encoded[::2], encoded[1::2], strict=True)
    return [example for two in twos if list(two[0].ids) != list(two[1].ids) for example in two]


def alike(part: Preferences, encoded: Sequence[Example], kept: Sequence[Example]) -> tuple[str, ...]:
    """A line on pairs that are left out since they are the same to the model, for people."""
    if not (same := (len(encoded) - len(kept)) // 2):
        return ()
    return (f"{part.path}: {same:,} pairs are left out: their answers are the same after the cut",)


def reward_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats a pair), accuracy (equal scores count half), margin.

    batch: rows [B, T] of N pairs, as 2 N segments, the chosen answers and behind each the rejected one;
    `example_weights` float32 [B, 2 N], 0 where there is no pair.
    """

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["example_weights"][:, ::2]), 1.0)

    def loss(params, batch, key, norms, train):
        body_key, head_key = jax.random.split(key) if train else (None, None)
        x_BTD = apply(model, params, batch, execution=execution, key=body_key)
        weights_BE = batch["example_weights"]
        score_BE = sequence_logits(
            model, params, x_BTD, batch["segment_ids"], head_key, examples=weights_BE.shape[1]
        )[..., 0]  # fmt: skip
        margin_B, weights_B = (score_BE[:, ::2] - score_BE[:, 1::2]).reshape(-1), weights_BE[:, ::2].reshape(-1)
        loss_sum, weight = jnp.sum(weights_B * jax.nn.softplus(-margin_B)), jnp.sum(weights_B)
        right_B = (1.0 + jnp.sign(margin_B)) / 2.0
        sums = {
            "loss": (loss_sum, weight),
            "accuracy": (jnp.sum(weights_B * right_B), weight),
            "margin": (jnp.sum(weights_B * margin_B), weight),
        }
        return loss_sum / norms, jax.lax.stop_gradient(sums)

    return Objective(prepare, loss)


def measure(model: LoadedModel, data: RewardData) -> Evaluation:
    """A reward model on a file of pairs."""
    return measured(model, read_pairs(data, "validation").pairs)


def measured(model: LoadedModel, pairs: Sequence[Pair]) -> Evaluation:
    """loss, accuracy (equal scores count half) and margin of pairs, and the accuracy of preferring the longer answer.

    Rows: prompt, chosen, rejected, score_chosen, score_rejected.
    """
    score_N2 = rewards(model, both(pairs)).astype(np.float64).reshape(-1, 2)
    margin_N = score_N2[:, 0] - score_N2[:, 1]
    longer_N = np.array([len(plain_chat(pair.chosen)) - len(plain_chat(pair.rejected)) for pair in pairs])
    metrics = {
        "loss": float(np.logaddexp(0, -margin_N).mean()),
        "accuracy": float((1 + np.sign(margin_N)).mean() / 2),
        "margin": float(margin_N.mean()),
        "baseline_accuracy": float((1 + np.sign(longer_N)).mean() / 2),
        "pairs": len(pairs),
    }
    rows = [
        {
            "prompt": plain_chat(pair.prompt),
            "chosen": plain_chat(pair.chosen),
            "rejected": plain_chat(pair.rejected),
            "score_chosen": float(score_N2[at, 0]),
            "score_rejected": float(score_N2[at, 1]),
        }
        for at, pair in enumerate(pairs)
    ]
    return Evaluation(metrics, rows)


def _tokens(example: Example) -> int:
    return len(example.ids)
