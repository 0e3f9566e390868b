"""Sentence embeddings by a bi-encoder: texts that belong together lie near each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from espalier import progress
from espalier.data.examples import Example, cut_words, encode_pairs
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.loading import load
from espalier.models.config import ModelConfig
from espalier.models.repository import PREFIX, local_folder
from espalier.models.sentence_transformers import read_modules
from espalier.models.transformer import init_params
from espalier.predict.embed import default_pooling, embed
from espalier.task import Evaluation
from espalier.training.restore import read_config
from finetune.config import max_length
from finetune.task import Labelled
from finetune.tasks.embed import metrics
from finetune.tasks.embed.batches import PairBatches
from finetune.tasks.embed.examples import Pairs, read_pairs
from finetune.tasks.embed.loss import embedding_objective
from sharding.mesh import host_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.embed.record import EmbedConfig, EmbedData


class SentenceEmbedding(Labelled):
    """The pairs of labelled files, and a bi-encoder that learns from them."""

    def __init__(self, config: EmbedConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        train, validation = (read_pairs(config.data, name) for name in ("train", "validation"))
        length, pooling = max_length(config.data, model), _pooling(config, model)
        if too_long := [size for size in config.matryoshka if size >= model.hidden_size]:
            raise UserError(
                f"matryoshka={too_long[0]}: the embeddings of this model have {model.hidden_size} numbers, and the "
                "loss has that size already; give smaller ones"
            )
        if not train.scored and config.batch_size < 2:
            raise UserError("batch_size=1: the negatives of a query are in the batch; try 64")
        self._config, self._validation, self._rows = config, validation, host_rows(config.batch_size, mesh)
        self.model = model
        self.settings = {"pooling": pooling, "normalize": True, "longest": length}
        self.fingerprints = {"train": train.fingerprint, "validation": validation.fingerprint}
        encoded = [_encoded(part, tokenizer, length, model.causal) for part in (train, validation)]
        cut = [
            cut_words(part.path, own, length, "texts") for part, own in zip((train, validation), encoded, strict=True)
        ]
        self.facts: Sequence[str] = tuple(dict.fromkeys((*train.facts, *validation.facts, *cut[0], *cut[1])))
        scale = _scale(train if train.scored else validation)
        self._batches, held_out = (
            PairBatches(
                part,
                examples,
                config.batch_size,
                config.seed,
                hard_negatives=config.data.hard_negatives,
                pad_id=special_ids(tokenizer).pad,
                max_length=length,
                scale=scale,
            )
            for part, examples in zip((train, validation), encoded, strict=True)
        )
        self.eval_batches: Sequence[dict] = held_out.fixed(self._rows)
        self.examples = len(self._batches)
        self.tokens_per_row = self._batches.tokens_per_row
        self.about = {
            "training": _described(config.data.train, train),
            "validation": _described(config.data.validation, validation),
            "embeddings": f"{model.hidden_size} numbers, pooled from {POOLED[pooling]}",
        }
        self.objective = embedding_objective(
            model,
            pooling=pooling,
            temperature=config.temperature,
            symmetric=config.symmetric,
            sizes=(model.hidden_size, *config.matryoshka),
            scored=config.scored,
            execution=config.execution,
        )

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=())

    def batch(self, step: int) -> dict:
        return self._batches.batch(step, self._rows)

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """recall, nDCG, MAP and MRR, or Spearman and Pearson; each beside that of the model before it was tuned."""
        found = measured(model, self._validation, self._config.matryoshka)
        try:
            untuned = load(str(self._config.init_from))
        except UserError as error:
            said = f"the model before tuning is not measured: {error}"
            return found._replace(warnings=[*found.warnings, said])
        # As this one is: pooled alike, cut alike. As NumPy arrays it is on every device of the mesh.
        untuned = type(model)(
            untuned.config,
            jax.tree.map(np.asarray, untuned.params),
            model.tokenizer,
            untuned.head,
            model.saved,
            model.execution,
        )
        figures = measured(untuned, self._validation, ()).metrics
        before = {f"{name}_before": value for name, value in figures.items() if not name.endswith("_interval")}
        return found._replace(metrics=dict(found.metrics) | before)


def measure(model: LoadedModel, data: EmbedData) -> Evaluation:
    """Any model's embeddings on a file of pairs."""
    return measured(model, read_pairs(data, "validation"), ())


def measured(model: LoadedModel, pairs: Pairs, sizes: Sequence[int]) -> Evaluation:
    """sizes: to which embeddings are also cut; their metrics are named nDCG@10_64, say."""
    from espalier.predict.embed import unit

    with progress.waiting(f"embedding {len(pairs.texts):,} texts"):
        x_TD = unit(embed(model, pairs.texts))
    found, rows = metrics.figures(pairs, x_TD)
    headline = "spearman" if pairs.scored else "ndcg@10"
    for size in sizes:
        found[f"{headline}_{size}"] = metrics.figures(pairs, unit(x_TD[:, :size]))[0][headline]
    return Evaluation(found, rows)


POOLED = {
    "mean": "the mean of a text's states",
    "first": "the state of the first token",
    "last": "the state of the last token",
}


def _pooling(config: EmbedConfig, model: ModelConfig) -> Any:
    """As asked for, else as this run began, or as the model says that it starts from."""
    return config.pooling or _saved_pooling(config) or default_pooling(model)


def _saved_pooling(config: EmbedConfig) -> str | None:
    for source in (config.run_dir, config.init_from):
        if source is None:
            continue
        if str(source).startswith(PREFIX):
            return read_modules(local_folder(source, None)).get("pooling")
        try:
            return read_config(source).get("pooling")
        except UserError:
            continue
    return None


def _encoded(pairs: Pairs, tokenizer: PreTrainedTokenizerFast, length: int, causal: bool) -> list[Example]:
    with progress.waiting(f"tokenizing {len(pairs.texts):,} texts"):
        return encode_pairs(tokenizer, pairs.texts, None, length, causal)


def _scale(pairs: Pairs) -> tuple[float, float]:
    """The least and the greatest score of the training file."""
    scores_N = pairs.scores_N
    return (0.0, 1.0) if scores_N is None else (float(scores_N.min()), float(scores_N.max()))


def _described(path: str | None, pairs: Pairs) -> str:
    kind = "scored pairs" if pairs.scored else "pairs"
    first, second = pairs.columns
    return f"{path}: {len(pairs.pairs_N2):,} {kind} of {len(pairs.texts):,} texts, columns {first!r} and {second!r}"
