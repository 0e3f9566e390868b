"""Labelled files in the forms people have them."""

import csv
import gzip
import hashlib
import json
import pathlib

import datasets
import pyarrow.parquet
import pytest
import zstandard

from espalier.data.labelled import read_labelled
from espalier.data.tables import read_table
from espalier.errors import UserError


def write(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("task", "rows", "labels", "pairs"),
    [
        ("SST-2", (67_349, 872), {"0", "1"}, False),
        ("MRPC", (3_667, 408), {"0", "1"}, True),
        ("RTE", (2_490, 277), {"entailment", "not_entailment"}, True),
    ],
)
def test_glue_files(shared_data, task, rows, labels, pairs):
    """As many rows as the files have lines, less the header."""
    for name, count in zip(("train.tsv", "dev.tsv"), rows, strict=True):
        found = read_labelled(shared_data / "glue" / task / name)
        assert found.labels is not None
        assert len(found.texts_a) == len(found.labels) == count and set(found.labels) == labels
        assert (found.texts_b is not None) == pairs


def test_quotes_of_glue_are_characters(shared_data):
    found = read_labelled(shared_data / "glue" / "MRPC" / "train.tsv")
    assert found.labels and found.texts_b
    assert found.labels[0] == "1"
    assert found.texts_a[0] == (
        'Amrozi accused his brother , whom he called " the witness " , of deliberately distorting his evidence .'
    )
    assert found.texts_b[0].startswith('Referring to him as only " the witness "')


def test_csv_has_real_quoting(tmp_path):
    path = write(tmp_path / "a.csv", '\ufefftext,label\r\n"two\nlines, ""quoted""",1\r\n\r\nplain,0\r\n')
    assert read_labelled(path)[:3] == (['two\nlines, "quoted"', "plain"], None, ["1", "0"])


