"""Reading text files, telling the user what is wrong with them, and splitting off the validation part."""

import dataclasses
import gzip
import json
import pathlib

import pytest

from espalier import cli
from espalier.data.config import DataConfig
from espalier.data.documents import Document, documents
from espalier.data.sources import FileSource, open_sources, split_validation
from espalier.errors import UserError
from espalier.training.identity import identity
from mlm.presets import PRESETS


class Texts:
    """A source of given texts."""

    def __init__(self, *texts):
        self.texts = texts

    def __iter__(self):
        return (Document(text, str(number)) for number, text in enumerate(self.texts))

    def fingerprint(self):
        return str(hash(self.texts))

    def size(self):
        return sum(map(len, self.texts))


def write(path: pathlib.Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def texts(source) -> list[str]:
    return [document.text for document in documents(source)]


def test_reads_every_kind_of_file_in_order(tmp_path):
    write(tmp_path / "b.txt", "\ufeffzwei\r\nZeilen")
    write(tmp_path / "a.jsonl", '{"text": "eins"}\n\n{"text": "  "}\n{"text": "noch eins", "id": 3}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "gepackt"}\n'))
    source = FileSource((f"{tmp_path}/*.txt", f"{tmp_path}/*.jsonl*", f"{tmp_path}/b.txt"))
    assert texts(source) == ["eins", "noch eins", "zwei\nZeilen", "gepackt"] == texts(source)
    assert [document.name.rsplit("/")[-1] for document in documents(source)] == [
        "a.jsonl:1",
        "a.jsonl:4",
        "b.txt",
        "c.jsonl.gz:1",
    ]


def test_another_field(tmp_path):
    assert texts(FileSource((write(tmp_path / "a.jsonl", '{"body": "x", "text": 1}'),), "body")) == ["x"]


def test_a_name_with_brackets_is_no_glob(tmp_path):
    assert texts(FileSource((write(tmp_path / "a[1].txt", "here"),))) == ["here"]


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no file matches .*nothing"):
        FileSource((f"{tmp_path}/nothing*.txt",))
    with pytest.raises(UserError, match=r"is a folder; name its files"):
        FileSource((str(tmp_path),))
    with pytest.raises(UserError, match="--data.files"):
        open_sources(DataConfig())


def test_a_file_on_both_sides_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    with pytest.raises(UserError, match="also training files"):
        open_sources(DataConfig(files=(f"{tmp_path}/*",), validation_files=(path,)))


def test_fingerprint_follows_content_not_place(tmp_path):
    (tmp_path / "x").mkdir()
    here = FileSource((write(tmp_path / "a.txt", "text"),)).fingerprint()
    assert here == FileSource((write(tmp_path / "x" / "b.txt", "text"),)).fingerprint()
    assert here != FileSource((write(tmp_path / "x" / "b.txt", "texT"),)).fingerprint()


