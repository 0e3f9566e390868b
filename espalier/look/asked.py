"""What is asked of a model about a text, and the score that is to be explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.examples import token_span
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.look import framed
from espalier.look.framed import Framed
from espalier.models.logits import of_states
from espalier.models.taps import EMBEDDINGS, Taps
from espalier.models.transformer import apply
from espalier.predict.answer import Answering, find_answers
from espalier.predict.fill import MASK
from espalier.predict.loaded import LoadedModel
from espalier.predict.use import use_of

OUTSIDE = "O"
"""The tag of words that are in no entity."""


@dataclass(frozen=True)
class Wanted:
    """What is asked, beside the text; all may be left out but what the model reads with a text."""

    target: str | None = None
    """The class, tag or word that is explained, or an answer as it stands in the text; None = the most probable."""
    text_b: str | None = None
    """The second text of a pair."""
    query: str | None = None
    """What a ranker judges the text by."""
    question: str | None = None
    """What is answered out of the text."""
    word: str | None = None
    """The word whose tag is explained; None = the one whose tag other than O is the most probable."""


@dataclass(frozen=True, eq=False)
class Asked(Framed):
    """A text with one score of the model on it: a logit, or of an answer the sum of those of its two ends."""

    what: str
    """In words: the class, the tag of Bern."""
    places: tuple[int, ...]
    """The tokens where the score stands: one, the two ends of an answer, or () where it is of the whole text."""
    target: int
    """The class or token whose score it is; of an answer 0."""
    name: str
    """Of the target, as text."""
    probability: float = 0.0
    """Of the target: among classes or tokens; of a class by itself its logistic function; of an answer that of its two
    ends among the tokens of the text that may hold one."""

    @property
    def context(self) -> slice:
        """The tokens that may be the ends of an answer."""
        second = np.flatnonzero(self.batch["token_type_ids"][0] == 1)
        return slice(int(second[0]), int(second[-1])) if len(second) else slice(0, len(self.tokens))


class Score(NamedTuple):
    """What of Asked says which score it is."""

    what: str
    places: tuple[int, ...]
    target: int
    name: str


class Kind(NamedTuple):
    """How models of one use (predict.use) are asked."""

    takes: tuple[str, ...]
    """What may be given beside text and target."""
    row: Callable[[LoadedModel, str, Wanted], Framed]
    score: Callable[[LoadedModel, Framed, str, Wanted], Score]


def ask(model: LoadedModel, text: str, wanted: Wanted | None = None) -> Asked:
    """The text as the model's predictions read it, and what is explained.

    UserError where the model is for something else, the text is empty or too long, or there is no such target.
    """
    wanted = wanted or Wanted()
    refuse_hidden_from_before(model)
    use = use_of(model).name
    if use not in KINDS:
        raise UserError(f"a model that can {use} is not explained; those are that can {', '.join(KINDS)}")
    kind = KINDS[use]
    for name in ("text_b", "query", "question", "word"):
        given = getattr(wanted, name)
        if given is not None and name not in kind.takes:
            raise UserError(f"{name}={given!r} is not for a model that can {use}; leave it out")
        if given is None and name in kind.takes and name in ("query", "question"):
            raise UserError(f"this model can {use}, and reads a {name} with the text; give {name}")
    if not text.strip():
        raise UserError("the text is empty; give one")
    row = kind.row(model, text, wanted)
    asked = Asked(**vars(row), **kind.score(model, row, text, wanted)._asdict())
    return replace(asked, probability=float(scored(model, asked)[1]))


def refuse_hidden_from_before(model: LoadedModel) -> None:
    """UserError for a decoder that sees both sides: its scores stand one place before the tokens they are of."""
    if model.head == "causal_lm" and not model.config.causal:
        raise UserError("a decoder that sees both sides is not looked into; leave out --bidirectional, or take another")


def scored(
    model: LoadedModel, asked: Asked, params: Any = None, batch: Any = None, taps: Taps | None = None
) -> tuple[Any, Any, Any]:
    """(logit, probability, what the taps read) of the target; with other parameters or tokens, if they are given."""
    params = model.params if params is None else params
    batch = dict(asked.batch if batch is None else batch)
    x_BTD, seen = apply(model.config, params, batch, execution=model.execution, taps=taps or Taps())
    return *of_target(model, asked, params, x_BTD), seen


def of_target(model: LoadedModel, asked: Asked, params: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logit, probability) of the target on final states [1, T, D]."""
    if model.head != "question_answering":
        row_C = row_of(model, asked.places, params, x_BTD)
        return row_C[asked.target], chances(model, row_C)[asked.target]
    logits_T2 = _logits(model, params, x_BTD)[0]
    chances_T2 = jax.nn.softmax(logits_T2[asked.context], axis=0)
    ends, first = jnp.array(asked.places), asked.context.start
    return logits_T2[ends, jnp.arange(2)].sum(), chances_T2[ends - first, jnp.arange(2)].prod()


def row_of(model: LoadedModel, places: Sequence[int], params: Any, x_BTD: jax.Array) -> jax.Array:
    """The logits of all classes [C] or tokens [V] at the place of the score, or of the whole text."""
    if not places:
        return _logits(model, params, x_BTD)[0]
    # Of a language model, the scores of one token alone.
    (place,) = places
    return _logits(model, params, x_BTD[:, place : place + 1])[0, 0]


def chances(model: LoadedModel, row_C: jax.Array) -> jax.Array:
    """Logits as the probabilities that predictions give (predict.classify)."""
    if model.head == "sequence_classification":
        row_C = row_C / (model.saved.get("tuned") or {}).get("temperature", 1.0)
        if model.config.problem_type == "multi_label_classification" or len(model.config.labels) == 1:
            return jax.nn.sigmoid(row_C)
    return jax.nn.softmax(row_C)


