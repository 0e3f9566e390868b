"""What a classifier reads: files in whatever encoding, labels of whatever kind, and what it says of them."""

import dataclasses

import pytest
from labelled_words import ENCODER, config_for, make_runs, write_jsonl

from espalier.data.tokenizer import load_tokenizer
from espalier.errors import UserError
from espalier.training.identity import identity
from finetune.tasks.classify.examples import describe_examples, read_examples
from finetune.tasks.classify.labels import in_order
from finetune.tasks.classify.record import ClassifyConfig, ClassifyData
from finetune.train import main


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("finetune"))


CHINESE = [("这部电影很好看，非常值得推荐给大家", "好评"), ("剧情太差了，浪费时间，不值得看", "差评")] * 4
CSV = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in CHINESE)
UNREADABLE = {
    "GBK": (CSV.encode("gbk"), r"it looks like GB18030 \(or GBK\); convert it with `iconv -f GB18030 -t UTF-8`"),
    "Big5": (
        "text\tlabel\n這部電影很好看\t好評\n劇情太差了，浪費時間\t差評\n音樂和畫面都很美\t好評\n".encode("big5"),
        "it looks like Big5; convert it with `iconv -f BIG5 -t UTF-8`",
    ),
    "UTF-16": (CSV.encode("utf-16"), "it looks like UTF-16LE; convert it with `iconv -f UTF-16LE -t UTF-8`"),
    "no header": (b"good\tpos\nbad\tneg\n", "there are 'good', 'pos'; if these are an example and not names, put"),
    "a sentence first": ("真的很好看。\t好评\n不好看\t差评\n".encode(), "the first line looks like data, not like"),
    "wide commas": ("文本，label\n好看，好评\n".encode(), "separated by '，', a sign of text; .* '文本,label'"),
    "names alone": (b"text\tlabel\n", "holds no rows"),
    "nothing": (b"", "holds no rows: it is empty"),
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_files_that_cannot_be_read_as_they_are_are_named(there, tmp_path, case, split):
    content, words = UNREADABLE[case]
    bad, good = tmp_path / "bad.tsv", tmp_path / "good.tsv"
    bad.write_bytes(content)
    good.write_text(CSV)
    data = ClassifyData(**{"train": str(good), "validation": str(good)} | {split: str(bad)})
    with pytest.raises(UserError, match=words) as error:
        main(config_for(there, tmp_path / "run", data=data))
    assert "bad.tsv" in str(error.value) and "\n" not in str(error.value) and "latin" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_texts_that_are_cut_are_counted(there, tmp_path):
    """A word is a token here, and [CLS] and [SEP] stand around them: 14 fit."""
    rows = [{"text": " ".join(["we"] * count), "label": str(count % 2)} for count in (3, 14, 15, 20)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(there.encoder / "tokenizer")
    facts = read_examples(ClassifyData(train=path, validation=path), tokenizer, ENCODER).facts
    assert facts[1:] == (
        f"{path}: 2 of 4 examples are longer than 16 tokens, the longest by 6; their ends were cut off",
    )


def test_labels_have_one_order(there, tmp_path):
    """By number where all are numbers, equal ones by their text: never by the seed of Python's hashes."""
    for labels, order in (
        ("10 9 1 1.0 01", ["01", "1", "1.0", "9", "10"]),
        ("b nan 2 inf", ["2", "b", "inf", "nan"]),
        ("nan 3 20", ["20", "3", "nan"]),
    ):
        rows = [{"sentence": "a crow", "label": label} for label in labels.split()]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        tokenizer = load_tokenizer(there.encoder / "tokenizer")
        assert read_examples(ClassifyData(train=path, validation=path), tokenizer, ENCODER).names == order


def examples_of(there, tmp_path, labels, **settings):
    rows = [{"sentence": f"a crow {number}", "score": label} for number, label in enumerate(labels)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = ClassifyData(train=path, validation=path, label="score", **settings)
    return read_examples(data, load_tokenizer(there.encoder / "tokenizer"), ENCODER)


NO_CLASSES = {
    "a number of each row": (list(range(60)), "60 different values in 60 examples .*identifier or a text"),
    "a text of each row": ([f"text {number}" for number in range(60)], "60 different values in 60 examples"),
}


NUMBERS = {
    "similarity": ([round(number / 10, 1) for number in range(51)] * 4, "from 0 to 5, among them decimals (0.1, 0.2, "),
    "half stars": ([0.5, 1.0, 1.5] * 20, "from 0.5 to 1.5, among them decimals (0.5, 1.5); regression"),
    "decimal commas": (["3,8", "2,75", "4"] * 20, "from 2.75 to 4, among them decimals (2,75, 3,8)"),
    "prices": ([number * number for number in range(40)] * 10, "from 0 to 1521, 40 different ones; regression"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_never_taken_for_classes_in_silence(there, tmp_path, case):
    labels, words = NUMBERS[case]
    found = examples_of(there, tmp_path, labels)
    assert (
        found.kind == "numbers"
        and found.names == ["score"]
        and found.train.labels[0] == pytest.approx(float(str(labels[0]).replace(",", ".")))
    )
    assert words in found.facts[0] and "--data.label-kind classes takes each for a class" in found.facts[0]
    forced = examples_of(there, tmp_path, labels, label_kind="classes")
    assert forced.names == in_order(set(map(str, labels))) and forced.facts[0].endswith(f"{len(forced.names)} classes")


def test_lists_are_read_from_arrays_and_from_cells(there, tmp_path):
    arrays = examples_of(there, tmp_path, [["水果", "red"], ["red"], [], ["bird"]] * 3)
    assert arrays.kind == "lists" and arrays.names == ["bird", "red", "水果"]
    assert arrays.train.labels[:4] == [[0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert arrays.facts[0].startswith("labels: column 'score' holds lists; several of 3 labels may be right")
    # What is empty is no label, as in cells.
    assert examples_of(there, tmp_path, [["水果", ""], ["red"], [" "], ["bird"]] * 3).names == arrays.names
    for cells in (["水果|red", "red", "", "bird"], ["水果; red", "red", "", "bird"], ["水果,red", "red", "", "bird"]):
        found = examples_of(there, tmp_path, cells * 3, label_kind="lists")
        assert found.train.labels == arrays.train.labels and found.names == arrays.names
    with pytest.raises(UserError, match="'x' is not a finite number; correct it"):
        examples_of(there, tmp_path, ["1", "x"], label_kind="numbers")
    with pytest.raises(UserError, match="some cells are JSON arrays .* and others are not"):
        examples_of(there, tmp_path, ['["a"]', "b|c"], label_kind="lists")
    with pytest.raises(UserError, match="every example has the number 2"):
        examples_of(there, tmp_path, ["2", "2.0"], label_kind="numbers")


@pytest.mark.parametrize("case", NO_CLASSES)
def test_labels_that_are_no_classes_are_refused_unless_they_are_said_to_be(there, tmp_path, case):
    labels, words = NO_CLASSES[case]
    with pytest.raises(UserError, match=words) as error:
        examples_of(there, tmp_path, labels)
    message = str(error.value)
    assert "rows.jsonl, column 'score'" in message and "--data.label-kind classes" in message and "\n" not in message
    forced = examples_of(there, tmp_path, labels, label_kind="classes")
    assert sorted(forced.names) == sorted(set(map(str, labels)))


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1] * 20,
        [0, 1, 2, 3, 4] * 20,
        [1.0, 2.0, 3.0] * 20,
        [-1, 0, 1] * 20,
        [1, 10, 100] * 20,
        list(range(77)) * 10,
        [f"intent {number}" for number in range(150)] * 3,
        ["entailment", "neutral", "contradiction"],
        ["3.8a", "nan", "b"] * 10,
        [True, False] * 10,
    ],
)
def test_classes_are_classes(there, tmp_path, labels):
    assert len(examples_of(there, tmp_path, labels).names) == len(set(labels))


def test_what_was_read_is_said(there, tmp_path):
    found = examples_of(there, tmp_path, [1] * 1200 + [0] * 34)
    path = str(tmp_path / "rows.jsonl")
    assert found.facts == ("labels: column 'score' holds 2 classes",)
    assert describe_examples(ClassifyData(train=path, validation=path), found) == {
        "training": f"{path}: 1,234 examples, column 'sentence'",
        "validation": f"{path}: 1,234 examples",
        "labels": "2 classes in 'score': 1 1,200 (97.2 %), 0 34 (2.8 %)",
    }
    rows = "text;label\nein Spatz;Vogel\neine Säge;Gerät\n"
    (tmp_path / "rows.csv").write_bytes(rows.encode("cp1252"))
    files = dict.fromkeys(("train", "validation"), str(tmp_path / "rows.csv"))
    data = ClassifyData(**files, encoding="latin-1")
    found = read_examples(data, load_tokenizer(there.encoder / "tokenizer"), ENCODER)
    assert found.facts[1:] == (f"{tmp_path}/rows.csv: its columns are separated by semicolons; read as that",)
    assert describe_examples(data, found)["labels"] == "2 classes in 'label': Gerät 1 (50.0 %), Vogel 1 (50.0 %)"


def test_how_labels_were_allowed_is_not_what_a_run_is():
    """The classes are; so a run of an older version goes on where its labels are refused today, with the flag."""
    changes = (dict(label_kind="classes"), dict(encoding="gbk"))
    plain, *others = (
        identity(dataclasses.asdict(ClassifyConfig(data=ClassifyData(**change)))) for change in ({}, *changes)
    )
    assert [plain == other for other in others] == [True, False]
