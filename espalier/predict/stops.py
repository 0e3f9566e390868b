"""Texts at which generated text ends, found while tokens are drawn, wherever tokens cut them.

As elsewhere (OpenAI's API, vLLM), a text ends before the first of its stops, which is no part of it, and only what is
generated is searched, not the prompt. The token ids keep all that was drawn, up to the token that completed the stop.

An automaton (Aho and Corasick 1975) over the bytes of UTF-8 knows how far the end of a text agrees with a stop. Each
token moves it by all of its bytes, so that for the program it is one table of numbers, and other stops compile nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from espalier.data.token_bytes import token_bytes
from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMALLEST = 16


def stop_table(tokenizer: PreTrainedTokenizerFast, stops: Sequence[str], size: int, states: int = 0) -> np.ndarray:
    """int16 [P, size] as models.decoding.advanced takes it, of a vocabulary of `size`.

    states: P; unset = a power of two, so that few programs are compiled. UserError where the stops need more.
    """
    needed = len(_prefixes(tuple(stops)))
    states = states or max(SMALLEST, 1 << (needed - 1).bit_length())
    if needed > states:
        raise UserError(
            f"stop: {' and '.join(map(repr, stops))} are together longer than the {states - 1} bytes that there is "
            "room for here; give fewer or shorter ones"
        )
    return _table(tokenizer, tuple(stops), size, states)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@functools.lru_cache(maxsize=32)
def _table(tokenizer: PreTrainedTokenizerFast, stops: tuple[str, ...], size: int, states: int) -> np.ndarray:
    moves = _moves(stops)
    complete = len(moves)
    moves = np.concatenate([np.where(moves < 0, complete, moves), np.full((1, 256), complete)]).astype(np.int16)
    tokens = _bytes_of(tokenizer)[:size]
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
    lengths = np.array([len(tokens[index]) for index in order], np.int64)
    found = np.repeat(np.arange(complete, dtype=np.int16)[:, None], len(order), axis=1)
    for place in range(lengths.max(initial=0)):
        longer = int((lengths > place).sum())
        byte = np.array([tokens[index][place] for index in order[:longer]], np.int64)
        found[:, :longer] = moves[found[:, :longer], byte]
    table = np.zeros((states, size), np.int16)
    # What has no text leaves everything as it is.
    table[:complete] = np.arange(complete)[:, None]
    table[:complete, order] = np.where(found == complete, -1, found)
    return table


@functools.lru_cache(maxsize=4)
def _bytes_of(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    return token_bytes(tokenizer)


def _prefixes(stops: tuple[str, ...]) -> list[bytes]:
    """What may be known of a stop that is not complete, nothing first."""
    encoded = [stop.encode() for stop in stops]
    return sorted({b"", *(stop[:size] for stop in encoded for size in range(len(stop)))}, key=lambda part: len(part))


def _moves(stops: tuple[str, ...]) -> np.ndarray:
    """[P, 256]: what is known after another byte; -1 = a stop is complete."""
    prefixes, encoded = _prefixes(stops), [stop.encode() for stop in stops]
    number = {prefix: at for at, prefix in enumerate(prefixes)}
    moves = np.zeros((len(prefixes), 256), np.int64)
    for at, prefix in enumerate(prefixes):
        for byte in set(b"".join(encoded)):
            text = prefix + bytes([byte])
            if any(text.endswith(stop) for stop in encoded):
                moves[at, byte] = -1
            else:
                moves[at, byte] = next(number[text[cut:]] for cut in range(len(text) + 1) if text[cut:] in number)
    return moves
