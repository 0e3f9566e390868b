"""Every kind of file, packed or not, and every kind of bad record: what is good is read, what is bad is told of."""

import csv
import gzip
import io
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import espalier.data.formats
from espalier.data.config import DataConfig
from espalier.data.documents import KINDS, Document, Reject
from espalier.data.formats import read
from espalier.data.prepare import prepare
from espalier.data.sources import FileSource
from espalier.errors import UserError

LINES = ["Ein Satz.", 'Mit "Zeichen", und\nzwei Zeilen', "日本語のテキスト", "😀 emoji"]


def as_jsonl(texts) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def as_csv(texts) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "text"], *([1, text] for text in texts)])
    return file.getvalue().encode()


def as_parquet(texts) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": [1] * len(texts), "text": texts}), file, row_group_size=2)
    return file.getvalue()


def torn_page(texts, group: int) -> bytes:
    """A table whose rows end with a page, of the text in this group of two rows, that begins with nonsense."""
    content = as_parquet(texts)
    column = pyarrow.parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(group).column(1)
    begin = column.dictionary_page_offset or column.data_page_offset
    return content[:begin] + b"\xff" * 20 + content[begin + 20 :]


WRITERS = {".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}
PACKERS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    # Two frames, as parallel packers write them.
    ".zst": lambda content: b"".join(map(zstandard.compress, (content[:30], content[30:]))),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", WRITERS)
def test_tables_of_every_kind(tmp_path, kind, packing):
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(PACKERS[packing](WRITERS[kind](LINES)))
    items = list(FileSource((str(path),)))
    assert [item.text for item in items if isinstance(item, Document)] == LINES
    assert len(items) == len(LINES) and all(item.name.startswith(f"{path}:") for item in items)


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".md"])
def test_a_text_is_one_document(tmp_path, kind, packing):
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(PACKERS[packing]("Eins\r\n\r\nzwei, drei und viele mehr ✓".encode()))
    assert list(FileSource((str(path),))) == [Document("Eins\n\nzwei, drei und viele mehr ✓", str(path))]


def of_file(tmp_path: pathlib.Path, name: str, content: bytes, max_bytes: int = 1000) -> list:
    path = tmp_path / name
    path.write_bytes(content)
    return [item._replace(name=item.name.removeprefix(f"{tmp_path}/")) for item in read(str(path), "text", max_bytes)]


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "place", "kind"),
    [
        ("a.jsonl", GOOD + b'{"text": "cut of\n' + GOOD, "a.jsonl:2", "json"),
        ("a.jsonl", GOOD + b'["a list"]\n' + GOOD, "a.jsonl:2", "json"),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n" + GOOD, "a.jsonl:2", "long"),
        ("a.jsonl", GOOD + b'{"text": 7}\n' + GOOD, "a.jsonl:2", "type"),
        ("a.jsonl", GOOD + b'{"text": null}\n' + GOOD, "a.jsonl:2", "type"),
        ("a.jsonl", GOOD + b'{"body": "x"}\n' + GOOD, "a.jsonl:2", "field"),
        ("a.jsonl", GOOD + b'{"text": "\xe4 latin"}\n' + GOOD, "a.jsonl:2", "utf-8"),
        ("a.jsonl", GOOD + b'{"text": "a\\u0000b"}\n' + GOOD, "a.jsonl:2", "nul"),
        ("a.jsonl", GOOD + b'{"text": "a\0b"}\n' + GOOD, "a.jsonl:2", "nul"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n' + GOOD, "a.jsonl:2", "surrogate"),
        ("a.jsonl", GOOD + b'{"text": " "}\n' + GOOD, "a.jsonl:2", "empty"),
        ("a.jsonl", GOOD + b'{"text": "' + b"x" * 5000 + b'"}\n' + GOOD, "a.jsonl:2", "long"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0) + gzip.compress(GOOD, mtime=0)[:-4], "a.jsonl.gz:3", "damaged"),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz:1", "damaged"),
        ("a.jsonl.zst", zstandard.compress(GOOD) + zstandard.compress(GOOD * 9)[:-4], "a.jsonl.zst:2", "damaged"),
        ("a.jsonl.zst", GOOD, "a.jsonl.zst:1", "damaged"),
        ("a.jsonl", b"", "a.jsonl", "empty"),
        ("a.txt", b" \n", "a.txt", "empty"),
        ("a.txt", b"one\ntwo\n\xff three", "a.txt:3", "utf-8"),
        ("a.txt", b"a\0b", "a.txt", "nul"),
        ("a.csv", b"id,text\n1,good\n2\n3,good\n", "a.csv:3", "table"),
        ("a.csv", b"id,text\n1,good\n2,\xff\n3,good\n", "a.csv:3", "utf-8"),
        ("a.csv", b"id,text\n1,good\n2," + b"x" * 3000 + b"\n3,good\n", "a.csv:3", "long"),
        ("a.csv", b"id,body\n1,good\n", "a.csv:1", "field"),
        ("a.parquet", b"no parquet at all", "a.parquet:1", "damaged"),
        ("a.parquet", as_parquet(["good", None, "good"]), "a.parquet:2", "field"),
        ("a.parquet", as_parquet(["good", "ä" * 600, "good"]), "a.parquet:2", "long"),
        ("a.parquet", torn_page(["good"] * 5, group=1), "a.parquet:3", "damaged"),
    ],
)
def test_a_bad_record_is_told_of_and_the_rest_is_read(tmp_path, name, content, place, kind):
    items = of_file(tmp_path, name, content)
    rejects = [item for item in items if isinstance(item, Reject)]
    assert [(item.name, item.kind) for item in rejects] == [(place, kind)] and rejects[0].dropped
    assert kind in KINDS and "\n" not in rejects[0].message
    good = [item.text for item in items if isinstance(item, Document)]
    if kind != "damaged" and name.endswith((".jsonl", ".parquet")) and good:
        assert good == ["good", "good"]