def test_whoever_expands_a_glob_the_setting_is_the_same(tmp_path, monkeypatch):
    """As the shell hands them over, unquoted and in any locale's order, and as written in quotes; from anywhere."""
    for name in ("text/a.txt", "text/B.txt", "text/é.txt", "text/a[1].txt", "more/c.txt", "here/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, f"the text of {name}")
    shell = sorted((str(path.relative_to(tmp_path)) for path in (tmp_path / "text").iterdir()), key=str.lower)
    parsed = []

    def parse(*spelled, flag="--data.files"):
        cli.run(lambda config, call: parsed.append(config), PRESETS, "mlm", "", ["debug", flag, *spelled])
        config = parsed[-1]
        sources = open_sources(config.data)
        found = {side: {name: s.fingerprint() for name, s in part.items()} for side, part in sources._asdict().items()}
        return identity(json.loads(json.dumps(dataclasses.asdict(config)))), found, len(texts(sources.train["text"]))

    monkeypatch.chdir(tmp_path)
    quoted = parse("text/*.txt")
    assert quoted[2] == 4
    for spelled in (
        shell,
        shell[::-1],
        ["./text/*.txt"],
        [f"{tmp_path}/text/*.txt"],
        ["text/*.txt", "text/a.txt", "./text/a.txt", f"{tmp_path}/text/B.txt"],
        ["text//../text/[!z]*.txt"],
        ["text/é.txt", "./text/a*.txt", f"{tmp_path}/text/B.txt"],
    ):
        assert parse(*spelled) == quoted, spelled
    # Two folders, of which one is named from outside: still in the order of their full names.
    monkeypatch.chdir(tmp_path / "here")
    several = parse("../more/c.txt", "d.txt", "../text/B.txt")
    monkeypatch.chdir(tmp_path)
    assert parse("text/B.txt", "more/c.txt", "here/d.txt") == several
    assert parse("text=text/*.txt", flag="--data.sources") == quoted
    assert parse("text=text/a.txt", *(f"text={name}" for name in shell), flag="--data.sources") == quoted
    assert parse("text/a.txt")[1] != quoted[1]


def test_many_documents_are_split_whole_and_by_content():
    documents = [f"document {number % 1900} with some text" for number in range(2000)]
    train, validation = map(texts, split_validation(Texts(*documents), 0.05))
    assert sorted(train + validation) == sorted(documents)
    assert not set(train) & set(validation), "equal documents must fall on one side"
    assert 0.035 < len(validation) / 2000 < 0.065
    # The same text stays on its side when other documents come and go.
    fewer = texts(split_validation(Texts(*documents[::2]), 0.05)[1])
    assert fewer == [text for text in documents[::2] if text in set(validation)]


@pytest.mark.parametrize("fraction", [0.02, 0.3])
def test_few_documents_lose_their_tails(fraction):
    lines = [f"line {number} of the only document" for number in range(500)]
    source = Texts("\n".join(lines), " ".join(lines))
    train, validation = split_validation(source, fraction)
    for whole, kept, held_out in zip(texts(source), texts(train), texts(validation), strict=True):
        assert kept + held_out == whole
        assert kept[-1] in "\n ", "a word was cut"
        assert fraction * 0.95 < len(held_out) / len(whole) < 2 * fraction
    assert train.fingerprint() != validation.fingerprint()


@pytest.mark.parametrize("count", [20, 99, 199])
def test_of_few_short_documents_whole_ones_are_held_out(count):
    documents = [f"document {number} is a short line of text" for number in range(count)]
    train, validation = map(texts, split_validation(Texts(*documents), 0.05))
    assert sorted(train + validation) == sorted(documents)
    assert count * 0.05 <= len(validation) <= count * 0.05 + 1


def test_text_without_blanks_is_cut_at_its_share():
    source = Texts("字" * 100_000)
    train, validation = map(texts, split_validation(source, 0.02))
    assert (len(train[0]), len(validation[0])) == (98_000, 2_000)


def test_tiny_text_is_not_cut():
    train, validation = split_validation(Texts("word"), 0.02)
    assert (texts(train), texts(validation)) == (["word"], [])


def test_real_books_as_one_file_and_as_lines(shared_data, tmp_path):
    book = shared_data / "tinyshakespeare" / "input.txt"
    (train,), (validation,) = (side.values() for side in open_sources(DataConfig(files=(str(book),))))
    assert "".join(texts(train) + texts(validation)) == book.read_text()
    assert 0.015 < len(texts(validation)[0]) / book.stat().st_size < 0.03
    lines = [line for line in book.read_text().splitlines() if line.strip()]
    path = write(tmp_path / "lines.jsonl", "\n".join(json.dumps({"text": line}) for line in lines))
    (train,), (validation,) = (side.values() for side in open_sources(DataConfig(files=(path,))))
    assert len(texts(train)) + len(texts(validation)) == len(lines)
    assert 0.01 < len(texts(validation)) / len(lines) < 0.03


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("a=0.5,b=0.5,a=0.1", "names a more than once"),
        ("a=0.5,b=0.5,b=0.5", "names b more than once"),
        ("a=0.5,c=0.5", "names a, c, and data.sources a, b"),
        ("a=0.5,b=0", "'b=0' is not NAME=SHARE"),
        ("a=0.5,b=many", "'b=many' is not NAME=SHARE"),
    ],
)
def test_shares_that_make_no_mixture(mixture, message):
    with pytest.raises(UserError, match=message):
        DataConfig(sources=("a=a.txt", "b=b.txt"), mixture=mixture)


def test_shares_are_of_their_sum():
    assert DataConfig(sources=("a=a.txt", "b=b.txt"), mixture="b=1, a=3").weights() == {"a": 0.75, "b": 0.25}
