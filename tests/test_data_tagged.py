"""Files of tagged sentences in the forms people have them; what is none is refused in one line with its place."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from espalier.data.tagged import read_tagged
from espalier.errors import UserError

TOKENS, TAGS = [["Ann", "sleeps", "."], ["In", "Rome"]], [["B-PER", "O", "O"], ["O", "B-LOC"]]
COLUMNS = {
    "tabs": "Ann\tB-PER\nsleeps\tO\n.\tO\n\nIn\tO\nRome\tB-LOC\n",
    "blank lines that hold a tab": "\t\nAnn\tB-PER\nsleeps\tO\n.\tO\n\t\n\t\nIn\tO\nRome\tB-LOC\n\t",
    "blanks": "Ann B-PER\nsleeps  O\n. O \n \nIn O\nRome B-LOC",
    "carriage returns": "Ann\tB-PER\r\nsleeps\tO\r\n.\tO\r\n\r\nIn\tO\r\nRome\tB-LOC\r\n",
    "documents, four columns": (
        "-DOCSTART- -X- -X- O\n\nAnn NNP B-NP B-PER\nsleeps VB B-VP O\n. . O O\n\n-DOCSTART- -X- O O\n\n"
        "In IN B-PP O\nRome NNP B-NP B-LOC\n"
    ),
    "a document's line alone between": "Ann\tB-PER\nsleeps\tO\n.\tO\n-DOCSTART-\tO\nIn\tO\nRome\tB-LOC\n",
    "comments": "# id = 1\nAnn\tB-PER\nsleeps\tO\n.\tO\n\n# id = 2\nIn\tO\nRome\tB-LOC\n",
}


@pytest.mark.parametrize("case", COLUMNS)
def test_words_in_lines(tmp_path, case):
    (tmp_path / "a.conll").write_bytes(COLUMNS[case].encode())
    found = read_tagged(str(tmp_path / "a.conll"))
    assert (found.words, found.tags) == (TOKENS, TAGS)


def test_the_columns_are_chosen(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text("# text = Ann .\n1\tAnn\tann\tPROPN\t_\n2\t.\t.\tPUNCT\t_\n")
    assert read_tagged(str(path), "2", "4")[:2] == ([["Ann", "."]], [["PROPN", "PUNCT"]])
    assert read_tagged(str(path), "-4", "-2")[:4] == ([["Ann", "."]], [["PROPN", "PUNCT"]], [f"{path}:2"], ("2", "4"))


def test_signs_are_words(tmp_path):
    (tmp_path / "a.txt").write_text('#\tO\n"\tO\n#tag\tB-x\nNew York\tB-y\n')
    assert read_tagged(str(tmp_path / "a.txt"))[:2] == ([["#", '"', "#tag", "New York"]], [["O", "O", "B-x", "B-y"]])
    (tmp_path / "b.txt").write_text("# O\n中 B-地\n")
    assert read_tagged(str(tmp_path / "b.txt"))[:2] == ([["#", "中"]], [["O", "B-地"]])


def test_records(tmp_path):
    rows = [{"id": 1, "tokens": a, "ner_tags": b} for a, b in zip(TOKENS, TAGS, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        found = read_tagged(str(tmp_path / name))
        assert found[:4] == (TOKENS, TAGS, [f"{tmp_path}/{name}:{at}" for at in (1, 2)], ("tokens", "ner_tags"))
    # A string is its characters.
    (tmp_path / "zh.jsonl").write_text(json.dumps({"text": "在北京", "labels": ["O", "B-地", "I-地"]}))
    assert read_tagged(str(tmp_path / "zh.jsonl"))[:2] == ([["在", "北", "京"]], [["O", "B-地", "I-地"]])


def test_numbers_of_a_data_set_are_named(tmp_path):
    names = ["O", "B-PER", "B-LOC"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    numbers = [[names.index(tag) for tag in tags] for tags in TAGS]
    datasets.Dataset.from_dict({"tokens": TOKENS, "ner_tags": numbers}, features).save_to_disk(tmp_path / "set")
    found = read_tagged(f"hf:{tmp_path}/set")
    assert (found.words, found.tags, len(found.fingerprint)) == (TOKENS, TAGS, 64)


def test_an_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("北 B-地\n京 I-地\n，用 O\n".encode("gb18030") * 40)
    with pytest.raises(UserError, match=r"it looks like GB18030.*iconv -f GB18030"):
        read_tagged(str(tmp_path / "a.txt"))
    assert read_tagged(str(tmp_path / "a.txt"), encoding="gb18030").tags[0][:2] == ["B-地", "I-地"]


def test_wnut17(shared_data):
    """As many words as lines with two columns and no others; empty lines that hold a tab end a sentence."""
    for name, sentences in (("dev", 1_009), ("train", 3_394)):
        path = shared_data / "wnut17" / f"{name}.conll"
        lines = [line.split("\t") for line in path.read_text().split("\n")]
        found = read_tagged(str(path))
        assert sum(map(len, found.words)) == sum(len(line) == 2 and line != ["", ""] for line in lines)
        assert len(found.words) == sentences
        assert len({tag for tags in found.tags for tag in tags}) == 13


BAD = {
    "one column": ("a.conll", "Ann\nsleeps\n", "a.conll:1: one column of both words and tags"),
    "a line without tag": ("a.conll", "Ann B-PER\nsleeps\n", "a.conll:2: 1 column, and the lines before have 2 "),
    "a line with more": ("a.conll", "Ann\tO\nsleeps\tO\tO\n", r"a.conll:2: 3 columns.*\(tabs separate them\)"),
    "no tag": ("a.conll", "Ann\tO\nsleeps\t\n", "a.conll:2: no tag; correct"),
    "no word": ("a.conll", "Ann\tO\n\tO\n", "a.conll:2: no word; correct"),
    "empty": ("a.conll", "\n\t\n", "a.conll holds no sentences"),
    "empty records": ("a.jsonl", "", "a.jsonl holds no sentences"),
    "fewer tags": ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', "a.jsonl:1: 2 words under 'tokens' and 1 tags"),
    "numbers": ("a.jsonl", '{"tokens": ["a"], "tags": [3]}', "a.jsonl:1: a list of numbers under 'tags'; write the"),
    "no list": ("a.jsonl", '{"tokens": ["a"], "tags": null}', "a.jsonl:1: no list of strings under 'tags'"),
    "no field": ("a.jsonl", '{"tokens": ["a"], "mine": ["O"]}', "no field of tags .* 'tokens', 'mine': .*--data.tags"),
    "half a character": ("a.jsonl", '{"tokens": ["\\ud800"], "tags": ["O"]}', "a.jsonl:1: half a surrogate pair"),
    "not there": ("a.conll", None, "no file .*a.conll"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_named_in_one_line(tmp_path, case):
    name, content, words = BAD[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read_tagged(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tokens, tags, words",
    [
        ("word", None, "no column 'word'; columns of words and tags have numbers, here 1 to 2"),
        (None, "3", "no column 3; there are 2"),
        ("1", "-2", "one column of both"),
        ("0", None, "no column '0'"),
    ],
)
def test_a_column_that_is_not_there(tmp_path, tokens, tags, words):
    (tmp_path / "a.conll").write_text("Ann\tO\n")
    with pytest.raises(UserError, match=words):
        read_tagged(str(tmp_path / "a.conll"), tokens, tags)
