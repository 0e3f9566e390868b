"""Ask a model about every row of files: `./launch.sh predict RUN|hf:ID --data.files F --output F`.

What is asked is the model's use (espalier/predict/use.py). Rows are read, answered and written in chunks, in their
order, so that memory does not depend on the size of the files.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, cast

from espalier import cli, progress
from espalier.commands.asked_model import AskedModel, stopping
from espalier.data.encodings import codec
from espalier.errors import UserError
from espalier.files import replacing
from espalier.progress import plural

if TYPE_CHECKING:
    from espalier.data.documents import Reject
    from espalier.data.rows import Row
    from espalier.predict.loaded import LoadedModel
    from espalier.predict.use import Use

FEWEST, MOST = 64, 8192
"""Rows of a chunk: as many as take about PACE seconds."""
PACE = 5.0
CHARACTERS = 2**24
"""Of a chunk at most."""
LISTED = 20
"""Bad rows that are listed."""
GIVEN = "given_"
"""Stands before the name of a column whose name a result has, with another value."""
OUTPUTS = (".jsonl", ".csv", ".npy")


@dataclass(frozen=True)
class PredictData:
    """What is asked about."""

    files: tuple[str, ...] = ()
    """Files: .tsv and .csv (with a line of column names), .jsonl, .json (also SQuAD's), .txt (a text a line), .parquet,
    .conll (a word a line), each also .gz, .zst or a URL; - = standard input."""
    format: Literal["tsv", "csv", "jsonl", "json", "txt", "parquet", "conll"] | None = None
    """What the files hold; unset = by their names, and of standard input jsonl where it begins with {, else txt."""
    text: tuple[str, ...] = ()
    """The column of the text, or two for pairs; unset = text (and text_b), or guessed as in fine-tuning."""
    columns: tuple[str, ...] = ()
    """Which columns are the fields that the model takes, where they are called otherwise: question=frage
    context=absatz."""
    values: tuple[str, ...] = ()
    """Fields that every row gets, as NAME=VALUE: top_k=3."""
    encoding: str = "utf-8"
    """Encoding of the files, by the names of Python: gb18030, big5, cp932, euc-jp, euc-kr, utf-16, cp1252 …"""
    max_length: int | None = None
    """Tokens of an input at most; unset = as in the fine-tuning, else the model's positions, but at most 512."""

    def __post_init__(self):
        codec(self.encoding)
        if len(self.text) > 2:
            raise UserError(
                f"{len(self.text)} text columns were given ({', '.join(self.text)}); a model reads one or two"
            )
        for name in ("columns", "values"):
            for pair in getattr(self, name):
                if not pair.partition("=")[0] or not pair.partition("=")[1]:
                    what = "FIELD=COLUMN, for instance text=review" if name == "columns" else "NAME=VALUE"
                    raise UserError(f"data.{name}={pair!r} is not {what}")


@dataclass(frozen=True)
class PredictConfig(AskedModel):
    """Ask a model about every row of files: `predict RUN --data.files F --output PREDICTIONS.jsonl`.

    What it answers follows from what it was trained for: a label with probabilities, tags, an answer, a score, an
    embedding, filled masks, text. Each result stands beside its row, in the order of the rows; a bad row has `error`.
    """

    data: PredictData = field(default_factory=PredictData)
    output: str | None = None
    """File to write, .jsonl or .csv, or .npy for embeddings; unset = standard output, as jsonl."""
    use: str | None = None
    """What to ask, where it is not what the model was trained for: embed."""
    stop: tuple[str, ...] = ()
    """Of a model that writes: texts at which its text ends, which are no part of it. A field `stop` of a row goes
    before."""
    strict: bool = False
    """End at the first bad row, and write nothing."""

    def __post_init__(self):
        if not self.data.files:
            raise UserError("no --data.files given: name what to ask about (.tsv, .csv, .jsonl, .txt), or - for stdin")
        if self.output is None:
            if self.json:
                raise UserError("--json and the predictions would both go to standard output; give --output F too")
            if self.strict:
                raise UserError("--strict writes all or nothing, which standard output cannot; give --output F too")
            return
        if not self.output.endswith(OUTPUTS):
            raise UserError(
                f"--output {self.output}: unknown kind of file; predictions are written as {', '.join(OUTPUTS)}"
            )
        path = Path(self.output).expanduser().absolute()
        if path.is_dir():
            raise UserError(f"--output {self.output} is a folder; name a file in it")
        folder = path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--output {self.output}: {folder} is no folder that can be written to; make it first")


class Answered(NamedTuple):
    """A row with its result, or with what is wrong with it."""

    name: str
    values: Mapping[str, Any]
    """Of the row; of one that could not be read, nothing."""
    result: Mapping[str, Any] | None
    error: str | None

    def as_json(self) -> dict[str, Any]:
        found = {"error": self.error} if self.result is None else dict(self.result)
        place = {"line": self.name} if self.result is None else {}
        taken = place | found
        given = {name: value for name, value in self.values.items() if taken.get(name, value) == value}
        renamed = {GIVEN + name: value for name, value in self.values.items() if name not in given}
        return given | renamed | taken


def main(config: PredictConfig) -> dict[str, Any]:
    """Write a prediction for every row; returns the `--json` object."""
    from espalier.data.rows import Rows
    from espalier.predict.loaded import on_all_devices
    from espalier.predict.outputs import counting_cut

    rows = Rows(config.data.files, config.data.format, codec(config.data.encoding))
    with progress.on_stderr():
        with progress.waiting(f"loading {config.model}"):
            model, use = config.opened(config.use, config.data.max_length)
            use = stopping(use, config.stop)
        if config.output and config.output.endswith(".npy") and use.name != "embed":
            raise UserError(
                f"--output {config.output}: .npy holds embeddings, and this model does {use.name}; try .jsonl"
            )
        began, count, bad = time.monotonic(), 0, 0
        with (
            _writer(config.output) as write,
            _watched(config) as said,
            on_all_devices(model) as model,
            counting_cut() as lost,
        ):
            for chunk in answered(rows, config, model, use):
                if config.strict and (wrong := next((one for one in chunk if one.error), None)):
                    raise UserError(f"{wrong.name}: {wrong.error}; nothing was written (--strict)")
                write(chunk)
                for one in chunk:
                    if one.error:
                        bad += 1
                        if bad <= LISTED:
                            progress.say(f"bad row: {one.name}: {one.error}")
                count += len(chunk)
                said(_far(count, rows.share, time.monotonic() - began))
            if not count:
                raise UserError(f"{', '.join(config.data.files)}: there are no rows")
        for note in rows.notes:
            progress.say(note)
        if lost:
            what = f"{plural(len(lost), 'input')} had more than {model.longest:,} tokens and lost {sum(lost):,} of them"
            progress.say(f"{what} at the end of a text (--data.max-length)")
        seconds = time.monotonic() - began
        told = f"{bad:,} of {count:,} rows are bad" if bad else f"{count:,} rows"
        where = f"; written to {config.output}" if config.output else ""
        progress.say(f"{use.name}: {told}, {count / seconds:,.0f} a second{where}")
    return {"use": use.name, "rows": count, "bad": bad, "cut": len(lost), "output": config.output, "seconds": seconds}


def answered(
    rows: Iterable[Row | Reject], config: PredictConfig, model: LoadedModel, use: Use
) -> Iterator[list[Answered]]:
    """Chunks of rows with their results, in order. UserError where every row of the first chunk is bad."""
    from espalier.predict.use import checked

    pace, first, before = _Pace(), True, 0
    for chunk in _chunks(rows, pace):
        began = time.monotonic()
        inputs, errors, at = [], {}, []
        for number, row in enumerate(chunk):
            try:
                one = _input(row, config.data, use)
                inputs.append(use.numbered(one, before + number) if use.numbered else one)
                at.append(number)
            except UserError as error:
                errors[number] = str(error)
        results: dict[int, Any] = dict(zip(at, checked(use, model, inputs), strict=True))
        errors |= {number: str(found) for number, found in results.items() if isinstance(found, UserError)}
        if first and len(errors) == len(chunk):
            hint = _headless(chunk)
            every = "the only row" if len(chunk) == 1 else f"each of the first {len(chunk)} rows"
            raise UserError(f"{every} is bad: {chunk[0].name}: {errors[0]}{hint}")
        first, before = False, before + len(chunk)
        yield [
            Answered(row.name, getattr(row, "values", {}), None, errors[number])
            if number in errors
            else Answered(row.name, cast(Any, row).values, results[number], None)
            for number, row in enumerate(chunk)
        ]
        pace.took(time.monotonic() - began)


def fields(values: Mapping[str, Any], data: PredictData) -> dict[str, Any]:
    """A row by the names of the fields that a model takes. UserError where a column that was named is not there."""
    from espalier.data.labelled import TEXT_COLUMNS

    named = dict(pair.split("=", 1) for pair in data.columns) | dict(zip(("text", "text_b"), data.text, strict=False))
    if missing := [column for column in named.values() if column not in values]:
        there = ", ".join(map(repr, list(values)[:10])) or "none"
        raise UserError(f"no column {missing[0]!r}; there are {there} (--data.text and --data.columns choose others)")
    if "text" not in named and "text" not in values:
        guess = next((names for names in TEXT_COLUMNS if all(name in values for name in names)), ())
        if not guess and len(values) == 1 and isinstance(next(iter(values.values())), str):
            guess = tuple(values)
        named |= zip(("text", "text_b"), guess, strict=False)
    fixed = dict(pair.split("=", 1) for pair in data.values)
    found = {**fixed, **values, **{name: values[column] for name, column in named.items()}}
    # A number is a text too, as in files that are learnt from.
    texts = {name: json.dumps(found[name]) for name in ("text", "text_b") if type(found.get(name)) in (int, float)}
    return found | texts


def _input(row: Row | Reject, data: PredictData, use: Use) -> Any:
    from espalier.data.documents import Reject

    if isinstance(row, Reject):
        raise UserError(row.message)
    found = fields(row.values, data)
    try:
        json.dumps(found, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise UserError("half a surrogate pair (\\ud800 …) is no character; correct the row") from None
    return use.reads(found)


def _headless(chunk: Sequence[Row | Reject]) -> str:
    """A hint where the first line of a table seems to be a row, not the names of its columns."""
    from espalier.data.records import Record
    from espalier.data.rows import Row
    from espalier.data.tables import Table, looks_like_data

    rows = [row for row in chunk if isinstance(row, Row)]
    path = rows[0].name.rpartition(":")[0] if rows else ""
    if not path.removesuffix(".gz").removesuffix(".zst").endswith((".tsv", ".csv")):
        return ""
    columns = list(rows[0].values)
    records = [Record(row.name, columns, list(row.values.values())) for row in rows if list(row.values) == columns]
    if not looks_like_data(Table(path, columns, records, "\t", ())):
        return ""
    return "; the first line looks like data: put a line with the names of the columns in front"


class _Pace:
    """Rows of a chunk, so that one takes about PACE seconds."""

    rows = FEWEST

    def took(self, seconds: float) -> None:
        if seconds < PACE / 2:
            self.rows = min(MOST, self.rows * 2)
        elif seconds > 2 * PACE:
            self.rows = max(FEWEST, self.rows // 2)


def _chunks(rows: Iterable[Row | Reject], pace: _Pace) -> Iterator[list[Row | Reject]]:
    chunk, characters = [], 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(value) for value in getattr(row, "values", {}).values() if isinstance(value, str))
        if len(chunk) >= pace.rows or characters > CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _watched(config: PredictConfig) -> Iterator[Any]:
    """Progress, but where the predictions themselves appear on the terminal."""
    if config.output is None and sys.stdout.isatty():
        yield lambda words: None
        return
    with progress.waiting("predicting") as said:
        yield said


def _far(count: int, share: float | None, seconds: float) -> str:
    rate = f"{count:,} rows, {count / seconds:,.0f} a second"
    if not share:
        return rate
    return f"{rate}, {share:.0%} done, {progress.clock(seconds * (1 - share) / share)} left".replace("%", " %")


@contextlib.contextmanager
def _writer(output: str | None) -> Iterator[Any]:
    """Takes chunks of Answered. A file is there as a whole when the block ends, or as it was."""
    if output is None:

        def to_stdout(chunk: Sequence[Answered]) -> None:
            sys.stdout.writelines(map(_line, chunk))
            sys.stdout.flush()

        yield to_stdout
        return
    path = Path(output).expanduser()
    if path.suffix == ".jsonl":
        with replacing(path) as file:
            yield lambda chunk: file.writelines(map(_line, chunk))
    elif path.suffix == ".csv":
        with replacing(path) as file, _as_csv(file) as write:
            yield write
    else:
        with replacing(path, "wb") as file, _as_npy(file) as write:
            yield write


def _line(row: Answered) -> str:
    return _whole(json.dumps(row.as_json(), ensure_ascii=False, default=str)) + "\n"


def _whole(text: str) -> str:
    """With half a surrogate pair, which is no character and cannot be written, as its escape: that of JSON too."""
    return text.encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def _as_csv(file: IO[str]) -> Iterator[Any]:
    """Rows whose columns are known at their end: until then they lie beside. What is no string or number is JSON."""
    columns: dict[str, None] = {}
    returns = False
    with tempfile.TemporaryFile("w+", encoding="utf-8") as lines:

        def write(chunk: Sequence[Answered]) -> None:
            nonlocal returns
            for row in chunk:
                columns.update(dict.fromkeys(row.as_json()))
            found = [*map(_line, chunk)]
            returns = returns or any("\\r" in line for line in found)
            lines.writelines(found)

        yield write
        lines.seek(0)
        # The csv module leaves a carriage return unquoted, which readers take for the end of a row.
        quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
        table = csv.DictWriter(file, [*map(_whole, columns)], lineterminator="\n", quoting=quoting)
        table.writeheader()
        for line in lines:
            table.writerow({_whole(name): _cell(value) for name, value in json.loads(line).items()})


def _cell(value: Any) -> Any:
    return _whole(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


@contextlib.contextmanager
def _as_npy(file: IO[bytes]) -> Iterator[Any]:
    """Embeddings, float32 [rows, D]; of a bad row NaN. Their number is known at the end, and stands in front."""
    import numpy as np

    count, width = 0, 0
    with tempfile.TemporaryFile() as rows:

        def write(chunk: Sequence[Answered]) -> None:
            nonlocal count, width
            found = {number: row.result["embedding"] for number, row in enumerate(chunk) if row.result is not None}
            width = width or len(next(iter(found.values())))
            block = np.full((len(chunk), width), np.nan, np.float32)
            for number, vector in found.items():
                block[number] = vector
            rows.write(block.tobytes())
            count += len(chunk)

        yield write
        np.lib.format.write_array_header_1_0(
            file,
            {
                "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
                "fortran_order": False,
                "shape": (count, width),
            },
        )
        rows.seek(0)
        shutil.copyfileobj(rows, file)


if __name__ == "__main__":
    cli.run_config(main, PredictConfig, prog="predict")
