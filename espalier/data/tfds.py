"""Data sets of tensorflow-datasets as a source, read without TensorFlow where they were prepared for that."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from espalier.data.config import MAX_DOCUMENT_BYTES
from espalier.data.documents import Item, from_text
from espalier.data.formats import from_bytes
from espalier.data.records import Record
from espalier.data.storage import digest
from espalier.errors import UserError
from espalier.files import read_json, sha256_of_lines


class TfdsSource:
    """Documents of `NAME[/CONFIG][:VERSION][?split=train&data_dir=DIR]`, or of the folder of a prepared data set.

    array_record and parquet are read by their own libraries; tfrecord needs an installed TensorFlow.
    """

    def __init__(self, spec: str, text_field: str | None = "text", max_document_bytes: int = MAX_DOCUMENT_BYTES):
        self.name, _, query = spec.partition("?")
        options = dict(parse_qsl(query))
        self._split, self._data_dir = options.pop("split", "train"), options.pop("data_dir", None)
        if options:
            raise UserError(f"tfds:{spec}: expected tfds:NAME/CONFIG:VERSION?split=train&data_dir=DIR, or a folder")
        self._field, self._max_bytes = text_field, max_document_bytes
        self._opened: Any = None

    def __iter__(self) -> Iterator[Item]:
        assert self._field is not None, "a source of records alone"
        for number, record in enumerate(self._records(), 1):
            name, value = f"{self.name}:{number}", record[self._field]
            if isinstance(value, bytes):
                yield from from_bytes(value, name, self._field, self._max_bytes)
            else:
                yield from from_text(value, name, self._field)

    def records(self) -> Iterator[Record]:
        """All features of each example; bytes are UTF-8, a class label is its name, None where it is -1 (no label)."""
        names = {name: kind.names for name, kind in self._builder().info.features.items() if hasattr(kind, "int2str")}
        for number, example in enumerate(self._records(), 1):
            row = {name: value.item() if hasattr(value, "item") else value for name, value in example.items()}
            for name, value in row.items():
                if name in names:
                    row[name] = names[name][value] if value >= 0 else None
                elif isinstance(value, bytes):
                    row[name] = value.decode(errors="surrogateescape")
            yield Record(f"{self.name}:{number}", list(row), list(row.values()))

    def fingerprint(self) -> str:
        """Over the content of the split's files."""
        builder = self._builder()
        split = self._split.partition("[")[0]
        parts = [digest(str(path)) for path in builder.info.splits[split].filepaths]
        limit = [] if self._max_bytes == MAX_DOCUMENT_BYTES else [str(self._max_bytes)]
        return sha256_of_lines(["tfds 1", self._split, self._field or "all columns", *limit, *parts])

    def size(self) -> int | None:
        return self._builder().info.splits[self._split].num_bytes or None

    def _records(self) -> Iterator[Any]:
        builder = self._builder()
        if builder.info.file_format.value != "tfrecord":
            source = builder.as_data_source(split=self._split)
            expected = builder.info.splits[self._split].num_examples
            if len(source) != expected:
                # What 4.9 writes as parquet lacks rows where there are more than a hundred.
                raise UserError(
                    f"tfds:{self.name} holds {len(source):,} of its {expected:,} examples: it was not written whole; "
                    'prepare it anew with file_format="array_record"'
                )
            return (source[number] for number in range(len(source)))
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                f"tfds:{self.name} was prepared as tfrecord, which needs TensorFlow: install it, or prepare the data "
                'set anew with file_format="array_record"'
            )
        import tensorflow_datasets

        # One file after the other: the order is that of the files, on every machine.
        reading = tensorflow_datasets.ReadConfig(interleave_cycle_length=1)
        return iter(
            tensorflow_datasets.as_numpy(
                builder.as_dataset(split=self._split, shuffle_files=False, read_config=reading)
            )
        )

    def _builder(self) -> Any:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library about itself
            import tensorflow_datasets

            folder = Path(self.name).expanduser()
            _check_name(self.name, folder)
            try:
                if (folder / "dataset_info.json").is_file():
                    _check_features(folder / "features.json")
                    builder = tensorflow_datasets.builder_from_directory(str(folder))
                else:
                    builder = tensorflow_datasets.builder(self.name, data_dir=self._data_dir)
            except UserError:
                raise
            except Exception as error:  # of many kinds: unknown name, version or folder
                message = " ".join(str(error).split())[:200]
                raise UserError(
                    f"tfds:{self.name} cannot be opened ({message}); expected a name of tensorflow-datasets or the "
                    "folder of a prepared one, which holds dataset_info.json"
                ) from error
        splits = dict(builder.info.splits)
        if not splits:
            raise UserError(
                f"tfds:{self.name} is not prepared in {builder.data_dir}; prepare it once, in Python: "
                f"tensorflow_datasets.builder({self.name!r}, file_format='array_record').download_and_prepare()"
            )
        if self._split.partition("[")[0] not in splits:
            raise UserError(f"tfds:{self.name} has no split {self._split!r}; there are {', '.join(splits)}")
        features: dict = dict(builder.info.features or {})  # type: ignore[arg-type]
        if self._field is not None and self._field not in features:
            raise UserError(
                f"tfds:{self.name} has no feature {self._field!r}; there are {', '.join(map(repr, features))} "
                "(--data.text-field NAME chooses another)"
            )
        return builder


def _check_name(name: str, folder: Path) -> None:
    """UserError for NAMESPACE:NAME, whose code tensorflow-datasets would fetch and run."""
    before, colon, version = name.partition(":")
    if colon and not folder.is_dir() and not re.fullmatch(r"[\d*]+\.[\d*]+\.[\d*]+|experimental_latest", version):
        raise UserError(
            f"tfds:{name}: a data set of {before}, not of tensorflow-datasets, is code that would be run; prepare it "
            "yourself and name its folder"
        )


def _check_features(path: Path) -> None:
    """UserError where features.json asks for classes that are not of tensorflow-datasets: it would import them."""

    def classes(value: Any) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key in ("pythonClassName", "type") and isinstance(inner, str):
                yield inner
            elif isinstance(inner, dict | list):
                yield from classes(inner)

    for name in classes(read_json(path)) if path.is_file() else ():
        if not name.startswith("tensorflow_datasets."):
            raise UserError(f"{path} asks for the class {name[:200]}, not of tensorflow-datasets; it is not run")
