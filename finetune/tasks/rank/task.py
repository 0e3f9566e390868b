"""Ranking by a cross-encoder: the score of a query and a text that it reads together (Nogueira and Cho 2019).

Two losses. Pairs: binary cross-entropy of each text's relevance (a grade counts as its part of the highest). Groups:
-log softmax over one relevant text and irrelevant ones of its query (Gao et al. 2021, "Rethink training of BERT
rerankers"). Both take clicks, too (finetune/tasks/rank/clicks.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.data.examples import Example, LabelledBatches, cut_words
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import sequence_logits
from espalier.models.transformer import apply, init_params
from espalier.predict.rank import check, scores_of
from espalier.task import Evaluation
from espalier.training.step import Objective
from finetune.config import max_length
from finetune.task import Labelled
from finetune.tasks.rank.bm25 import BM25
from finetune.tasks.rank.examples import GroupBatches, encoded, ranked_pairs, training_pairs
from finetune.tasks.rank.files import read_judged
from finetune.tasks.rank.judged import Judged
from finetune.tasks.rank.metrics import means, measured, validation_loss
from sharding.mesh import host_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.rank.record import RankConfig, RankData

LABEL = "relevance"
TOKENS = ("input_ids", "segment_ids", "positions", "token_type_ids")


class Ranking(Labelled):
    """The pairs of labelled files or folders."""

    def __init__(self, config: RankConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        data, longest = config.data, max_length(config.data, model)
        grouped = config.loss == "softmax"
        train, self._validation = _read(data)
        # A ranker goes on with its head, whatever its one output is called.
        one = model if len(model.labels) == 1 else dataclasses.replace(model, labels=(LABEL,), problem_type=None)
        self.model = one
        pairs = training_pairs(
            *(train, tokenizer, longest, model.causal),
            negatives=data.negatives,
            grouped=grouped,
            seed=config.seed,
        )
        self.settings = {"labels": list(one.labels)}
        self.fingerprints = {"train": train.fingerprint, "validation": self._validation.fingerprint}
        pad_id = special_ids(tokenizer).pad
        self._rows = host_rows(config.batch_size, mesh)
        self._batches: GroupBatches | LabelledBatches
        settings: dict[str, Any] = {"pad_id": pad_id, "max_length": longest}
        if grouped:
            self._batches = GroupBatches(pairs, config.batch_size, data.negatives + 1, config.seed, **settings)
        else:
            self._batches = LabelledBatches(pairs.encoded, config.batch_size, config.seed, **settings)
        self.examples = len(self._batches)
        # A group is a row of the batch.
        texts = min(data.negatives + 1, len(pairs.encoded) / max(len(pairs.groups), 1)) if grouped else 1
        self.tokens_per_row = texts * sum(len(example.ids) for example in pairs.encoded) / len(pairs.encoded)

        queries = self._validation.queries
        shown = min(len(queries), data.eval_queries)
        self._measured = [queries[at] for at in np.arange(shown) * len(queries) // shown]
        if not (chosen := ranked_pairs(self._measured)):
            raise UserError(
                f"{self._validation.path}: no query ranks any text, for BM25 finds none with a word of it; name what "
                "is ranked by --data.run or in the file (negatives)"
            )
        relevance = [query.relevance.get(name, 0) for query, name in chosen]
        self._held_out = encoded(self._validation, chosen, relevance, tokenizer, longest, model.causal)
        self._loss = config.loss
        size = config.batch_size * (data.negatives + 1 if grouped else 1)
        self.eval_batches: Sequence[dict] = LabelledBatches(self._held_out, size, config.seed, **settings).fixed(
            host_rows(size, mesh)
        )
        cut = (
            *cut_words(train.path, pairs.encoded, longest, "pairs that are learnt from"),
            *cut_words(self._validation.path, self._held_out, longest, "pairs that are measured during the training"),
        )
        self.facts: Sequence[str] = tuple(dict.fromkeys((*train.facts, *self._validation.facts, *cut)))
        self.about = _about(train, self._validation, pairs.relevance, len(pairs.groups))
        self.objective = ranking_objective(
            self.model, len(self._held_out), execution=config.execution, weighted=train.clicks
        )

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("sequence_classification",))

    def batch(self, step: int) -> dict:
        return self._batches.batch(step, self._rows)

    def finalize_eval(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """nDCG and the others of at most `data.eval_queries` queries, and the loss over all that these rank."""
        scores_N = metrics.pop("scores")
        labels_N = np.array([example.of_row["labels"] for example in self._held_out])
        found, _ = means(self._measured, scores_N)
        return {"loss": validation_loss(self._measured, scores_N, labels_N, self._loss)} | metrics | found

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """ndcg@10, map, mrr@10, recall@1, recall@10, and those of BM25; predictions.jsonl, run.trec and qrels.trec."""
        return _measure(model, self._validation)


def scores(model: ModelConfig, params, batch: dict, execution: Execution, key: jax.Array | None = None) -> jax.Array:
    """Scores, float32 [B] of pairs [B, T], or [B, G] of groups [B, G, T]; a key turns dropout on."""
    shape = batch["input_ids"].shape
    rows = {name: batch[name].reshape(-1, shape[-1]) for name in TOKENS}
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    x_BTD = apply(model, params, rows, execution=execution, key=body_key)
    return sequence_logits(model, params, x_BTD, rows["segment_ids"], head_key)[:, 0].reshape(shape[:-1])


def ranking_objective(model: ModelConfig, held_out: int, *, execution: Execution, weighted: bool = False) -> Objective:
    """The two pure functions. They train on pairs [B, T] by cross-entropy, on groups [B, G, T] by softmax;
    metrics: loss (nats a pair or group), accuracy.

    batch: also `labels` float32 and `example_weights` float32, [B] or [B, G], 0 for rows that count nothing, and
    `index` int32. An evaluation is of pairs, and gives the count `scores`, float32 [held_out]: that of pair `index` in
    its place. weighted: a group counts as much as the label of its first text says.
    """

    def prepare(batch, key, step, train):
        weights = batch["example_weights"]
        counted = weights[:, 0] if weights.ndim == 2 else weights
        return batch, jnp.maximum(jnp.sum(counted), 1.0)

    def loss(params, batch, key, norms, train):
        found = scores(model, params, batch, execution, key if train else None)
        weights, labels = batch["example_weights"], batch["labels"]
        if found.ndim == 2:
            found_BG = jnp.where(weights > 0, found, jnp.float32(-1e30))
            weights_B = weights[:, 0] * labels[:, 0] if weighted else weights[:, 0]
            losses_B = jax.nn.logsumexp(found_BG, axis=1) - found_BG[:, 0]
            right_B = found_BG[:, 0] >= found_BG.max(1)
        else:
            weights_B = weights
            losses_B = cross_entropy(found, labels)
            right_B = (found > 0) == (labels > 0.5)
        loss_sum, weight = jnp.sum(weights_B * losses_B), jnp.sum(weights_B)
        if not train:
            empty_N = jnp.zeros(held_out, jnp.float32)
            sums = {"scores": (empty_N.at[batch["index"]].add(weights_B * found), None)}
        else:
            sums = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_B * right_B.astype(jnp.float32)), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(sums)

    return Objective(prepare, loss)


def cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """-t log σ(s) - (1 - t) log σ(-s), of each; targets from 0 to 1."""
    return jax.nn.softplus(scores) - targets * scores


def measure(model: LoadedModel, data: RankData) -> Evaluation:
    """A ranker on a file or folder."""
    check(model)
    return _measure(model, read_judged(data, "validation").retrieved(data.depth))


def _measure(model: LoadedModel, judged: Judged) -> Evaluation:
    check(model)
    chosen = ranked_pairs(judged.queries)
    relevance = [query.relevance.get(name, 0) for query, name in chosen]
    examples: list[Example] = encoded(
        *(judged, chosen, relevance, model.tokenizer, model.longest, model.config.causal),
    )
    return measured(judged, scores_of(model, examples), _bm25_scores(judged))


def _read(data: RankData) -> tuple[Judged, Judged]:
    """Both files, with candidates. A collection that both have is searched by one index."""
    train, validation = (read_judged(data, name) for name in ("train", "validation"))
    if any(query.candidates is None for query in (*train.queries, *validation.queries)):
        bm25 = BM25(list(train.texts.values())) if train.texts == validation.texts else None
        train, validation = train.retrieved(data.depth, bm25), validation.retrieved(data.depth, bm25)
    return train, validation


def _bm25_scores(judged: Judged) -> np.ndarray:
    """Of every query with each of its candidates, in the order of ranked_pairs: the baseline."""
    numbers = {name: at for at, name in enumerate(judged.texts)}
    bm25 = BM25(list(judged.texts.values()))
    found: list[np.ndarray] = []
    for query in judged.queries:
        if query.candidates:
            found.append(bm25.scores(query.text)[[numbers[name] for name in sorted(query.candidates)]])
    return np.concatenate(found) if found else np.zeros(0)


def _about(train: Judged, validation: Judged, relevance: Sequence[float], groups: int) -> dict[str, str]:
    relevant = sum(grade > 0 for grade in relevance)
    learnt = f"{len(relevance):,} pairs, {relevant:,} {'clicked' if train.clicks else 'relevant'}"
    if groups:
        what = "a clicked text and others of its query" if train.clicks else "a relevant text and irrelevant ones"
        learnt = f"{groups:,} groups of {what}"
    return {
        "training": f"{train.path}: {len(train.queries):,} queries, {learnt}",
        "validation": f"{validation.path}: {len(validation.queries):,} queries rank {validation.candidates:,} texts",
    }
