"""A progress bar for each time that a source is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from espalier import progress

if TYPE_CHECKING:
    from espalier.data.documents import Item
    from espalier.data.sources import Source


class Watched:
    """The items of a source, with a progress bar for each time that they are gone through."""

    def __init__(self, source: Source, label: str):
        self._source, self._label = source, label

    def __iter__(self) -> Iterator[Item]:
        from tqdm import tqdm

        from espalier.data.documents import Document

        bar = tqdm(
            desc=self._label,
            total=self._source.size(),
            unit="B",
            unit_scale=True,
            mininterval=0.5,
            leave=False,
            disable=None,
        )
        with bar, progress.waiting(self._label, bar=True):
            for item in self._source:
                yield item
                if isinstance(item, Document):
                    bar.update(len(item.text.encode()))
