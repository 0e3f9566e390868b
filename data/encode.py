"""Text → token ids, on all cores: the tokenizer works on one batch while the ids of the last one are taken over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from data.documents import Item, Reject
from data.store import Encoded
from data.tokenizer import pieces, plain_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 500_000
"""Text handed to the tokenizer at once: enough for all cores, little enough for memory."""


def encode(items: Iterable[Item], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Encoded | Reject]]:
    """Documents encoded without special tokens, rejects as they are; in order, in lists."""
    backend = plain_backend(tokenizer)

    def tokens(batch: list[Item]) -> tuple[list[int], list]:
        """How many pieces each document has, and the encodings of them all."""
        parts = [list(pieces(item.text)) or [""] for item in batch if not isinstance(item, Reject)]
        texts = [piece for document in parts for piece in document]
        return [len(document) for document in parts], backend.encode_batch_fast(texts, add_special_tokens=False)

    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[Item], Future] | None = None
        for batch in _batches(items):
            # The library lets go of Python's lock while it works, so both go on at once.
            following = batch, pool.submit(tokens, batch)
            if waiting:
                yield _joined(waiting[0], *waiting[1].result())
            waiting = following
        if waiting:
            yield _joined(waiting[0], *waiting[1].result())


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        # A reject counts as a line, so that a file of nothing else is told of in time.
        characters += 100 if isinstance(item, Reject) else len(item.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _joined(batch: list[Item], counts: list[int], encodings: list) -> list[Encoded | Reject]:
    found: list[Encoded | Reject] = []
    # From the end, and each let go of once it is read: an encoding holds a hundred bytes a token.
    encodings.reverse()
    counts.reverse()
    for item in batch:
        if isinstance(item, Reject):
            found.append(item)
            continue
        ids = [np.array(encodings.pop().ids, np.int64) for _ in range(counts.pop())]
        found.append(Encoded(np.concatenate(ids), len(item.text.encode()), len(item.text)))
    return found
