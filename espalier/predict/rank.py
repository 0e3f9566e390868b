"""How relevant texts are to a query, by a model that reads both together (a cross-encoder)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from espalier.data.examples import Example, encode_pairs
from espalier.errors import UserError
from espalier.predict.use import Use

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel


class Asked(NamedTuple):
    """A query and texts to be ranked, or one text to be scored."""

    query: str
    texts: tuple[str, ...]
    single: bool = False


def read(row: Mapping[str, Any]) -> Asked:
    query, text, texts = row.get("query"), row.get("text"), row.get("texts")
    if isinstance(query, str) and texts is None and isinstance(text, str):
        return Asked(query, (text,), True)
    several = isinstance(texts, list | tuple) and all(isinstance(one, str) for one in texts)
    if not isinstance(query, str) or not several:
        raise UserError(
            f"nothing to rank: a row has query and text, or query and a list of texts, and this one "
            f"{', '.join(row) or 'nothing'}"
        )
    return Asked(query, tuple(cast(Any, texts)))


def rank(model: LoadedModel, inputs: Sequence[Asked]) -> list[dict[str, Any]]:
    """`ranking` of each query: `index` (from 0), `text` and `score` of its texts, the best first (of equal ones the one
    that was given first). Where there was one text to be scored, its `score`.
    """
    return ranked(scores(model, [(asked.query, text) for asked in inputs for text in asked.texts]), inputs)


class Scored(Protocol):
    """What texts are asked of."""

    @property
    def texts(self) -> Sequence[Any]: ...
    @property
    def single(self) -> bool: ...


def ranked(scores: np.ndarray, inputs: Sequence[Scored]) -> list[dict[str, Any]]:
    """The answers to `inputs`, as `rank` gives them, of the scores [N] of all their texts, one behind the other."""
    found = iter(scores.tolist())
    results: list[dict[str, Any]] = []
    for asked in inputs:
        score_N = [next(found) for _ in asked.texts]
        if asked.single:
            results.append({"score": score_N[0]})
            continue
        order = np.argsort(-np.array(score_N), kind="stable").tolist()
        ranking = [{"index": at, "text": asked.texts[at], "score": score_N[at]} for at in order]
        results.append({"ranking": ranking})
    return results


def scores(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Of each query and text, float32 [N]: the logit, which may be any number; higher is more relevant.

    UserError where the model has another number of outputs than one.
    """
    check(model)
    return scores_of(model, encode(model, pairs)) if pairs else np.zeros(0, np.float32)


def check(model: LoadedModel) -> None:
    """UserError where the model is no ranker."""
    outputs = len(model.config.labels)
    if model.head != "sequence_classification" or outputs != 1:
        has = f"{outputs} outputs" if model.head == "sequence_classification" else f"the head {model.head}"
        raise UserError(
            f"this model has {has}, and a ranker is a classifier with one output; train one by "
            "`./launch.sh finetune rank --init-from RUN …`"
        )


def encode(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[Example]:
    queries, texts = ([pair[side] for pair in pairs] for side in (0, 1))
    return encode_pairs(model.tokenizer, queries, texts, model.longest, model.config.causal)


def scores_of(model: LoadedModel, examples: Sequence[Example]) -> np.ndarray:
    return np.array([logits_C[0] for logits_C in model.outputs_of_head(examples)], np.float32)


RANK = Use(
    name="rank",
    takes="query and text, or query and a list of texts",
    reads=read,
    answers=rank,
    example={
        "query": "How far is it to the sea?",
        "texts": ["The sea is an hour away.", "The film was funny.", "Salt water covers most of the planet."],
    },
)