STRAY = {
    "opens a row": b'"row 500,never closed\n',
    "opens the text": b'500,"never closed\n',
    "behind a quoted text": b'500,"closed" "and not\n',
    "alone": b'"\n',
}


@pytest.mark.parametrize("max_bytes", [2**25, 2000])
@pytest.mark.parametrize("stray", STRAY.values(), ids=STRAY)
def test_a_stray_quote_costs_its_line(tmp_path, stray, max_bytes):
    """Among 1,000 rows, of which some are of two lines and some have quotes: all others are kept, with their names."""
    rows = [[number, f'text "{number}"' + "\nand more" * (number % 7 == 0)] for number in range(1000)]
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "text"])
    starts = []
    for number, row in enumerate(rows):
        if number == 500:
            at = file.getvalue().count("\n") + 1
            file.write(stray.decode())
        starts.append(file.getvalue().count("\n") + 1)
        writer.writerow(row)
    items = of_file(tmp_path, "a.csv", file.getvalue().encode(), max_bytes)
    rejects = [item for item in items if isinstance(item, Reject)]
    assert [(item.name, item.kind) for item in rejects] == [(f"a.csv:{at}", "table")], rejects
    documents = [item for item in items if isinstance(item, Document)]
    assert [item.text for item in documents] == [text for _, text in rows]
    assert [item.name for item in documents] == [f"a.csv:{start}" for start in starts]


def test_a_stray_quote_at_the_end_and_many_of_them(tmp_path):
    content = b"text\n" + b"".join(b'"never closed\n' if n % 10 == 9 else b"row %d\n" % n for n in range(100))
    items = of_file(tmp_path, "a.csv", content)
    assert [item.name for item in items if isinstance(item, Reject)] == [f"a.csv:{n + 2}" for n in range(9, 100, 10)]
    assert sum(isinstance(item, Document) for item in items) == 90