def test_jsonl(tmp_path):
    first = {"premise": "a", "hypothesis": "b", "label": 1, "meta": {"x": 1}}
    rows = [first, {"hypothesis": "d", "premise": "c", "label": 0}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert read_labelled(path)[:3] == (["a", "c"], ["b", "d"], ["1", "0"])


def test_columns_are_guessed_or_named(tmp_path):
    path = write(tmp_path / "a.tsv", "id\tquery\tanswer\tclass\n1\tq\ta\tx\n2\tr\tb\ty\n")
    assert read_labelled(path)[:3] == (["q", "r"], ["a", "b"], ["x", "y"])
    assert read_labelled(path, ("answer",), "id")[:3] == (["a", "b"], None, ["1", "2"])
    unlabelled = write(tmp_path / "b.tsv", "index\tsentence\n0\tone\n")
    assert read_labelled(unlabelled)[:3] == (["one"], None, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\nfine\t1\nshort\n", "a.tsv:3: 1 columns, but the first line names 2"),
        ("a.tsv", "sentence\tlabel\nfine\t1\n\nlong\t1\t2\n", "a.tsv:4: 3 columns"),
        ("a.tsv", b"sentence\tlabel\nfine\t1\n\xe4\t1\n", "a.tsv:3: byte 0xe4 is not valid UTF-8"),
        ("a.tsv", "", "a.tsv holds no rows"),
        ("a.tsv", "sentence\tlabel\n", "a.tsv holds no rows"),
        ("a.tsv", "a\tb\tc\tlabel\nx\ty\tz\t1\n", "which columns hold the text? It has 'a', 'b', 'c', 'label'"),
        ("a.csv", 'text,label\n"open,1\n', "a.csv:2: "),
        ("a.csv", 'text,label\n"two\nlines",1\nshort\n', "a.csv:4: 1 columns"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}\n', "a.jsonl:2: no string or number under 'label'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": null, "label": 1}\n', "a.jsonl:2: no string or number under"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: JSON of type list"),
        ("a.jsonl", '{"text"\n', "a.jsonl:1: not JSON"),
        ("a.doc", "", "unknown kind of file; labelled text is read from .tsv, .csv, .jsonl, .json"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        read_labelled(write(tmp_path / name, content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_half_a_surrogate_pair_is_found_within_lists_and_objects(tmp_path):
    """Which embeddings, rankings and chats read; no tokenizer takes it."""
    path = tmp_path / "rows.jsonl"
    for value in ('["a", "\\ud800"]', '[{"content": "\\udfff"}]', '{"text": "\\ud83d"}'):
        path.write_text('{"text": "a", "more": []}\n{"text": "b", "more": ' + value + "}\n")
        with pytest.raises(UserError, match="rows.jsonl:2: half a surrogate pair"):
            read_table(str(path))


def test_a_folder_is_no_unknown_kind_of_file(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        read_labelled(str(tmp_path))
    with pytest.raises(UserError, match=f"no file {tmp_path}/scifactt; check the path"):
        read_labelled(f"{tmp_path}/scifactt")


READABLE = {
    "semicolons": ("a.csv", "text;label\nfine, really;1\n\"bad; so\";0\n", "separated by semicolons"),
    "tabs in .csv": ("a.csv", 'text\tlabel\nfine, really\t1\n"bad; so"\t0\n', "separated by tabs"),
    "bars": ("a.csv", "text|label\nfine, really|1\nbad; so|0\n", "separated by vertical bars"),
    "commas in .tsv": ("a.tsv", 'text,label\n"fine, really",1\nbad; so,0\n', "separated by commas"),
    "carriage returns": ("a.tsv", "text\tlabel\rfine, really\t1\rbad; so\t0\r", "carriage return"),
    "array": (
        "a.json", '[{"text": "fine, really", "label": 1},\n {"text": "bad; so", "label": 0}]', "array of 2 objects"
    ),
    "array in .jsonl": (
        "a.jsonl", '[{"text": "fine, really", "label": 1}, {"text": "bad; so", "label": 0}]', "array of 2 objects"
    ),
    "lines in .json": ("a.json", '{"text": "fine, really", "label": 1}\n{"text": "bad; so", "label": 0}\n', None),
    "Windows": ("a.csv", '\ufefftext, label\r\n"fine, really", 1\r\nbad; so, 0\r\n', None),
}  # fmt: skip
"""What leaves no doubt: name, content, what is said of it."""


@pytest.mark.parametrize("case", READABLE)
def test_what_leaves_no_doubt_is_read_and_said(tmp_path, case):
    name, content, words = READABLE[case]
    found = read_labelled(write(tmp_path / name, content))
    assert found[:3] == (["fine, really", "bad; so"], None, ["1", "0"]) and found.label_column == "label"
    assert len(found.notes) == (words is not None)
    assert words is None or words in found.notes[0] and found.notes[0].startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "what a lovely film,1\nI left early,0\n", "looks like data, not like the names of columns: 'what a"),
        ("a.tsv", "fine\tpos\nok\tpos\nbad\tneg\nso so\tneg\nwell\tpos\n", "put a line of names in front, for instance "
         "'text.*tlabel'"),
        ("a.csv", "很好看的一部电影。;好\n不好;坏\n", "looks like data.*'text;label'"),
        ("a.csv", "text,label,label\nx,1,2\n", "the column 'label' is there twice"),
        ("a.jsonl", '{"text": "x", "label": 1, "label": 2}\n', "a.jsonl:1: the field 'label' is there twice"),
        ("a.csv", "text;label\nfine;1\nbad;0;1\n", "a.csv:3: 3 columns, but the first line names 2"),
        ("a.csv", '{"text": "x", "label": 1}\n', "holds JSON, and is named .csv; rename it to .jsonl"),
        ("a.csv", '[{"text": "x", "label": 1},\n{"text": "y", "label": 0}]\n', "rename it to .json"),
        ("a.json", '{"data": [{"text": "x", "label": 1}],\n "version": 1}', "one JSON object, with the fields 'data'"),
        ("a.json", '[{"text": "x",\n "label": 1}, {"text"', "begins like a JSON array and is none"),
        ("a.xlsx", b"PK\x03\x04", "is a spreadsheet; open it and save it as CSV in UTF-8"),
        ("a.csv", b"PK\x03\x04\x14", "is an Excel file or another archive"),
        ("a.csv", b"PAR1\x15\x04", "is a Parquet file"),
        ("a.csv", b"\x1f\x8b\x08", "is packed by gzip; add .gz to its name"),
        ("a.csv", b"", "holds no rows: it is empty"),
        ("a.csv", b"\xef\xbb\xbf\r\n", "holds no rows: it is empty"),
    ],
)  # fmt: skip
def test_what_was_found_is_said_with_what_to_do(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_labelled(write(tmp_path / name, content))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / name))


TEXTS, NAMES = ["很好 看,\n“真”的", 'said "no"', "third"], ["good", "bad", "good"]


def written(folder: pathlib.Path, way: str) -> str:
    """The labelled rows TEXTS and NAMES, named as --data.train names them."""
    rows = [{"text": text, "label": name} for text, name in zip(TEXTS, NAMES, strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if way.startswith("hf"):
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
        data = datasets.Dataset.from_list(rows + [{"text": "unlabelled", "label": -1}], features)
        data.save_to_disk(folder / "saved")
        return f"hf:{folder}/saved"
    path = folder / f"rows{way.removeprefix('file://')}"
    if ".parquet" in way:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    if ".csv" in way:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *map(dict.values, rows)])
        lines = path.read_bytes()
    packed = gzip.compress(lines) if way.endswith(".gz") else zstandard.compress(lines) if ".zst" in way else lines
    path.write_bytes(packed)
    return f"file://{path}" if way.startswith("file://") else str(path)


@pytest.mark.parametrize("way", [".jsonl", ".csv", ".jsonl.gz", ".csv.zst", ".parquet", "file://.csv.gz"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, way):
    path = written(tmp_path, way)
    found = read_labelled(path)
    assert found[:3] == (TEXTS, None, NAMES) and found.columns == ("text", "label")
    if "://" not in path:
        assert found.fingerprint == hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def test_data_sets_of_hugging_face_have_labels_with_names(tmp_path):
    with pytest.raises(UserError, match="saved:4: no string or number under 'label'"):
        read_labelled(written(tmp_path, "hf"))
    (tmp_path / "b").mkdir()
    data = datasets.load_from_disk(str(tmp_path / "saved"))
    data.select([2, 1, 0]).save_to_disk(tmp_path / "b" / "saved")
    data.select([0, 1, 2]).save_to_disk(tmp_path / "whole")
    turned, whole = (read_labelled(f"hf:{path}") for path in (tmp_path / "b" / "saved", tmp_path / "whole"))
    assert whole[:3] == (TEXTS, None, NAMES) and turned[:3] == (TEXTS[::-1], None, NAMES[::-1])
    assert whole.fingerprint and whole.fingerprint != turned.fingerprint
    for spec in ("builtin:pydoc", "python:my.py:texts"):
        with pytest.raises(UserError, match=f"{spec} has no labels"):
            read_labelled(spec)
    with pytest.raises(UserError, match="data.encoding=cp1252 is of files"):
        read_labelled(f"hf:{tmp_path}/whole", encoding="cp1252")


@pytest.mark.parametrize("way", [".jsonl.gz", ".csv.zst", ".parquet"])
def test_a_file_that_is_cut_off_is_named(tmp_path, way):
    path = pathlib.Path(written(tmp_path, way))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{path}.* damaged"):
        read_labelled(path)


@pytest.mark.parametrize(
    "content",
    [
        "text,label\nx,1\ny,0\n",
        "index,sentence\n0,one\n1,two\n",
        "0,1\nsome words,a\nmore words,b\n",
        "review,stars\na,1\n",
        "id,text,label\n1,label,label\n2,label,label\n",
    ],
)
def test_a_header_is_not_taken_for_data(tmp_path, content):
    found = read_labelled(write(tmp_path / "a.csv", content))
    assert len(found.texts_a) == content.count("\n") - 1


def test_an_unquoted_comma_does_not_make_another_table(tmp_path):
    """Where the promised delimiter is there, other ones are not tried instead of telling of a bad row."""
    path = write(tmp_path / "a.csv", "text,label\nfine,1\nbad, so bad,0\n")
    with pytest.raises(UserError, match="a.csv:3: 3 columns, but the first line names 2"):
        read_labelled(path)


def test_missing_column_lists_what_is_there(tmp_path):
    path = write(tmp_path / "a.tsv", "sentence\tlabel\nx\t1\n")
    with pytest.raises(UserError, match="no column 'text'; its columns are 'sentence', 'label'"):
        read_labelled(path, ("text",))
    with pytest.raises(UserError, match="no column 'gold'"):
        read_labelled(path, label="gold")
    with pytest.raises(UserError, match="no file"):
        read_labelled(tmp_path / "b.tsv")
