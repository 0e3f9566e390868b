"""Files of prompts: each as text, as tokens, and with what the rewards may read of its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from espalier.data.tables import read_table
from espalier.data.text_template import prompt_text, template_fields
from espalier.errors import UserError
from espalier.predict.generate import Prompt, decoded, prompt_ids, prompt_of
from espalier.predict.stops import before_stop

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.reinforce.record import ReinforceData


class Asked(NamedTuple):
    """One prompt."""

    place: str
    """Where it was read: `file:line`."""
    text: str
    """What rewards are given: of a chat what the user said last."""
    ids: list[int]
    row: Mapping[str, Any]
    """The columns of the file."""
    answer: str
    """What the built-in rewards compare with; empty where the row has none."""


class Prompts(NamedTuple):
    """The prompts of one file, in its order."""

    name: str
    asked: list[Asked]
    fingerprint: str
    facts: tuple[str, ...]


def read_prompts(data: ReinforceData, side: str, model: LoadedModel, new_tokens: int) -> Prompts:
    """The prompts of `train` or `validation`, but those that leave no room for a completion of so many tokens.

    model: whose tokenizer, template and positions are asked; its weights are not. UserError where the file will not do.
    """
    with data.opening(side, "prompts (.jsonl, .json, .csv, .tsv, hf:…) with the columns that the reward reads") as name:
        table = read_table(name, data.encoding)
        rows = [dict(zip(record.columns, record.values, strict=True)) for record in table.records]
        limit = model.config.max_length
        room = None if limit is None else limit - new_tokens
        if data.max_length is not None:
            room = data.max_length if room is None else min(room, data.max_length)
        found, long = [], 0
        for record, row in zip(table.records, rows, strict=True):
            asked = _asked(record.name, row, data, model)
            if room is not None and len(asked.ids) > room:
                long += 1
            else:
                found.append(asked)
    if not found:
        raise UserError(
            f"{name}: no prompt leaves room for a completion of {new_tokens} tokens within {room} tokens; try a "
            "smaller --policy.max-new-tokens or a larger --data.max-length"
        )
    facts = list(table.notes)
    if long:
        facts.append(f"{name}: {long:,} of {len(rows):,} prompts are longer than {room} tokens and left out")
    return Prompts(name, found, table.fingerprint, tuple(facts))


def completion_text(
    model: LoadedModel, asked: Asked, tokens: Sequence[int], end_ids: Sequence[int], stops: Sequence[str]
) -> str:
    """The text of what was drawn, up to the first stop, without end tokens and what is -1."""
    new = [token for token in tokens if token >= 0 and token not in end_ids]
    return before_stop(decoded(model, asked.ids, new), stops) if new else ""


def _asked(place: str, row: dict[str, Any], data: ReinforceData, model: LoadedModel) -> Asked:
    answer = row.get(data.answer)
    try:
        if data.template is not None:
            *fields, last = template_fields(data.template)
            if lacking := [name for name in fields if row.get(name) is None]:
                raise UserError(f"no {lacking[0]!r}, which data.template={data.template!r} names")
            prompt: Prompt = {name: str(row[name]) for name in fields}
            text, answer = prompt_text(data.template, prompt), row.get(last)
        else:
            named = {name: row[name] for name in ("messages", "prompt") if row.get(name) is not None}
            prompt = prompt_of(named)
            text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])  # type: ignore[index]
        ids = prompt_ids(model, prompt)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return Asked(place, text, ids, row, "" if answer is None else str(answer))
