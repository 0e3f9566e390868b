"""Chats as tokens: messages through a tokenizer's chat template, and which of the tokens the assistant writes.

A template is a Jinja text that turns messages into one string. What the assistant writes in it is found without knowing
the template: it stands between the chat up to the turn before, rendered with the invitation to answer
(`add_generation_prompt`), and the chat up to the turn itself. A template that marks its answers by `{% generation %}`
is taken at its word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from espalier.data.examples import Example
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]
"""`role` (system, user, assistant …) and `content`."""
ASSISTANT = "assistant"
DEFAULT = """\
{{ 'BEGIN' }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}\
{% if message['role'] == 'assistant' %}{{ 'END' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
"""For decoders whose tokenizer has none (the form of Zephyr and Tülu): roles are spelled out as text, so that no token
is added. BEGIN and END stand for the tokens around a document, as in pretraining."""
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
ENDMARKED = re.compile(r"\{%-?\s*endgeneration\s*-?%\}")


class Chat(NamedTuple):
    """A chat as text."""

    text: str
    answers: list[tuple[int, int]]
    """The characters begin … end of what the assistant writes, one for each of its turns, its end token included."""


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The template of a tokenizer; of several the one named `default`."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def default_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """DEFAULT with the special tokens of a tokenizer. UserError where it cannot write the names of the roles."""
    specials = special_ids(tokenizer, need=("bos", "eos"))
    assert specials.bos is not None and specials.eos is not None
    begin, end = (str(tokenizer.convert_ids_to_tokens(index)) for index in (specials.bos, specials.eos))
    unknown = tokenizer.unk_token_id
    for role in ("system", "user", ASSISTANT):
        ids = tokenizer.backend_tokenizer.encode(f"<|{role}|>", add_special_tokens=False).ids
        if unknown is not None and unknown in ids:
            raise UserError(
                f"the tokenizer has no token for a part of '<|{role}|>', which the default chat template writes; give "
                "a template of its own alphabet with --data.chat-template FILE"
            )
    return DEFAULT.replace("BEGIN", begin).replace("END", end)


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], invite: bool = False) -> str:
    """The text of a chat; invite: with the beginning of the assistant's next turn. UserError from the template."""
    return _render(tokenizer, messages, invite, False)[0]


def render_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> Chat:
    """A chat as text, with what the assistant writes in it.

    UserError where it writes nothing, or where the template changes a turn when another follows: which tokens the model
    would have to write is then not the same in training and in use.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not turns:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
        raise UserError(f"a chat without an assistant's turn has nothing to learn from (its roles: {roles})")
    text, marked = _render(tokenizer, messages, False, True)
    ends = special_strings(tokenizer)
    if marked is not None:
        if len(marked) != len(turns):
            raise UserError(
                f"the chat template marks {len(marked)} answers by {{% generation %}}, and the chat has {len(turns)}"
            )
        return Chat(text, [(begin, _end(text, begin, end, ends)) for begin, end in marked])
    answers = []
    for turn in turns:
        before = render(tokenizer, messages[:turn], invite=True)
        upto = text if turn == len(messages) - 1 else render(tokenizer, messages[: turn + 1])
        if not upto.startswith(before):
            raise UserError(
                f"the chat template does not begin turn {turn + 1}, the assistant's, as it invites it to answer "
                f"({before[-30:]!r}), so that training would differ from use; give another with "
                "--data.chat-template FILE"
            )
        if not text.startswith(upto):
            raise UserError(
                f"the chat template writes turn {turn + 1} in another way when more follows, so that it cannot be told "
                "which tokens are the assistant's; mark them in the template by {% generation %} … "
                "{% endgeneration %}, or give another with --data.chat-template FILE"
            )
        answers.append((len(before), _end(text, len(before), len(upto), ends)))
    return Chat(text, answers)


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of the special token with which the template ends what the assistant writes; None where it has none."""
    chat = render_chat(tokenizer, [{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": "!"}])
    begin, end = chat.answers[-1]
    last = backend(tokenizer).encode(chat.text[begin:end], add_special_tokens=False).ids[-1]
    return last if last in special_ids(tokenizer).all else None


def encode_chats(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]) -> list[Example]:
    """Examples with `loss_weights`: 1 for the tokens of which the assistant writes any character, else 0.

    Special tokens are those that the template writes, and their like where a message spells one out.
    """
    found = []
    encode = backend(tokenizer).encode_batch
    for chat, encoding in zip(chats, encode([chat.text for chat in chats], add_special_tokens=False), strict=True):
        offsets_N2 = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        found.append(
            Example(
                encoding.ids, [0] * len(encoding.ids), offsets_N2,
                of_tokens={"loss_weights": within(offsets_N2, chat.answers)},
            )
        )  # fmt: skip
    return found


def within(offsets_N2: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """float32 [N]: 1 for tokens that stand for a character in one of the spans, else 0."""
    begin_N, end_N = offsets_N2[:, 0], np.maximum(offsets_N2[:, 1], offsets_N2[:, 0] + 1)
    found_N = np.zeros(len(offsets_N2), bool)
    for begin, end in spans:
        found_N |= (begin_N < end) & (end_N > begin)
    return found_N.astype(np.float32)


def backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that knows special tokens where the text has them, cuts nothing and fills nothing up."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = False
    return copy


def special_strings(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """How the special tokens are written."""
    return tuple(str(tokenizer.convert_ids_to_tokens(index)) for index in special_ids(tokenizer).all)


def _end(text: str, begin: int, end: int, specials: tuple[str, ...]) -> int:
    """Where an answer ends: blanks behind its end token are the template's."""
    kept = text[begin:end].rstrip()
    return begin + len(kept) if kept.endswith(specials) else end


def _render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], invite: bool, track: bool
) -> tuple[str, list[tuple[int, int]] | None]:
    """Also the spans that the template marks, None where it marks none."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template(tokenizer)
    assert template is not None, "chats are rendered by a tokenizer with a chat template"
    track = track and MARKED.search(template) is not None
    try:
        texts, spans = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            return_assistant_tokens_mask=track,
            add_generation_prompt=invite,
            **tokenizer.special_tokens_map,  # type: ignore[arg-type]
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template does not take this chat (roles: {roles}): {why}") from error
    return texts[0], [(int(begin), int(end)) for begin, end in spans[0]] if track else None


def template_from(path: str) -> str:
    """The chat template in a file. UserError where it is none."""
    import jinja2

    try:
        with open(path, encoding="utf-8") as file:
            template = file.read()
        plain = ENDMARKED.sub("", MARKED.sub("", template))
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(
            f"--data.chat-template {path} cannot be read: {why}; give a file with a Jinja template"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"--data.chat-template {path}:{error.lineno}: {error.message}; correct the template") from error
    return template


def messages_of(value: Any, place: str) -> list[dict[str, str]]:
    """The messages of a JSON list, in the form of OpenAI (`role`, `content`) or ShareGPT (`from`, `value`).

    UserError where it has another form. Contents may be lists of parts, all of them text.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: messages are a list of {{'role': …, 'content': …}}, and this is {_kind(value)}")
    return [_message(item, f"{place}, message {number}") for number, item in enumerate(value, 1)]


def plain_chat(said: str | Sequence[Message]) -> str:
    """Messages as a text without a template, for models that read but do not answer: one alone is its content, several
    are `role: content`, a line each. A text is as it is."""
    if isinstance(said, str):
        return said
    if len(said) == 1:
        return said[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in said)


SHAREGPT = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT}


def _message(item: Any, place: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise UserError(f"{place} is {_kind(item)}, not {{'role': …, 'content': …}}")
    if "from" in item and "role" not in item:
        speaker = item["from"]
        role = SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else None
        item = {"role": role, "content": item.get("value")}
    role, content = item.get("role"), item.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f"{place} needs 'role' and 'content', both text; it has {', '.join(map(repr, item)) or 'nothing'}"
            + (f" and its content is {_kind(content)}" if isinstance(role, str) and "content" in item else "")
        )
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")
