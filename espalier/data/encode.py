"""Text → token ids, on all cores: the tokenizer encodes one batch while the ids of the previous one are copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from espalier.data.documents import Item, Reject
from espalier.data.store import Encoded
from espalier.data.token_tables import blank_table
from espalier.data.tokenizer import pieces, plain_backend
from espalier.data.words import segmenter, token_starts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 500_000
"""Text handed to the tokenizer at once: enough for all cores, little enough for memory."""


def encode(
    items: Iterable[Item], tokenizer: PreTrainedTokenizerFast, words: dict[str, str] | None = None
) -> Iterator[list[Encoded | Reject]]:
    """Documents encoded without special tokens, rejects as they are; in order, in lists.

    words: the segmenters (data.words.find_segmenters) that find where words begin; none = word starts are not computed.
    """
    backend = plain_backend(tokenizer)
    # Offsets take the tokenizer a third of its time.
    encode_batch = backend.encode_batch if words else backend.encode_batch_fast
    starts = _starts(tokenizer, words) if words else None

    def tokens(batch: list[Item]) -> tuple[list[int], list]:
        """How many pieces each document has, and the encodings of them all."""
        parts = [list(pieces(item.text)) or [""] for item in batch if not isinstance(item, Reject)]
        texts = [piece for document in parts for piece in document]
        return [len(document) for document in parts], encode_batch(texts, add_special_tokens=False)

    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[Item], Future] | None = None
        for batch in _batches(items):
            # The library releases Python's lock while it works, so both run at once.
            following = batch, pool.submit(tokens, batch)
            if waiting:
                yield _joined(starts, waiting[0], *waiting[1].result())
            waiting = following
        if waiting:
            yield _joined(starts, waiting[0], *waiting[1].result())


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        # A reject counts as a line, so that a file full of rejects is reported early.
        characters += 100 if isinstance(item, Reject) else len(item.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _joined(
    starts: Callable[[str, np.ndarray, list[np.ndarray]], np.ndarray] | None,
    batch: list[Item],
    counts: list[int],
    encodings: list,
) -> list[Encoded | Reject]:
    found: list[Encoded | Reject] = []
    # From the end, each freed once it is read: an encoding takes about a hundred bytes per token.
    encodings.reverse()
    counts.reverse()
    for item in batch:
        if isinstance(item, Reject):
            found.append(item)
            continue
        ids, offsets = [], []
        for _ in range(counts.pop()):
            encoding = encodings.pop()
            ids.append(np.array(encoding.ids, np.int64))
            if starts:
                numbers = chain.from_iterable(encoding.offsets)
                offsets.append(np.fromiter(numbers, np.int64).reshape(-1, 2))
        all_ids = np.concatenate(ids)
        begins = starts(item.text, all_ids, offsets) if starts else None
        found.append(Encoded(all_ids, len(item.text.encode()), len(item.text), begins))
    return found


def _starts(tokenizer: PreTrainedTokenizerFast, words: dict[str, str]):
    """(text, its ids, the offsets [N,2] in each of its pieces) → bool [N]: which tokens begin a word."""
    segment, blank_V = segmenter(words), blank_table(tokenizer)

    def starts(text: str, ids: np.ndarray, offsets: list[np.ndarray]) -> np.ndarray:
        begins = np.cumsum([0, *map(len, pieces(text))])
        placed = [of_piece + begin for of_piece, begin in zip(offsets, begins, strict=False)]
        return token_starts(text, ids, np.concatenate(placed), segment, blank_V)

    return starts
