"""A text as a row of tokens, as the model's predictions read it, and which tokens are which word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from espalier.data.examples import Example, encode_pairs
from espalier.data.token_tables import blank_table
from espalier.data.word_pieces import encode_words, sentence_of_text
from espalier.data.words import MIN_SHARE, installed, script_shares, segmenter, token_starts
from espalier.errors import UserError
from espalier.predict.fill import MASK
from espalier.predict.loaded import LoadedModel


@dataclass(frozen=True, eq=False)
class Framed:
    """A row of T tokens."""

    batch: dict[str, np.ndarray]
    """input_ids, segment_ids, positions and token_type_ids, int32 [1, T]."""
    tokens: list[str]
    """As text, T."""
    words: list[tuple[int, int]]
    """Tokens [begin, end) of each word; special tokens are in none."""
    texts: list[str]
    """The words as they stand in the text."""
    example: Example
    """The row; of a text or pair with the offsets of its tokens."""

    @property
    def ids(self) -> list[int]:
        return self.batch["input_ids"][0].tolist()


def texts(model: LoadedModel, first: str, second: str | None) -> Framed:
    """A text, or a pair (data.examples.encode_pairs)."""
    given = [first] if second is None else [first, second]
    # So long that nothing is cut; what is too long is refused.
    length = 8 + sum(4 * len(text.encode(errors="replace")) for text in given)
    pair = None if second is None else [second]
    (example,) = encode_pairs(model.tokenizer, [first], pair, length, model.config.causal, offsets=True)
    return _framed(model, example, given)


def plain(model: LoadedModel, text: str) -> Framed:
    """As the tokenizer puts its special tokens around a text, which may have masks."""
    if model.head == "masked_lm":
        text = text.replace(MASK, str(model.tokenizer.mask_token))
    encoded = model.tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], np.array(encoded["offset_mapping"], np.int32).reshape(-1, 2)
    offsets = np.where(offsets[:, :1] < offsets[:, 1:], offsets, -1)
    return _framed(model, Example(ids, encoded.get("token_type_ids", [0] * len(ids)), offsets), [text])


def sentence(model: LoadedModel, text: str) -> Framed:
    """As words that have tokens of their own (data.word_pieces)."""
    found = sentence_of_text(text)
    window, *more = encode_words(model.tokenizer, [found], model.longest, model.config.causal)
    if more:
        raise UserError(f"the text has {len(found.words):,} words, more than {model.longest:,} tokens; shorten it")
    ends = [*window.places[1:].tolist(), len(window.example.ids) - 1]
    return _row(model, window.example, list(zip(window.places.tolist(), ends, strict=True)), list(found.words))


def _framed(model: LoadedModel, example: Example, given: Sequence[str]) -> Framed:
    """Tokens of one word stand together, the words found as whole-word masking finds them (data.words)."""
    assert example.offsets is not None
    words, shown = [], []
    types_T, ids_T, blank_V = np.asarray(example.types), np.asarray(example.ids), blank_table(model.tokenizer)
    for number, text in enumerate(given):
        at = np.flatnonzero(((types_T == number) | (len(given) == 1)) & (example.offsets[:, 0] >= 0))
        shares = script_shares([text])
        here = {name: version for name, version in installed().items() if version and shares[name] >= MIN_SHARE}
        offsets = example.offsets[at]
        begins = np.flatnonzero(token_starts(text, ids_T[at], offsets, segmenter(here), blank_V))
        for begin, end in zip(begins, [*begins, len(at)][1:], strict=True):
            first = int(at[begin])
            if shown and not shown[-1] and words[-1][1] == first:
                # A token that is a blank belongs to the word behind it.
                first = words.pop()[0]
                shown.pop()
            words.append((first, int(at[end - 1]) + 1))
            shown.append(text[offsets[begin, 0] : offsets[end - 1, 1]].strip())
    return _row(model, example, words, shown)


def _row(model: LoadedModel, example: Example, words: list[tuple[int, int]], shown: list[str]) -> Framed:
    length = len(example.ids)
    if length > model.longest:
        raise UserError(f"the text has {length:,} tokens, and at most {model.longest:,} are read; shorten it")
    batch = {
        "input_ids": np.array([example.ids], np.int32),
        "segment_ids": np.ones((1, length), np.int32),
        "positions": np.arange(length, dtype=np.int32)[None],
        "token_type_ids": np.array([example.types], np.int32),
    }
    tokens = [str(model.tokenizer.decode([int(one)])) for one in example.ids]
    return Framed(batch, tokens, words, shown, example)