def score_of(model: LoadedModel, asked: Asked) -> Any:
    """(params, x_TD) → (logit, probability) of the target where the vectors x_TD enter the stack."""

    def score(params: Any, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        taps = Taps(change={EMBEDDINGS: lambda x_BTD, given: given[None]}, given={EMBEDDINGS: x_TD})
        return scored(model, asked, params, taps=taps)[:2]

    return score


def embedded(model: LoadedModel, asked: Asked, ids_T: np.ndarray) -> jax.Array:
    """What enters the stack for other tokens in the same places, [T, D]."""
    batch = asked.batch | {"input_ids": ids_T[None].astype(np.int32)}
    seen = scored(model, asked, batch=batch, taps=Taps(read=(EMBEDDINGS,)))[2]
    return seen[EMBEDDINGS][0].astype(jnp.float32)


def _logits(model: LoadedModel, params: Any, x_BTD: jax.Array) -> jax.Array:
    segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    return of_states(model.config, model.head, params, x_BTD, segments_BT, model.execution)


def _states(model: LoadedModel, row: Framed) -> jax.Array:
    batch: dict[str, Any] = dict(row.batch)
    return apply(model.config, model.params, batch, execution=model.execution)


def _class(model: LoadedModel, row: Framed, text: str, wanted: Wanted) -> Score:
    at, name = _named(model, row_of(model, (), model.params, _states(model, row)), wanted.target, "class")
    return Score("class", (), at, name)


def _score(model: LoadedModel, row: Framed, text: str, wanted: Wanted) -> Score:
    if wanted.target is not None:
        raise UserError(f"target={wanted.target!r} is not for a model that can rank; it has one score")
    return Score("relevance", (), 0, "relevant")


def _masked(model: LoadedModel, row: Framed, text: str, wanted: Wanted) -> Score:
    mask = special_ids(model.tokenizer, need=("mask",)).mask
    if mask not in row.ids:
        raise UserError(f"no {MASK} in the text; write one where a word is to be found")
    return _token(model, row, f"word at {MASK}", row.ids.index(mask), wanted.target)


def _next(model: LoadedModel, row: Framed, text: str, wanted: Wanted) -> Score:
    return _token(model, row, "next word", len(row.ids) - 1, wanted.target)


def _tag(model: LoadedModel, row: Framed, text: str, wanted: Wanted) -> Score:
    labels = model.config.labels
    firsts = [begin for begin, _ in row.words]
    logits_WC = np.asarray(_logits(model, model.params, _states(model, row)))[0, firsts]
    if wanted.word is not None:
        if wanted.word not in row.texts:
            raise UserError(f"word={wanted.word!r} is no word of the text; it has {', '.join(row.texts)}")
        word = row.texts.index(wanted.word)
    else:
        chances_WC = np.asarray(jax.nn.softmax(logits_WC, axis=-1))
        entities = [at for at, label in enumerate(labels) if label != OUTSIDE]
        word = int(chances_WC[:, entities].max(-1).argmax())
    at, name = _named(model, logits_WC[word], wanted.target, "tag")
    return Score(f"tag of “{row.texts[word]}”", (firsts[word],), at, name)


def _answer(model: LoadedModel, row: Framed, text: str, wanted: Wanted) -> Score:
    assert wanted.question is not None
    if wanted.target is None:
        (found,) = find_answers(model, [(wanted.question, text)], Answering.of(model))
        if not found.spans:
            raise UserError("the text has nothing that could be an answer; give another")
        begin, end = found.spans[0]
    else:
        begin = text.find(wanted.target)
        end = begin + len(wanted.target.rstrip())
        if begin < 0 or not wanted.target.strip():
            raise UserError(f"target={wanted.target!r} does not stand in the text; give an answer as it stands there")
    ends = token_span(row.example, begin, end, text=1)
    assert ends is not None, "a span of the context"
    return Score("answer", ends, 0, text[begin:end])


def _named(model: LoadedModel, row_C: Any, target: str | None, kind: str) -> tuple[int, str]:
    labels = model.config.labels
    if target is not None and target not in labels:
        raise UserError(f"target={target!r} is no {kind} of this model; it has {', '.join(labels)}")
    at = int(np.asarray(row_C).argmax()) if target is None else labels.index(target)
    return at, labels[at]


def _token(model: LoadedModel, row: Framed, what: str, place: int, target: str | None) -> Score:
    if target is None:
        at = int(np.asarray(row_of(model, (place,), model.params, _states(model, row))).argmax())
    else:
        forms = [model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in (target, f" {target}")]
        one = [ids[0] for ids in forms if len(ids) == 1]
        if not one:
            raise UserError(f"target={target!r} is several tokens ({len(forms[0])}); give a word that is one")
        at = int(one[0])
    return Score(what, (place,), at, str(model.tokenizer.decode([at])))


KINDS = {
    "classify": Kind(("text_b",), lambda model, text, wanted: framed.texts(model, text, wanted.text_b), _class),
    "rank": Kind(("query",), lambda model, text, wanted: framed.texts(model, str(wanted.query), text), _score),
    "fill": Kind((), lambda model, text, wanted: framed.plain(model, text), _masked),
    "generate": Kind((), lambda model, text, wanted: framed.plain(model, text), _next),
    "tag": Kind(("word",), lambda model, text, wanted: framed.sentence(model, text), _tag),
    "answer": Kind(("question",), lambda model, text, wanted: framed.texts(model, str(wanted.question), text), _answer),
}
