"""Data sets of Hugging Face as a source: from the Hub, a folder of `save_to_disk`, or a folder of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from espalier.data.config import MAX_DOCUMENT_BYTES
from espalier.data.documents import Item, from_text
from espalier.data.formats import from_arrow, too_long
from espalier.data.records import Record
from espalier.data.storage import digest
from espalier.errors import UserError
from espalier.files import inside, read_json, sha256_of_lines, sha256_of_text

STREAMED = 10_000
"""Documents read from a stream unless `take` is given."""


class HfSource:
    """Documents of `ID_OR_FOLDER[?name=CONFIG&split=SPLIT&revision=REV&streaming=true&take=N]`.

    The data set is downloaded and mapped; with streaming=true only its first `take` documents are fetched.
    """

    def __init__(self, spec: str, text_field: str | None = "text", max_document_bytes: int = MAX_DOCUMENT_BYTES):
        self.path, _, query = spec.partition("?")
        options = dict(parse_qsl(query))
        self._split = options.pop("split", "train")
        self._load: dict[str, Any] = {key: options.pop(key) for key in ("name", "revision") if key in options}
        self._streaming = options.pop("streaming", "false").lower() in ("true", "1")
        take = options.pop("take", str(STREAMED))
        if options or not take.isdigit():
            raise UserError(
                f"hf:{spec}: expected hf:ID_OR_FOLDER?name=CONFIG&split=train&revision=REV&streaming=true&take=1000"
            )
        self._take, self._field, self._max_bytes = int(take), text_field, max_document_bytes
        self._opened: Any = None

    @property
    def approximate(self) -> str | None:
        """A notice to print before the source is used; None where there is nothing to say."""
        if not self._streaming:
            return None
        return (
            f"hf:{self.path} is streamed, for a look at its first {self._take:,} documents: their content has no "
            "fingerprint, so a resume is approximate (another machine may see others); without streaming=true, exact"
        )

    def __iter__(self) -> Iterator[Item]:
        for number, value in enumerate(self._values(), 1):
            name = f"{self.path}:{number}"
            if not self._streaming:
                yield from from_arrow(value, name, self._text_field(), self._max_bytes)
            elif isinstance(value, str) and (size := len(value.encode(errors="replace"))) > self._max_bytes:
                yield too_long(name, size, self._max_bytes)
            else:
                yield from from_text(value, name, self._text_field())

    def records(self) -> Iterator[Record]:
        """All columns of each row; class labels of `datasets`, also in a list, by their names, None where it is -1 (no
        label)."""
        import datasets

        data = self._data()
        features = data.features or {}
        names, lists = {}, {}
        for name, kind in features.items():
            within = getattr(kind, "feature", None)
            if isinstance(kind, datasets.ClassLabel):
                names[name] = kind.names
            elif isinstance(within, datasets.ClassLabel):
                lists[name] = within.names
        if self._streaming:
            rows = iter(data.take(self._take))
        else:
            # As Arrow has them, for `datasets` would decode images and sounds.
            batches = data.with_format("arrow").iter(1000)
            rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            for name, classes in names.items():
                row[name] = _name_of(row[name], classes)
            for name, classes in lists.items():
                row[name] = row[name] and [_name_of(index, classes) for index in row[name]]
            yield Record(f"{self.path}:{number}", list(row), list(row.values()))

    def fingerprint(self) -> str:
        """Over the content of the Arrow files; for a stream, over the request."""
        parts: Iterable[str]
        if self._streaming:
            parts = [self.path, *map(str, sorted(self._load.items())), str(self._take)]
        else:
            data = self._data()
            files = [entry["filename"] for entry in data.cache_files]
            if files:
                parts = map(digest, files)
            elif self._field is None:
                parts = (repr(record.values) for record in self.records())
            else:
                parts = (str(value.as_py()) for value in self._values())
            if data._indices is not None:
                order = repr(data._indices.column(0).to_pylist())
                parts = chain(parts, [sha256_of_text(order)])
        limit = [] if self._max_bytes == MAX_DOCUMENT_BYTES else [str(self._max_bytes)]
        return sha256_of_lines(chain(["hf 1", self._split, self._field or "all columns", *limit], parts))

    def size(self) -> int | None:
        return None if self._streaming else self._data().data.column(self._text_field()).nbytes

    def _text_field(self) -> str:
        assert self._field is not None, "a source of records alone"
        return self._field

    def _values(self) -> Iterator[Any]:
        """Values of the text column: Arrow's, which lie in the mapped files; of a stream, Python's."""
        data = self._data()
        if self._streaming:
            for record in data.take(self._take):
                if self._field not in record:
                    raise self._no_column(list(record))
                yield record[self._field]
            return
        column = data.data.column(self._text_field())
        if data._indices is None:
            for chunk in column.chunks:
                yield from chunk
        else:
            for chunk in data._indices.column(0).chunks:
                yield from (column[number.as_py()] for number in chunk)

    def _data(self) -> Any:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        import datasets

        folder = Path(self.path).expanduser()
        saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            if saved:
                _check_saved(folder)
                data: Any = datasets.load_from_disk(str(folder))
            else:
                path = str(folder) if folder.is_dir() else self.path
                builder = datasets.load_dataset_builder(path, **self._load)
                _check_files(builder, folder if folder.is_dir() else None)
                if self._streaming:
                    data = builder.as_streaming_dataset(split=self._split)
                else:
                    builder.download_and_prepare()
                    data = builder.as_dataset(split=self._split)
        except UserError:
            raise
        except Exception as error:  # of many kinds: not found, no network, no such configuration or split
            message = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"hf:{self.path} cannot be opened ({message}); expected a folder, or an id of the Hub and its network"
            ) from error
        finally:
            if shown:
                datasets.enable_progress_bars()
        if isinstance(data, dict):
            if self._split not in data:
                raise UserError(f"hf:{self.path} has no split {self._split!r}; there are {', '.join(map(str, data))}")
            data = data[self._split]
        if self._field is not None and not self._streaming and self._field not in data.column_names:
            raise self._no_column(data.column_names)
        return data

    def _no_column(self, names: list[str]) -> UserError:
        return UserError(
            f"hf:{self.path} has no column {self._field!r}; there are {', '.join(map(repr, names))} "
            "(--data.text-field NAME chooses another)"
        )


def _check_saved(folder: Path) -> None:
    """UserError where the JSON files of `save_to_disk` name files outside their folder."""
    splits = folder / "dataset_dict.json"
    names = read_json(splits).get("splits") if splits.is_file() else None
    parts = [inside(folder, name, splits) for name in names] if isinstance(names, list) else [folder]
    for part in parts:
        state = part / "state.json"
        files = read_json(state).get("_data_files") if state.is_file() else None
        for entry in files if isinstance(files, list) else []:
            inside(part, entry.get("filename") if isinstance(entry, dict) else None, state)


def _check_files(builder: Any, folder: Path | None) -> None:
    """UserError where the README.md of a data set names files that are not of it.

    folder: where it lies; None = on the Hub, where its files are hf://datasets/…
    """
    for files in (getattr(builder.config, "data_files", None) or {}).values():
        for name in map(str, files):
            if folder is None and not name.startswith("hf://") or folder is not None and "://" in name:
                raise UserError(f"the README.md of {folder or builder.repo_id} names {name}, which is no file of it")
            if folder is not None:
                inside(folder, os.path.relpath(name, folder.resolve()), folder / "README.md")


def _name_of(index: Any, classes: list[str]) -> str | None:
    return classes[index] if isinstance(index, int) and index >= 0 else None
