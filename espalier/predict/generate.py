"""Text that a decoder writes: prompts of three kinds → token ids → text of whole characters.

A prompt is a text that is continued; the messages of a chat, which the chat template ends with an invitation to answer;
or the fields of the template by which a run was tuned ("{source} = {target}").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from espalier.data.chat import ASSISTANT, Message, backend, chat_template, end_of_turn, messages_of, render
from espalier.data.text_template import prompt_text, template_fields
from espalier.data.tokenizer import plain_backend, special_ids
from espalier.errors import UserError
from espalier.models import generate as models
from espalier.models.decoding import Drawn, Sampling
from espalier.models.published import Published
from espalier.models.slots import rows_as_they_end
from espalier.predict.outputs import shapes_kept
from espalier.predict.sampling import SamplingConfig, sampling_of
from espalier.predict.stops import before_stop, stop_table
from espalier.predict.use import Use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.loaded import LoadedModel

Prompt = str | Sequence[Message] | Mapping[str, str]
TUNED = "instruction_tuning"
PLACES = 2**16
"""Tokens of a batch at most, beams and those to come included; and a row at least."""
ROWS = 64
DEFAULTS = SamplingConfig()


class Way(NamedTuple):
    """How a model writes."""

    config: SamplingConfig
    """With what the model's generation_config.json says in place of what is unset."""
    sampling: Sampling
    ignored: list[str]
    """What generation_config.json says and is not applied."""


SETTINGS = {
    "max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float,
    "beams": int, "length_penalty": float, "seed": int,
}  # fmt: skip
"""Fields of a row that say how its text is generated; and STOP, a text or a list of them."""
STOP = "stop"
SERVED_STATES = 64
"""Of the stops of a server (predict.stops), which may be others in each request."""


class Asked(NamedTuple):
    prompt: Prompt
    config: SamplingConfig
    number: int = 0
    """Of its row."""