def test_a_long_line_of_a_table(tmp_path):
    """By itself, and within what a stray quote has begun."""
    content = b"text\ngood\n" + b"x" * 5000 + b'\ngood\n"stray\ngood\n' + b"y" * 5000 + b"\ngood\n"
    items = of_file(tmp_path, "a.csv", content)
    found = [(item.name, item.kind if isinstance(item, Reject) else item.text) for item in items]
    kinds = ["good", "long", "good", "table", "good", "long", "good"]
    assert found == [(f"a.csv:{line}", kind) for line, kind in enumerate(kinds, 2)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'\xef\xbb\xbf"text"\ngood\n'),
        ("a.txt", b"\xef\xbb\xbfgood"),
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD),
        ("a.csv", b"\xef\xbb\xbftext\ngood\n"),
        ("a.jsonl", b'{"text": "\\ufeffgood"}\n'),
    ],
)
def test_a_byte_order_mark_is_removed_and_told_of(tmp_path, name, content):
    mark, document = of_file(tmp_path, name, content)
    assert (mark.kind, mark.dropped, document.text) == ("bom", False, "good")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here.jsonl").write_bytes(GOOD)
    source = FileSource((f"{tmp_path}/*.jsonl",))
    reject, document = list(source)
    assert (reject.kind, reject.name) == ("unreadable", f"{tmp_path}/gone.jsonl") and document.text == "good"
    assert source.fingerprint() == source.fingerprint()


def test_a_table_that_a_server_takes_away_is_not_damaged(tmp_path, monkeypatch):
    """What storage says while a table is read is told of as storage says it."""
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(["good"] * 3))

    class Gone(io.BytesIO):
        def read(self, *size):
            raise OSError(None, "the server answers 404")

    monkeypatch.setattr(espalier.data.formats, "open_file", lambda path: Gone(b"x" * 100))
    (reject,) = read(str(path), "text", 1000)
    assert isinstance(reject, Reject) and (reject.kind, reject.message) == ("unreadable", "the server answers 404")


