"""Which of several texts goes best with a question: by how likely a language model finds each behind it.

A choice is scored by Σ log p of its tokens given the question and those before; that sum may be divided by how many
tokens or bytes the choice has (Brown et al. 2020, section 2.4; Gao 2021, "Multiple choice normalization"). An encoder
scores each token given all others (Salazar et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from espalier.data.examples import Example
from espalier.data.token_tables import unspaced
from espalier.data.tokenizer import plain_backend, special_ids
from espalier.errors import UserError
from espalier.predict.likelihood import Said, following, framing, hidden_scores
from espalier.predict.outputs import outputs, softmax
from espalier.predict.use import Use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel

Normalize = Literal["none", "tokens", "bytes"]
NORMALIZE: tuple[Normalize, ...] = ("none", "tokens", "bytes")
HEADS = ("causal_lm", "masked_lm")
CHUNK = 1024
"""Questions whose rows are made and scored at a time."""


class Asked(NamedTuple):
    question: str
    """May be empty: then the choices are whole texts."""
    choices: tuple[str, ...]


class Choice(NamedTuple):
    """A choice behind its question, as tokens."""

    ids: list[int]
    """Those of both, without special tokens; a question that is too long has lost its beginning."""
    own: int
    """How many of them, at the end, are of the choice."""
    bytes: int
    """Of the choice in UTF-8."""
    cut: bool = False
    """Whether the question lost some."""


def read(row: Mapping[str, Any]) -> Asked:
    """A row with `choices` and `question`, `context` or both (the context first, on a line of its own)."""
    parts = [row[name] for name in ("context", "question") if row.get(name)]
    choices = row.get("choices")
    if not isinstance(choices, list | tuple) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise UserError(
            "no choices: a row has question (or context) and a list of two or more choices that are not empty, and "
            f"this one {', '.join(row) or 'nothing'}"
        )
    if not all(isinstance(part, str) for part in parts):
        raise UserError("question and context are texts, and those of this row are not")
    return Asked("\n".join(parts), tuple(choices))


def choose(model: LoadedModel, inputs: Sequence[Asked], normalize: Normalize | None = None) -> list[dict[str, Any]]:
    """Of each: `label` (number of the best choice, from 0), `choice` (its text), `probability` of it and
    `probabilities` (softmax over the scores), `log_likelihoods` in nats, not normalised.

    normalize: unset = as the model was trained, else "none".
    """
    normalize = normalize or trained_normalize(model)
    results = []
    for asked, found_3C in zip(inputs, scores(model, inputs), strict=True):
        score_C = found_3C[NORMALIZE.index(normalize)]
        probability_C = softmax(score_C)
        best = int(score_C.argmax())
        results.append(
            {
                "label": best,
                "choice": asked.choices[best],
                "probability": float(probability_C[best]),
                "probabilities": list(map(float, probability_C)),
                "log_likelihoods": list(map(float, found_3C[0])),
            }
        )
    return results


def trained_normalize(model: LoadedModel) -> Normalize:
    saved = model.saved.get("data") or {}
    return saved.get("normalize", "none") if model.saved.get("task") == "multiple_choice" else "none"


def scores(model: LoadedModel, inputs: Sequence[Asked]) -> list[np.ndarray]:
    """Of each a float64 [3, C]: the log-likelihood of each choice, by tokens, and by bytes (NORMALIZE)."""
    return scores_of(model, encode(model.tokenizer, inputs, room(model)))


def room(model: LoadedModel) -> int:
    """Tokens of a question and a choice at most, without special tokens."""
    check(model)
    return model.longest - (0 if model.config.causal else sum(map(len, framing(model))))


def check(model: LoadedModel) -> None:
    """UserError where the model is no language model."""
    if model.head not in HEADS:
        raise UserError(f"choices are compared by a language model, and this model has the head {model.head}")


def scores_of(
    model: LoadedModel,
    encoded: Sequence[Sequence[Choice]],
    said: Said = lambda done: None,
    *,
    within_word: bool = False,
) -> list[np.ndarray]:
    """As `scores`, of choices that are encoded. said: is told how many questions are done. within_word: of models that
    see both sides, as in predict.likelihood.hiding."""
    check(model)
    found: list[np.ndarray] = []
    for begin in range(0, len(encoded), CHUNK):
        found += _scores_of(model, encoded[begin : begin + CHUNK], within_word)
        said(len(found))
    return found


def _scores_of(model: LoadedModel, encoded: Sequence[Sequence[Choice]], within_word: bool) -> list[np.ndarray]:
    flat = [choice for choices in encoded for choice in choices]
    logprobs = _causal(model, flat) if model.config.causal else _pseudo(model, flat, within_word)
    divisors_3N = np.array([[1.0, choice.own, choice.bytes] for choice in flat]).reshape(-1, 3).T
    found_3N = logprobs / divisors_3N
    ends = np.cumsum([len(choices) for choices in encoded])
    return [found_3N[:, end - len(choices) : end] for choices, end in zip(encoded, ends, strict=True)]


def encode(tokenizer: PreTrainedTokenizerFast, inputs: Sequence[Asked], room: int) -> list[list[Choice]]:
    """Question and choice as one text, with a blank between where both need one.

    Tokens that hold a letter of the choice are its own, also where a tokenizer joins it to the end of the question.
    room: tokens of both at most; of a longer text the question loses its beginning. UserError where a choice alone is
    longer than that.
    """
    backend = plain_backend(tokenizer)
    texts = [joined(asked.question, choice) for asked in inputs for choice in asked.choices]
    encodings = iter(backend.encode_batch([text for text, _ in texts], add_special_tokens=False))
    borders = iter(border for _, border in texts)
    found = []
    for number, asked in enumerate(inputs, 1):
        choices = []
        for choice in asked.choices:
            encoding, border = next(encodings), next(borders)
            own = sum(end > border for _, end in encoding.offsets)
            if not 0 < own <= room:
                raise UserError(
                    f"question {number}: the choice {choice[:40]!r} has {own:,} tokens, and there is room for 1 to "
                    f"{room:,}; shorten it"
                )
            choices.append(Choice(encoding.ids[-room:], own, len(choice.encode()), len(encoding.ids) > room))
        found.append(choices)
    return found


def joined(question: str, choice: str) -> tuple[str, int]:
    """(both as one text, the place behind the question in it); a blank between them but in scripts without."""
    question = question.rstrip(" ")
    if not question:
        return choice, 0
    ends, begins = question[-1], choice[0]
    close = ends.isspace() or begins.isspace() or _unspaced(ends) or _unspaced(begins)
    return question + ("" if close else " ") + choice, len(question)


def causal_row(choice: Choice, bos: int) -> Example:
    """What a decoder reads: begin, question, choice but for its last token, which is the target `following`."""
    row = [bos, *choice.ids[:-1]]
    return Example(row, [0] * len(row), of_row={"following": choice.ids[-1]})


def _causal(model: LoadedModel, choices: Sequence[Choice]) -> np.ndarray:
    """Log-likelihoods, float64 [N]."""
    specials = special_ids(model.tokenizer, need=("bos",))
    assert specials.bos is not None
    found = outputs(
        *(following, (model.config, model.execution), model.params),
        [causal_row(choice, specials.bos) for choice in choices],
        pad_id=specials.pad,
        longest=model.config.max_length,
        of_row=("following",),
    )
    sums = [
        logprob_T[len(choice.ids) - choice.own : len(choice.ids)].sum(dtype=np.float64)
        for choice, (logprob_T, _) in zip(choices, found, strict=True)
    ]
    return np.array(sums)


def _pseudo(model: LoadedModel, choices: Sequence[Choice], within_word: bool) -> np.ndarray:
    """Pseudo-log-likelihoods, float64 [N]: of each token of a choice given all others, its own row each."""
    found = hidden_scores(model, [(choice.ids, choice.own) for choice in choices], within_word=within_word)
    logprobs = np.array([logprob for logprob, _ in found], np.float64)
    begins = np.cumsum([0, *(choice.own for choice in choices)])[:-1]
    return np.add.reduceat(logprobs, begins) if choices else logprobs


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _unspaced(sign: str) -> bool:
    """Of a script without blanks (Chinese, Japanese, Thai, Khmer), or its punctuation."""
    return unspaced(sign) or "\u3000" <= sign <= "\u303f" or "\uff00" <= sign <= "\uffef"


CHOOSE = Use(
    name="choose",
    takes="question (or context) and choices",
    reads=read,
    answers=lambda model, inputs: choose(model, inputs),
    example={"question": "The sky is", "choices": ["blue.", "loud.", "made of wood."]},
)