def read(row: Mapping[str, Any]) -> Asked:
    """Fields are those of the template of a run, a prompt (or text) that is continued, or messages; and SETTINGS."""
    settings: dict[str, Any] = {}
    for name, kind in SETTINGS.items():
        if row.get(name) not in (None, ""):
            try:
                settings[name] = kind(row[name])
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"{name}={row[name]!r} is no number; try {name}={kind(1)}") from None
    stops = [row[STOP]] if isinstance(row.get(STOP), str) else row.get(STOP) or ()
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"stop={row[STOP]!r} is no text and no list of texts; try stop=END")
    settings[STOP] = tuple(stops)
    return Asked(prompt_of(row), SamplingConfig(**settings))


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt in the fields of a row. UserError where there is none."""
    for name in ("messages", "prompt"):
        if isinstance(row.get(name), list):
            messages = messages_of(row[name], name)
            # A chat that was learnt from or is measured on: its last answer is asked for anew.
            return messages[:-1] if messages[-1]["role"] == ASSISTANT and len(messages) > 1 else messages
    fields = {name: value for name, value in row.items() if isinstance(value, str) and name not in (*SETTINGS, STOP)}
    if not fields:
        raise UserError(f"no prompt: a row has prompt or messages, and this one {', '.join(row) or 'nothing'}")
    return next(iter(fields.values())) if fields.keys() in ({"prompt"}, {"text"}) else fields


def answers(model: LoadedModel, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """`text` that follows each prompt."""
    found: dict[int, str] = {}
    for config in dict.fromkeys(one.config for one in asked):
        places = [place for place, one in enumerate(asked) if one.config == config]
        prompts, numbers = [asked[place].prompt for place in places], [asked[place].number for place in places]
        found |= zip(places, generate(model, prompts, config, numbers=numbers), strict=True)
    return [{"text": found[place]} for place in range(len(asked))]


def generate(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig = DEFAULTS,
    said: Callable[[int, int], None] = lambda done, tokens: None,
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """What the model writes after each prompt, in batches of fitting length. said: is told how many are done, and how
    many tokens were drawn for them.

    What is drawn for a prompt depends on the seed and its number (unset: its place), not on the others. Under
    jax.set_mesh rows are split over the mesh, and every process gives and gets all. UserError where the model has no
    positions for a prompt.
    """
    if shapes_kept():
        if replace(config, stop=()) != DEFAULTS:
            raise UserError(
                "how text is generated is settled here, and nothing is compiled anew; ask without settings but stop"
            )
        # Half of the positions are for the prompt.
        room = (model.config.max_length or 2 * config.max_new_tokens) // 2
        config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
    way = way_of(model, config)
    ids = [prompt_ids(model, prompt) for prompt in prompts]
    check_room(model, ids, way.config)
    found, done, tokens = [""] * len(ids), 0, 0
    for rows, drawn in _batches(model, ids, way, range(len(ids)) if numbers is None else numbers):
        for row, tokens_G in zip(rows, drawn.tokens_BG.tolist(), strict=True):
            new = [token for token in tokens_G if token >= 0 and token not in way.sampling.end_ids]
            found[row] = written(model, decoded(model, ids[row], new), way.config.stop)
        done, tokens = done + len(rows), tokens + int((drawn.tokens_BG >= 0).sum())
        said(done, tokens)
    return found


def _batches(
    model: LoadedModel, ids: list[list[int]], way: Way, numbers: Sequence[int]
) -> Iterator[tuple[list[int], Drawn]]:
    """Places of prompts, the longest first, and what follows them. Within predict.outputs.fixed_shapes, in those.

    More prompts of like lengths than a batch holds share its rows as slots, and come as they end.
    """
    key, new, shapes = jax.random.key(way.config.seed), way.config.max_new_tokens, shapes_kept()
    stops = stops_of(model, way, SERVED_STATES if shapes else 0)

    def run(prompts: list[list[int]], numbers: list[int], shape: tuple[int, int] | None) -> Drawn:
        how = dict(execution=model.execution, numbers=numbers, shape=shape, stops=stops)
        return models.generate(model.config, model.params, prompts, key, way.sampling, **how)  # type: ignore[arg-type]

    def compiled(rows: int, length: int) -> None:
        run([[0]], [0], (rows, length))

    if shapes:
        shapes.prepare(("generate", way.sampling), compiled)
    order, done = sorted(range(len(ids)), key=lambda number: -len(ids[number])), 0
    while done < len(order):
        longest = len(ids[order[done]])
        length = shapes.length(longest) if shapes else models.bucket(longest)
        if length is None:
            most = shapes.lengths[-1] if shapes else 0
            raise UserError(f"a prompt of {longest} tokens is longer than the {most} taken here")
        places = (length + new) * way.config.beams
        alike = sum(len(ids[row]) > longest // 2 for row in order[done:])
        most = shapes.most(length) if shapes else max(1, min(ROWS, 1 << (PLACES // places).bit_length() >> 1))
        slots = way.config.beams == 1 and not model.config.num_decoder_layers
        if alike > most and not shapes and slots:
            # Not every row has to wait for the longest answer.
            group = order[done : done + alike]
            how = dict(execution=model.execution, numbers=[numbers[row] for row in group], length=length, stops=stops)
            prompts = [ids[row] for row in group]
            parts = rows_as_they_end(model.config, model.params, prompts, key, way.sampling, most, **how)  # type: ignore[arg-type]
            for part in parts:
                yield [group[row] for row in part.rows], part.drawn
            done += alike
            continue
        rows = order[done : done + most]
        shape = (shapes.rows(len(rows), length), length) if shapes else None
        yield rows, run([ids[row] for row in rows], [numbers[row] for row in rows], shape)
        done += len(rows)


def stream(model: LoadedModel, prompt: Prompt, config: SamplingConfig = DEFAULTS) -> Iterator[tuple[str, int]]:
    """What `generate` writes after one prompt, in pieces of whole characters as soon as they are known.

    With each piece the number of tokens drawn so far. Beams are known at their end: then there is one piece.
    """
    way = way_of(model, config)
    if way.config.beams > 1:
        [text] = generate(model, [prompt], config)
        yield text, len(plain_backend(model.tokenizer).encode(text, add_special_tokens=False).ids)
        return
    ids = prompt_ids(model, prompt)
    check_room(model, [ids], way.config)
    key = jax.random.key(way.config.seed)
    new: list[int] = []
    shown, longest = "", max(map(len, way.config.stop), default=1) - 1
    tokens = models.stream(model.config, model.params, ids, key, way.sampling, execution=model.execution)
    for count, token in enumerate(tokens, 1):
        if token in way.sampling.end_ids:
            break
        new.append(token)
        whole = decoded(model, ids, new)
        text = written(model, whole, way.config.stop)
        stopped = any(stop in whole for stop in way.config.stop)
        # What may yet become another character, or the beginning of a stop, waits.
        settled = text if stopped else text[: len(text) - longest] if longest else text
        if not stopped and whole.endswith("\ufffd"):
            settled = ""
        if settled.startswith(shown) and len(settled) > len(shown):
            yield settled[len(shown) :], count
            shown = settled
        if stopped:
            return
    text = written(model, decoded(model, ids, new), way.config.stop)
    if len(text) > len(shown):
        yield text[len(shown) :], len(new)


def decoded(model: LoadedModel, prompt: Sequence[int], new: Sequence[int]) -> str:
    """New tokens as text, read behind the last of their prompt: some decoders drop the blank before a first word."""
    tokenizer, before, new = model.tokenizer, list(prompt[-1:]), list(new)
    if before[0] in special_ids(tokenizer).all:
        return str(tokenizer.decode(new))
    first, whole = str(tokenizer.decode(before)), str(tokenizer.decode([*before, *new]))
    return whole[len(first) :] if whole.startswith(first) else str(tokenizer.decode(new))


def written(model: LoadedModel, text: str, stops: Sequence[str]) -> str:
    """A decoded text up to the first stop, without incomplete characters; an answer without blanks before it."""
    text = before_stop(whole_characters(text), stops)
    return text.lstrip(" ") if template_of(model) else text


def whole_characters(text: str) -> str:
    """Decoded tokens without incomplete characters.

    A token of a byte-level vocabulary may be a part of a character. The rest is missing where the text ends at
    max_new_tokens, and anywhere in the text of a barely trained model; decoders put U+FFFD in its place.
    """
    return text.replace("\ufffd", "")


def template_of(model: LoadedModel) -> str | None:
    """The template by which the model was tuned."""
    return (model.saved.get("data") or {}).get("template") if model.saved.get("task") == TUNED else None


def answers_chats(model: LoadedModel) -> bool:
    """Whether a text is what the user says: of runs tuned to answer, and of those that learnt preferences on chats."""
    task = model.saved.get("task")
    return task == TUNED or task == "preference" and bool(model.saved.get("chat"))


def prompt_ids(model: LoadedModel, prompt: Prompt) -> list[int]:
    """The tokens of a prompt, as the model was trained to read them; an empty text is the beginning-of-text token.

    Text is text: special tokens that it spells out are not such, but in a chat, whose template writes some. What an
    encoder-decoder reads ends with the end-of-text token.
    """
    tokenizer, template = model.tokenizer, template_of(model)
    if model.config.num_decoder_layers:
        prefix = (model.saved.get("data") or {}).get("prefix") or ""
        return _read_whole(tokenizer, prompt, prefix)
    if template is not None and not isinstance(prompt, Mapping):
        if not isinstance(prompt, str):
            raise UserError(f"this run was tuned by the template {template!r}, not on chats; give its fields")
        prompt = {"prompt": prompt}
    if isinstance(prompt, Mapping) and template is None:
        prompt = prompt.get("prompt", prompt.get("text", prompt))
    if isinstance(prompt, str) and answers_chats(model):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, Mapping):
        return _framed(tokenizer, _of_fields(prompt, template))
    if isinstance(prompt, str):
        return _framed(tokenizer, prompt)
    if chat_template(tokenizer) is None:
        raise UserError("the tokenizer of this model has no chat template; give a text that is to be continued")
    ids = backend(tokenizer).encode(render(tokenizer, prompt, invite=True), add_special_tokens=False).ids
    if not ids:
        raise UserError("the chat template makes nothing of these messages; give one that is not empty")
    return ids


def way_of(model: LoadedModel, config: SamplingConfig) -> Way:
    """How the model writes by this configuration, and where it ends."""
    published = Published.beside(model.saved)
    config, ignored = sampling_of((published.generation_config if published else None) or {}, config)
    tuned = answers_chats(model)
    if config.temperature is None and config.beams == 1 and tuned:
        config = replace(config, temperature=0.0)
    specials = special_ids(model.tokenizer, need=("bos", "eos"))
    assert specials.eos is not None
    ends = {specials.eos, *(published.end_ids if published else ())}
    if chat_template(model.tokenizer) is not None and template_of(model) is None:
        ends |= {end for end in [end_of_turn(model.tokenizer)] if end is not None}
    if config.beams > 1:
        # Beams know ends by their tokens alone.
        encode = plain_backend(model.tokenizer).encode
        for stop in config.stop:
            ids = encode(stop, add_special_tokens=False).ids
            ends |= {ids[0]} if len(ids) == 1 else set()
    sampling = Sampling(
        config.max_new_tokens,
        *config.drawn,
        tuple(sorted(ends)),
        1.0 if config.repetition_penalty is None else config.repetition_penalty,
        config.beams,
        config.length_penalty,
    )
    return Way(config, sampling, ignored)


def stops_of(model: LoadedModel, way: Way, states: int = 0) -> np.ndarray | None:
    """The stops of a way to write as models.generate takes them. states: as predict.stops.stop_table takes it, which
    then is made in any case."""
    if way.config.beams > 1 or not (way.config.stop or states):
        return None
    return stop_table(model.tokenizer, way.config.stop, model.config.vocab_size, states)


def check_room(model: LoadedModel, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> None:
    """UserError where the model has no positions for the longest prompt and what follows it."""
    longest, limit = max(map(len, prompts), default=0), model.config.max_length
    total = longest + config.max_new_tokens
    if limit is not None and total > limit:
        room = limit - longest
        raise UserError(
            f"prompt of {longest} tokens + max_new_tokens={config.max_new_tokens} = {total} exceeds the model's "
            f"{limit} positions; " + (f"try max_new_tokens={room}" if room > 0 else "give a shorter prompt")
        )


def _framed(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """As in training, behind the beginning of a document."""
    bos = special_ids(tokenizer, need=("bos", "eos")).bos
    assert bos is not None
    return [bos, *plain_backend(tokenizer).encode(text, add_special_tokens=False).ids]


def _read_whole(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, prefix: str) -> list[int]:
    """What an encoder reads of a text: the prefix of its run, the tokens, and the end of text (Raffel et al. 2020)."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("source", prompt.get("prompt", prompt.get("text", prompt)))
    if not isinstance(prompt, str):
        raise UserError("an encoder-decoder writes one text from another; give a text, or a row with 'source'")
    eos = special_ids(tokenizer, need=("eos",)).eos
    assert eos is not None
    return [*plain_backend(tokenizer).encode(prefix + prompt, add_special_tokens=False).ids, eos]


def _of_fields(fields: Mapping[str, str], template: str | None) -> str:
    there = ", ".join(map(repr, fields))
    if template is None:
        raise UserError(
            f"a row with {there} needs a template, and this model was tuned by none; give 'prompt' or 'messages'"
        )
    wanted = template_fields(template)[:-1]
    if len(wanted) == 1 and wanted[0] not in fields:
        # There is only one that can be meant.
        fields = {wanted[0]: fields.get("prompt", fields.get("text"))} | fields  # type: ignore[assignment]
    if lacking := [name for name in wanted if fields.get(name) is None]:
        raise UserError(f"no {lacking[0]!r}, which the template {template!r} names; there is {there}")
    return prompt_text(template, fields)


GENERATE = Use(
    name="generate",
    takes="prompt, or messages, or the fields of the template",
    reads=read,
    answers=answers,
    numbered=lambda asked, number: asked._replace(number=number),
    example={"prompt": "Once upon a time"},
)