@given(st.binary(max_size=200))
def test_no_bytes_break_a_reader(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    for kind in (".txt", ".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.zst"):
        for item in of_file(folder, f"a{kind}", content, 50):
            assert isinstance(item, Document) and "\0" not in item.text or item.kind in KINDS
        path = str(folder / f"a{kind}")
        for encoding in ("gb18030", "utf-16", "cp932", "iso2022_jp", "utf-8"):
            assert all(isinstance(item, Document) or item.kind in KINDS for item in read(path, "text", 50, encoding))


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
def test_a_long_text_is_cut_where_nothing_is_torn(tmp_path, monkeypatch, separator):
    monkeypatch.setattr(espalier.data.formats, "TEXT_BYTES", 1000)
    text = separator.join(f"Absatz {number} über Bäume" for number in range(300))
    items = of_file(tmp_path, "a.txt", text.encode())
    assert "".join(item.text for item in items) == text and len(items) > 5
    assert all(len(item.text.encode()) <= 1000 for item in items)
    if separator.strip(" "):
        lines = [0 if ":" not in item.name else int(item.name.split(":")[1]) for item in items]
        starts = [text[: sum(len(item.text) for item in items[:at])].count("\n") + 1 for at in range(len(items))]
        assert lines[1:] == starts[1:] and lines[0] == 0


def corpus(folder: pathlib.Path, damage: bool) -> DataConfig:
    """2,000 records in jsonl and 50 small files; with damage, one in a hundred of ten kinds is bad."""
    folder.mkdir()
    texts = [f"record {number} says something of its own" for number in range(2000)]
    bad = [b'{"text": "cut\n', b'{"text": 3}\n', b'{"no": 1}\n', b'{"text": "\xe4"}\n', b'{"text": "a\\u0000"}\n']
    bad += [b'{"text": ""}\n', b'{"text": "' + b"x" * 50_000_000 + b'"}\n']
    with (folder / "records.jsonl").open("wb") as file:
        if damage:
            file.write(b"\xef\xbb\xbf")
        for number, text in enumerate(texts):
            file.write(json.dumps({"text": text}).encode() + b"\n")
            if damage and number % 150 == 149:
                file.write(bad[number // 150 % len(bad)])
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(as_jsonl(texts[:20]), mtime=0))
    if damage:
        whole = gzip.compress(as_jsonl(texts[20:40]), mtime=0)
        (folder / "torn.jsonl.gz").write_bytes(whole[:-8])
        (folder / "unreadable.jsonl").symlink_to(folder / "nowhere")
    return DataConfig(files=(f"{folder}/*.jsonl*",), tokenizer_kind="bpe", cache=str(folder / "cache"))


BAD = {
    "json": b'{"text": "cut\n',
    "type": b'{"text": 3}\n',
    "field": b'{"no": 1}\n',
    "utf-8": b'{"text": "\xe4"}\n',
    "nul": b'{"text": "a\\u0000"}\n',
    "empty": b'{"text": ""}\n',
    "long": b'{"text": "' + b"x" * 50_000_000 + b'"}\n',
    "bom": b'\xef\xbb\xbf{"text": "behind a byte-order mark"}\n',
}
"""Lines by the kind of their fault; two more kinds are files."""


def test_every_hundredth_record_bad_in_ten_ways_ends_nothing(tmp_path):
    """2,000 records, of which exactly 1 % are bad: each is told of by its place, and every other one is read."""
    expected = []
    kinds = [*BAD, "damaged", "unreadable"]
    for number in range(20):
        kind, path = kinds[number % 10], tmp_path / f"{number:02}.jsonl"
        good = [f"record {number}-{line} says something of its own" for line in range(99)]
        # Not always at the end: files of one kind have it at another line the second time.
        at = 99 if number < 10 else 40
        place = f"{path}:{at + 1}"
        if kind == "damaged":
            path = path.with_name(path.name + ".gz")
            path.write_bytes(gzip.compress(as_jsonl(good), mtime=0)[:-8])
            place = f"{path}:100"
        elif kind == "unreadable":
            path.write_bytes(as_jsonl(good))
            place = f"{tmp_path}/{number:02}-gone.jsonl"
            pathlib.Path(place).symlink_to(tmp_path / "nowhere")
        else:
            lines = as_jsonl(good).splitlines(keepends=True)
            path.write_bytes(b"".join([*lines[:at], BAD[kind], *lines[at:]]))
        expected.append((place, kind, kind != "bom"))
    config = DataConfig(files=(f"{tmp_path}/*.jsonl*",), tokenizer_kind="bpe", cache=str(tmp_path / "cache"))
    prepared = prepare(config, 400, for_masked_lm=False)
    store = prepared.train["text"]
    entries = [json.loads(line) for line in (store.folder / "rejects.jsonl").read_text().splitlines()]
    found = [(entry["name"], entry["kind"], entry["dropped"]) for entry in entries]
    assert sorted(found) == sorted(expected) and len({kind for _, kind, _ in found}) == 10
    assert store.manifest["rejected"] == {kind: 2 for kind in kinds if kind != "bom"}
    assert store.manifest["repaired"] == {"bom": 2}
    documents = store.manifest["documents"] + prepared.validation["text"].manifest["documents"]
    assert documents == 20 * 99 + 2, "every good record is there, those behind the bad ones included"


def test_too_many_bad_records_end_it(tmp_path):
    from dataclasses import replace

    config = corpus(tmp_path / "bad", damage=True)
    with pytest.raises(UserError) as error:
        prepare(replace(config, max_rejected=0.001), 400, for_masked_lm=False)
    message = str(error.value)
    assert "15 of 2," in message and "records.jsonl:151: not JSON" in message and "\n" not in message
    assert "rejects.jsonl" in message and "--data.max-rejected" in message
    listed = pathlib.Path(message.split("listed in ")[1].split(";")[0])
    assert len(listed.read_text().splitlines()) == 16
    # Allowing more goes on from there, and forbidding it afterwards is heard too.
    prepare(config, 400, for_masked_lm=False)
    with pytest.raises(UserError, match="at most 0%"):
        prepare(replace(config, max_rejected=0.001), 400, for_masked_lm=False)
