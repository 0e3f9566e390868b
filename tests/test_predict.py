"""`predict`: what a model answers about the rows of files, beside what transformers answers, and what is refused."""

import csv
import dataclasses
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import transformers as hf
from tiny_models import BERT, random_params

import espalier
from espalier import cli
from espalier.commands import predict
from espalier.commands.predict import PredictConfig, PredictData, fields
from espalier.data.rows import Rows
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.hub import save_pretrained
from espalier.predict.fill import MASKS
from espalier.predict.use import Use, checked

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENGLISH = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun by the old stone wall "
CHINESE = "巴黎是法国的首都，人们喜欢在河边散步。我们今天去看大海，明天回家。"
TEXTS = ["the lazy dog", "fox jumps over the old stone wall by the cat", "", "人们喜欢大海", "the sun, the sun"]
LABELS = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A classifier and a masked LM of English and Chinese, in folders of Hugging Face format."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([ENGLISH * 20, CHINESE * 20], "wordpiece", 300)
    config = dataclasses.replace(BERT, vocab_size=vocabulary_size(tokenizer), labels=LABELS)
    for head in ("sequence_classification", "masked_lm"):
        params = random_params(config, (head,))
        save_pretrained(root / head, config, params, tokenizer, head=head)
    return root


@pytest.fixture
def ask(capsys):
    """ask(*arguments) → (the exit code, standard output, standard error) of `predict`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.run_config(predict.main, PredictConfig, prog="predict", argv=[str(one) for one in arguments])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def as_jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


FILES = {
    "x.txt": "\n".join(TEXTS) + "\n",
    "x.jsonl": as_jsonl({"text": text, "id": number} for number, text in enumerate(TEXTS)),
    "x.tsv": "id\tsentence\n" + "".join(f"{number}\t{text}\n" for number, text in enumerate(TEXTS)),
    "x.csv": "id,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS)),
    "semicolons.csv": "id;text\n" + "".join(f"{number};{text}\n" for number, text in enumerate(TEXTS)),
}


@pytest.fixture(scope="module")
def expected(models):
    """Label → probability of each text, by transformers."""
    classifier = hf.pipeline("text-classification", str(models / "sequence_classification"), top_k=None)
    return [{one["label"]: one["score"] for one in row} for row in classifier(TEXTS)]


@pytest.mark.parametrize("name", FILES)
def test_labels_are_those_of_transformers_in_the_order_of_the_rows(models, expected, ask, tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    code, out, err = ask(f"hf:{models}/sequence_classification", "--data.files", tmp_path / name)
    assert code == 0 and f"classify: {len(TEXTS)} rows" in err
    for number, (row, want) in enumerate(zip(lines(out), expected, strict=True)):
        assert row["probabilities"] == pytest.approx(want, abs=1e-5)
        assert row["label"] == max(want, key=want.get) and row["probability"] == max(row["probabilities"].values())
        assert row.get("text", row.get("sentence")) == TEXTS[number]
        assert name == "x.txt" or str(row["id"]) == str(number)
    assert ("separated by semicolons" in err) == (name == "semicolons.csv")


def test_bad_rows_keep_their_place_and_do_not_stop_the_rest(models, ask, tmp_path):
    """A row too many columns wide, bytes that are not UTF-8, no text; a column that is called as a result."""
    table = tmp_path / "x.tsv"
    table.write_bytes(
        "sentence\tlabel\nthe fox\tdog\na\tb\tc\n你好".encode() + b"\tx\n" + "人们".encode("gb18030") + b"\ty\n"
    )
    code, out, err = ask(f"hf:{models}/sequence_classification", "--data.files", table)
    first, wide, chinese, gb = lines(out)
    assert code == 0 and "2 of 4 rows are bad" in err
    assert first["given_label"] == "dog" and first["label"] in LABELS and chinese["sentence"] == "你好"
    assert wide == {"line": f"{table}:3", "error": "3 columns, but the first line names 2"}
    assert gb["line"] == f"{table}:5" and "not valid UTF-8" in gb["error"]
    assert f"bad row: {table}:3: 3 columns" in err

    kept = tmp_path / "out.jsonl"
    kept.write_text("as it was")
    code, out, err = ask(f"hf:{models}/sequence_classification", "--data.files", table, "--strict", "--output", kept)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith(f"error: {table}:3: 3 columns")
    assert kept.read_text() == "as it was" and {path.name for path in tmp_path.iterdir()} == {"x.tsv", "out.jsonl"}


def test_csv_holds_what_jsonl_holds(models, ask, tmp_path):
    """Also where rows have different fields: what is no string or number is JSON in its cell."""
    rows = [{"text": 'the dog, "old"\nand warm'}, {"text": "巴黎", "id": 7}, {"id": 8}]
    (tmp_path / "x.jsonl").write_text(as_jsonl(rows))
    model = f"hf:{models}/sequence_classification"
    for name in ("o.jsonl", "o.csv"):
        code, out, _ = ask(model, "--data.files", tmp_path / "x.jsonl", "--output", tmp_path / name, "--json")
        assert code == 0 and json.loads(out) | {"seconds": 0, "output": 0} == {
            "use": "classify", "rows": 3, "bad": 1, "cut": 0, "output": 0, "seconds": 0,
        }  # fmt: skip
    want = lines((tmp_path / "o.jsonl").read_text())
    found = list(csv.DictReader(io.StringIO((tmp_path / "o.csv").read_text())))
    for row, cells in zip(want, found, strict=True):
        strings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
        assert {name: cell for name, cell in cells.items() if cell} == strings


def test_masks_are_filled_as_transformers_fills_them(models):
    loaded = espalier.load(f"hf:{models}/masked_lm")
    pipeline = hf.pipeline("fill-mask", str(models / "masked_lm"), top_k=4)
    texts = ["the quick [MASK] fox", "巴黎是[MASK]国的首[MASK]，", "[MASK] " * (MASKS + 3) + "the end"]
    for text, found in zip(texts, loaded.fill(texts, top_k=4), strict=True):
        guesses = pipeline(text)
        guesses = guesses if isinstance(guesses[0], list) else [guesses]
        assert len(found["masks"]) == len(guesses) == text.count("[MASK]")
        for ours, theirs in zip(found["masks"], guesses, strict=True):
            assert [one["id"] for one in ours] == [one["token"] for one in theirs]
            assert [one["token"] for one in ours] == [one["token_str"] for one in theirs]
            assert [one["probability"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-5)
        assert "[MASK]" not in found["filled"]
    (found,) = loaded.fill(texts[1], 1)
    first, second = (mask[0]["token"].removeprefix("##") for mask in found["masks"])
    assert found["filled"] == f"巴黎是{first}国的首{second}，"
    for text, top_k, words in [
        ("no mask", 5, "no [MASK] in 'no mask'"),
        ("[MASK] " + "fox " * 80, 5, "at most 64 are read"),
        ("[MASK]", 0, "top_k is a number from 1 to"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            loaded.fill(text, top_k)


@pytest.mark.parametrize("given", ["jsonl", "txt"])
def test_standard_input_and_masks(models, ask, monkeypatch, given):
    text = "the [MASK] dog"
    stdin = io.BytesIO((as_jsonl([{"satz": text}]) if given == "jsonl" else f"{text}\n").encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(stdin)))
    more = ["--data.columns", "text=satz"] if given == "jsonl" else []
    code, out, err = ask(f"hf:{models}/masked_lm", "--data.files", "-", "--data.values", "top_k=2", *more)
    (row,) = lines(out)
    assert code == 0 and len(row["masks"][0]) == 2 and "fill: 1 rows" in err


def test_what_cannot_be_done_is_refused_in_one_line(models, ask, tmp_path):
    files = {
        "wide.tsv": "a\tb\tc\n1\t2\t3\n",
        "headless.csv": "the dog sleeps in the sun.,1\nthe fox jumps over a wall.,0\n",
        "utf16.csv": "text\nthe dog\n",
        "gb.txt": f"{CHINESE}\n" * 3,
        "x.xlsx": "",
        "json.csv": '{"text": "a"}\n',
        "empty.jsonl": "",
    }
    for name, text in files.items():
        encoding = {"utf16.csv": "utf-16", "gb.txt": "gb18030"}.get(name, "utf-8")
        (tmp_path / name).write_text(text, encoding=encoding)
    model = f"hf:{models}/sequence_classification"
    for name, more, words in [
        ("wide.tsv", [], "no text: a row has text, or text and text_b, and this one a, b, c"),
        ("wide.tsv", ["--data.text", "d"], "no column 'd'; there are 'a', 'b', 'c'"),
        ("wide.tsv", ["--data.columns", "text"], "is not FIELD=COLUMN"),
        ("headless.csv", [], "the first line looks like data"),
        ("utf16.csv", [], "iconv -f UTF-16"),
        ("gb.txt", [], "iconv -f GB18030"),
        ("x.xlsx", [], "unknown kind of file"),
        ("json.csv", [], "holds JSON"),
        ("empty.jsonl", [], "there are no rows"),
        ("none.csv", [], "no file"),
        ("gb.txt", ["--output", "x.pdf"], "unknown kind of file; predictions are written as"),
        ("gb.txt", ["--output", tmp_path / "no" / "x.csv"], "is no folder"),
        ("gb.txt", ["--output", tmp_path / "x.npy"], ".npy holds embeddings, and this model does classify"),
        ("gb.txt", ["--use", "guess"], "no use 'guess'; there are "),
        ("gb.txt", ["--json"], "give --output F too"),
        ("gb.txt", ["--data.max-length", 100], "must lie between 8 and the model's 64"),
    ]:
        code, out, err = ask(model, "--data.files", tmp_path / name, *more)
        error = err.splitlines()[-1]
        assert (code, out) == (2, "") and error.startswith("error: ") and words in error, (name, err)
    code, out, _ = ask(model, "--data.files", tmp_path / "gb.txt", "--data.encoding", "gb18030")
    assert code == 0 and lines(out)[0]["text"] == CHINESE


VECTORS = Use(
    name="embed",
    takes="text",
    reads=lambda row: row["text"],
    answers=lambda model, inputs: [{"embedding": [len(text), 0.5]} for text in inputs],
)


def test_embeddings_become_an_array_with_a_row_for_each(models, ask, tmp_path, monkeypatch):
    monkeypatch.setattr("espalier.predict.use.use_of", lambda model: VECTORS)
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\nnot json\n{"text": "人们"}\n')
    output = tmp_path / "x.npy"
    code, _, err = ask(f"hf:{models}/masked_lm", "--data.files", tmp_path / "x.jsonl", "--output", output)
    assert code == 0, err
    np.testing.assert_array_equal(np.load(output), np.float32([[3, 0.5], [np.nan, np.nan], [2, 0.5]]))


def test_an_interrupted_prediction_leaves_the_file_as_it_was(models, ask, tmp_path, monkeypatch):
    """The second chunk is interrupted, when rows of the first are written."""
    calls = []

    def answers(model, inputs):
        calls.append(len(inputs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [{"embedding": [1]} for _ in inputs]

    monkeypatch.setattr("espalier.predict.use.use_of", lambda model: dataclasses.replace(VECTORS, answers=answers))
    (tmp_path / "x.txt").write_text("a\n" * 500)
    for name in ("x.npy", "x.csv", "x.jsonl"):
        calls.clear()
        (tmp_path / name).write_text("as it was")
        code, _, err = ask(f"hf:{models}/masked_lm", "--data.files", tmp_path / "x.txt", "--output", tmp_path / name)
        assert code == 130 and err.splitlines()[-1] == "interrupted" and len(calls) == 2
        assert (tmp_path / name).read_text() == "as it was"
    assert len(list(tmp_path.iterdir())) == 4


def test_rows_are_read_as_they_are_answered(tmp_path):
    """Of a large file no more is held than a chunk, and how far it is is known."""
    path = tmp_path / "x.csv"
    path.write_text("text\n" + "the dog\n" * 40_000)
    rows, asked = Rows([str(path)]), []
    model = type("Model", (), {})()
    use = dataclasses.replace(VECTORS, answers=lambda model, inputs: [asked.append(len(inputs)) or {}] * len(inputs))
    chunks = predict.answered(rows, PredictConfig("run", data=PredictData((str(path),))), model, use)
    next(chunks)
    assert sum(asked) == predict.FEWEST and 0 < rows.share < 0.2
    assert sum(map(len, chunks)) == 40_000 - predict.FEWEST and rows.share == 1


def test_sentences_in_columns_and_nested_questions_are_rows(tmp_path):
    """As `finetune tag` and `finetune answer` read them, labelled or not; a bad sentence keeps its place."""

    def rows(name, content, kind=None):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        found = [*Rows([str(tmp_path / name)], kind)]
        return [(row.name.removeprefix(f"{tmp_path}/"), getattr(row, "values", row[-2])) for row in found]

    tagged = "\ufeff# a comment\r\nAnn\tNNP\tB-x\r\n#\tSYM\tO\r\n\r\n-DOCSTART-\tX\tO\n\n你\tN\tB-x\n"
    for name in ("a.conll", "a.iob", "a.bio"):
        assert rows(name, tagged) == [
            (f"{name}:2", {"tokens": ["Ann", "#"], "2": ["NNP", "SYM"], "tags": ["B-x", "O"]}),
            (f"{name}:7", {"tokens": ["你"], "2": ["N"], "tags": ["B-x"]}),
        ]
    assert rows("b.txt", "Ann\n\nsleeps\nwell\n", "conll") == [
        ("b.txt:1", {"tokens": ["Ann"]}),
        ("b.txt:3", {"tokens": ["sleeps", "well"]}),
    ]
    bad = rows("c.conll", b"a O\n\nb O\nc\n\nd\xff O\ne O\n\nf O\n")
    assert [name for name, _ in bad] == ["c.conll:1", "c.conll:4", "c.conll:6", "c.conll:9"]
    assert bad[1][1] == "1 column, and the first line has 2" and "0xff" in bad[2][1] and bad[3][1]["tokens"] == ["f"]
    gold = {"answers": [{"text": "Ann", "answer_start": 0}]}
    asked = [{"id": "x", "question": "Who?", **gold}, {"id": "y", "question": "为什么？"}]
    nested = {"version": "2", "data": [{"title": "t", "paragraphs": [{"context": "Ann.", "qas": asked}]}]}
    flat = [{"title": "t", "context": "Ann.", **question} for question in asked]
    expected = [(f"d.json: paragraph 1: question {name}", row) for name, row in zip("xy", flat, strict=True)]
    assert rows("d.json", json.dumps(nested)) == expected
    assert (
        [row for _, row in rows("e.json", json.dumps(flat))]
        == flat
        == [row for _, row in rows("f.json", as_jsonl(flat))]
    )
    nested["data"][0]["paragraphs"].append({"context": "b", "qas": None})
    assert rows("g.json", json.dumps(nested))[2] == (
        "g.json: paragraph 2",
        "qas is NoneType; expected a list of objects",
    )


def test_a_bad_input_among_many_is_found_by_halves():
    calls = []

    def answers(model, inputs):
        calls.append(len(inputs))
        if "bad" in inputs:
            raise UserError("bad")
        return [{"of": one} for one in inputs]

    inputs = ["a"] * 37 + ["bad"] + ["b"] * 90
    found = checked(dataclasses.replace(VECTORS, answers=answers), None, inputs)
    assert [str(one) if isinstance(one, UserError) else one["of"] for one in found] == inputs
    assert len(calls) <= 15


def test_what_is_too_long_is_counted_and_said(models, ask, tmp_path):
    (tmp_path / "x.txt").write_text("the fox\n" + "the " * 30 + "\n" + "dog " * 11 + "\n")
    code, out, err = ask(
        f"hf:{models}/sequence_classification", "--data.files", tmp_path / "x.txt", "--data.max-length", 12, "--json",
        "--output", tmp_path / "o.jsonl",
    )  # fmt: skip
    # Of 12 places two are for [CLS] and [SEP]: 20 tokens of the second text are lost and one of the third.
    assert code == 0 and json.loads(out)["cut"] == 2
    assert "2 inputs had more than 12 tokens and lost 21 of them at the end of a text (--data.max-length)" in err


def test_nothing_is_lost_by_what_stands_in_a_row(models, ask, tmp_path):
    """Half a surrogate pair, in a text and beside it; a carriage return within a cell; a row of empty cells."""
    model = f"hf:{models}/sequence_classification"
    (tmp_path / "x.jsonl").write_text(
        '{"text": "the dog"}\n{"text": "\\ud800 x"}\n{"text": "a\\rb", "id": "\\udfff"}\n'
    )
    for name in ("o.jsonl", "o.csv"):
        code, _, err = ask(model, "--data.files", tmp_path / "x.jsonl", "--output", tmp_path / name)
        assert code == 0 and "2 of 3 rows are bad" in err
    assert [row["text"] for row in lines((tmp_path / "o.jsonl").read_text())] == ["the dog", "\ud800 x", "a\rb"]
    with open(tmp_path / "o.csv", newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["the dog", "\\ud800 x", "a\rb"]
    (tmp_path / "x.tsv").write_text("text\ttext_b\nthe\tdog\n\t\nfox\tcat\n")
    assert [row["text"] for row in lines(ask(model, "--data.files", tmp_path / "x.tsv")[1])] == ["the", "", "fox"]


def test_what_was_there_stays_where_nothing_can_be_written(models, ask, tmp_path):
    model, kept = f"hf:{models}/sequence_classification", tmp_path / "o.jsonl"
    kept.write_text("as it was")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "old.txt").write_bytes(b"the dog\rthe fox\r")
    (tmp_path / "text.txt").write_text("the dog\n")
    for arguments, said in (
        (("--data.files", tmp_path / "empty.txt", "--output", kept), "there are no rows"),
        (("--data.files", tmp_path / "old.txt", "--output", kept), "end in a carriage return alone"),
        (("--data.files", tmp_path / "text.txt", "--output", tmp_path), "unknown kind of file"),
        (("--data.files", tmp_path / "text.txt", "--strict"), "give --output F too"),
    ):
        code, _, err = ask(model, *arguments)
        assert code == 2 and said in err.splitlines()[-1], err
    (tmp_path / "folder.csv").mkdir()
    code, _, err = ask(model, "--data.files", tmp_path / "text.txt", "--output", tmp_path / "folder.csv")
    assert code == 2 and "is a folder; name a file in it" in err and kept.read_text() == "as it was"


def test_columns_are_found_by_their_names_and_by_flags():
    row = {"sentence1": "a", "sentence2": "b", "frage": "c"}
    assert fields(row, PredictData(("f",))) == row | {"text": "a", "text_b": "b"}
    assert fields(row, PredictData(("f",), text=("frage",)))["text"] == "c"
    named = fields(row, PredictData(("f",), columns=("question=frage",), values=("top_k=3",)))
    assert named["question"] == "c" and named["top_k"] == "3"
    # The only column is the text, if it holds one; under the name of a text a number is one too, as in training.
    assert fields({"a": "b"}, PredictData(("f",)))["text"] == "b"
    assert "text" not in fields({"a": 3}, PredictData(("f",)))
    assert fields({"text": 3, "n": 4}, PredictData(("f",)))["text"] == "3"


def test_neither_pytorch_nor_tensorflow_is_needed(models, tmp_path):
    """In a process of its own, where neither can be imported."""
    (tmp_path / "x.txt").write_text("the dog\n")
    code = (
        "import sys\nsys.modules |= {'torch': None, 'tensorflow': None}\n"
        "from espalier.commands.predict import PredictConfig, PredictData, main\n"
        f"main(PredictConfig('hf:{models}/sequence_classification', data=PredictData(('{tmp_path}/x.txt',))))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and lines(result.stdout)[0]["label"] in LABELS, result.stderr
