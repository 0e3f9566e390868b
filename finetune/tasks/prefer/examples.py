"""Preferences as tokens: each answer behind its prompt, a text between the ends of a document, or a chat."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from espalier import progress
from espalier.data.chat import (
    ASSISTANT,
    Chat,
    chat_template,
    default_template,
    encode_chats,
    plain_chat,
    render_chat,
    template_from,
)
from espalier.data.examples import Example
from espalier.data.text_template import encode_filled
from espalier.errors import UserError
from finetune.preferences import Pair, Preferences, Said, Verdict
from finetune.tasks.instruct.examples import fitted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finetune.tasks.prefer.record import PreferData


class Encoded(NamedTuple):
    """The preferences of one file that teach something."""

    pairs: list[Pair]
    verdicts: list[Verdict]
    """One of the two lists is empty."""
    examples: list[Example]
    """Two for each pair, chosen and rejected; of a verdict the answer, and an answer to another prompt. With the target
    `loss_weights`: 1 at the tokens of the answer, its end included, else 0."""
    facts: tuple[str, ...]


def with_template(
    tokenizer: PreTrainedTokenizerFast, data: PreferData, parts: Sequence[Preferences]
) -> tuple[PreTrainedTokenizerFast, bool]:
    """The tokenizer, and whether prompts and answers are turns of a chat: where it has a chat template, where a file of
    one is given, and where the files hold messages."""
    if data.chat_template is not None:
        tokenizer.chat_template = template_from(os.path.expanduser(data.chat_template))
    elif chat_template(tokenizer) is None:
        said = [one for part in parts for pair in (*part.pairs, *part.verdicts) for one in pair[1:]]
        if all(isinstance(one, str | bool) for one in said):
            return tokenizer, False
        tokenizer.chat_template = default_template(tokenizer)
    return tokenizer, True


def encode_preferences(
    part: Preferences,
    pairs: Sequence[Pair],
    verdicts: Sequence[Verdict],
    tokenizer: PreTrainedTokenizerFast,
    room: int,
    chat: bool,
    seed: int,
) -> Encoded:
    """Pairs, or verdicts, as examples of at most `room` tokens; those that teach nothing are left out, and said.
    UserError where none is left.
    """
    if pairs:
        twos = [(pair.place, ((pair.prompt, pair.chosen), (pair.prompt, pair.rejected))) for pair in pairs]
    else:
        others = mismatched(verdicts, seed)
        twos = [
            (one.place, ((one.prompt, one.answer), (one.prompt, verdicts[other].answer)))
            for one, other in zip(verdicts, others, strict=True)
        ]
    chats = [_chat(place, *said, tokenizer, chat) for place, two in twos for said in two]
    with progress.waiting(f"tokenizing {len(chats):,} answers"):
        encoded = encode_chats(tokenizer, chats) if chat else encode_filled(tokenizer, chats)
    short = [fitted(example, one.answers, room) for example, one in zip(encoded, chats, strict=True)]
    kept: list[int] = []
    full = same = 0
    for number in range(len(twos)):
        first, second = (example for example, _ in short[2 * number : 2 * number + 2])
        if first is None or second is None:
            full += 1
        elif pairs and list(first.ids) == list(second.ids):
            same += 1
        else:
            kept.append(number)
    what = "pairs" if pairs else "answers"
    facts = []
    cut = sum(how in ("answer", "turns") for _, how in short)
    if cut:
        facts.append(f"{part.path}: {cut:,} answers are cut at {room} tokens (--data.max-length)")
    if full:
        facts.append(
            f"{part.path}: {full:,} of {len(twos):,} {what} are left out: their prompt alone fills the {room} tokens "
            "that there is room for (--data.max-length)"
        )
    if same:
        facts.append(f"{part.path}: {same:,} pairs are left out: their answers are the same within {room} tokens")
    if not kept:
        raise UserError(
            f"{part.path}: no {what[:-1]} is left: "
            + ("every prompt alone fills" if full else "chosen and rejected differ only behind")
            + f" the {room} tokens that there is room for; give shorter ones, or more with --data.max-length"
        )
    found = [example for number in kept for example, _ in short[2 * number : 2 * number + 2]]
    return Encoded(
        [pairs[number] for number in kept] if pairs else [],
        [] if pairs else [verdicts[number] for number in kept],
        [example for example in found if example is not None],
        tuple(facts),
    )


def mismatched(verdicts: Sequence[Verdict], seed: int) -> list[int]:
    """For each verdict the number of another whose answer is put behind its prompt: the next one in an order drawn once
    that answers another prompt; where all answer the same one, the next."""
    order = np.random.default_rng([seed, 11]).permutation(len(verdicts)).tolist()
    found = [0] * len(order)
    for at, number in enumerate(order):
        others = (order[(at + step) % len(order)] for step in range(1, len(order)))
        here = str(verdicts[number].prompt)
        found[number] = next((other for other in others if str(verdicts[other].prompt) != here), order[at - 1])
    return found


def _chat(place: str, prompt: Said, answer: Said, tokenizer: PreTrainedTokenizerFast, chat: bool) -> Chat:
    """A prompt with its answer as text, of which only the answer is learnt from."""
    if not chat:
        before, text = plain_chat(prompt), plain_chat(prompt) + plain_chat(answer)
        # As in a template of fields, a blank between the two belongs to the answer.
        return Chat(text, [(len(before.rstrip(" ")), len(text))])
    asked = ([{"role": "user", "content": prompt}] if prompt else []) if isinstance(prompt, str) else list(prompt)
    answers = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else list(answer)
    turns = sum(message["role"] == ASSISTANT for message in answers)
    if not turns:
        raise UserError(f"{place}: an answer has no turn of the assistant; correct or remove it")
    try:
        found = render_chat(tokenizer, [*asked, *answers])
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return Chat(found.text, found.answers[-turns:])
