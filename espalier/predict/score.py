"""How good a text is, or an answer to a prompt, by a reward model; of several answers the best (best of n)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from espalier.data.chat import Message, messages_of, plain_chat
from espalier.data.examples import Example, encode_pairs
from espalier.errors import UserError
from espalier.predict.rank import ranked, scores_of
from espalier.predict.use import Use

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel

Said = str | Sequence[Message]
"""A text, or messages."""


class Asked(NamedTuple):
    """Texts, each behind the prompt ("" = none), to be scored: the one that was given, or several to be ranked."""

    prompt: Said
    texts: tuple[Said, ...]
    single: bool = False


def read(row: Mapping[str, Any]) -> Asked:
    prompt, text, texts = row.get("prompt", ""), row.get("text"), row.get("texts")
    if isinstance(prompt, list):
        prompt = messages_of(prompt, "prompt")
    if isinstance(text, list):
        text = messages_of(text, "text")
    if isinstance(prompt, str | list) and texts is None and isinstance(text, str | list):
        return Asked(prompt, (text,), True)
    several = isinstance(texts, list | tuple) and all(isinstance(one, str) for one in texts)
    if not isinstance(prompt, str | list) or not several:
        raise UserError(
            f"nothing to score: a row has text, or a list of texts, and may have prompt; this one "
            f"{', '.join(row) or 'nothing'}"
        )
    return Asked(prompt, tuple(cast(Any, texts)))


def score(model: LoadedModel, inputs: Sequence[Asked]) -> list[dict[str, Any]]:
    """`score` of each text that was given alone; of several `ranking`, the best first (of equal ones the one that was
    given first): `index` (from 0), `text` and `score`."""
    return ranked(rewards(model, [(asked.prompt, text) for asked in inputs for text in asked.texts]), inputs)


def rewards(model: LoadedModel, pairs: Sequence[tuple[Said, Said]]) -> np.ndarray:
    """Of each prompt ("" = none) with its answer, float32 [N]: the logit, of which only differences between answers to
    the same prompt mean something. UserError where the model has another number of outputs than one."""
    outputs = len(model.config.labels)
    if model.head != "sequence_classification" or outputs != 1:
        has = f"{outputs} outputs" if model.head == "sequence_classification" else f"the head {model.head}"
        raise UserError(
            f"this model has {has}, and a reward model is a classifier with one output; train one by "
            "`./launch.sh finetune reward --init-from RUN …`"
        )
    examples = encode_answers(model.tokenizer, pairs, model.longest, model.config.causal)
    return scores_of(model, examples)


def encode_answers(tokenizer: Any, pairs: Sequence[tuple[Said, Said]], longest: int, causal: bool) -> list[Example]:
    """[CLS] prompt [SEP] answer [SEP], of decoders bos prompt eos answer eos; without a prompt a text alone."""
    texts = [(plain_chat(prompt), plain_chat(answer)) for prompt, answer in pairs]
    found: list[Example | None] = [None] * len(texts)
    for alone in (True, False):
        places = [place for place, (prompt, _) in enumerate(texts) if (not prompt) == alone]
        if not places:
            continue
        prompts, answers = ([texts[place][side] for place in places] for side in (0, 1))
        encoded = encode_pairs(tokenizer, *((answers, None) if alone else (prompts, answers)), longest, causal)
        for place, example in zip(places, encoded, strict=True):
            found[place] = example
    return [example for example in found if example is not None]


SCORE = Use(
    name="score",
    takes="text or a list of texts, and prompt where there is one",
    reads=read,
    answers=score,
    example={"prompt": "How was the film?", "texts": ["It was moving and funny.", "I fell asleep."]},
)
