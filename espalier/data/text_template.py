"""Texts in a template, of which the last is the answer: "{source} = {target}". Imports nothing heavy."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.data.chat import Chat
    from espalier.data.examples import Example


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """(text before, field) of each part; behind the last field stands (text, None) where there is some.

    UserError for a template that asks for nothing, or shows nothing of the example before what it asks for.
    """
    try:
        parts = [(before, name) for before, name, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(
            f"data.template={template!r} is no template ({error}); try '{{source}} = {{target}}'"
        ) from error
    named = [name for _, name in parts if name is not None]
    if len(named) < 2 or not all(named):
        raise UserError(
            f"data.template={template!r} needs two fields or more, the last of which is learnt; "
            "try '{source} = {target}'"
        )
    return parts


def template_fields(template: str) -> list[str]:
    """The fields, in their order; the last is the answer."""
    return [name for _, name in template_parts(template) if name is not None]


def prompt_text(template: str, texts: Mapping[str, str]) -> str:
    """The text before the answer, without the blanks at its end.

    Those belong to the answer: most tokenizers write a blank and the word behind it as one token, which no prompt that
    ends in a blank could be followed by.
    """
    parts = template_parts(template)
    last = max(number for number, (_, name) in enumerate(parts) if name is not None)
    shown = [before + (texts[name] if name is not None and number < last else "")
             for number, (before, name) in enumerate(parts[: last + 1])]  # fmt: skip
    return "".join(shown).rstrip(" ")


def filled(template: str, texts: Mapping[str, str]) -> Chat:
    """The whole text, with the place of its answer."""
    from espalier.data.chat import Chat

    text = "".join(before + (texts[name] if name is not None else "") for before, name in template_parts(template))
    return Chat(text, [(len(prompt_text(template, texts)), len(text))])


def encode_filled(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]) -> list[Example]:
    """Examples between the tokens of a document's ends, with `loss_weights`: 1 for the answer and the end, else 0.

    A special token that is spelled out in a text is text.
    """
    import numpy as np

    from espalier.data.chat import within
    from espalier.data.examples import Example
    from espalier.data.tokenizer import plain_backend, special_ids

    specials = special_ids(tokenizer, need=("bos", "eos"))
    encode = plain_backend(tokenizer).encode_batch
    examples = []
    for chat, encoding in zip(chats, encode([chat.text for chat in chats], add_special_tokens=False), strict=True):
        ids = [specials.bos, *encoding.ids, specials.eos]
        offsets_N2 = np.array([(-1, -1), *encoding.offsets, (-1, -1)], np.int32)
        weights_N = within(offsets_N2, chat.answers)
        weights_N[0], weights_N[-1] = 0.0, 1.0
        examples.append(Example(ids, [0] * len(ids), offsets_N2, of_tokens={"loss_weights": weights_N}))
    return examples
