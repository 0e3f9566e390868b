"""Encodings are recognised in real text, named so that iconv converts them, and read across the borders of blocks."""

import gzip
import json
import random
import re
import subprocess

import pytest
import zstandard

import espalier.data.recode
from espalier.data.config import DataConfig
from espalier.data.documents import Document, Reject, documents
from espalier.data.encodings import codec, detect, iconv_name, truth
from espalier.data.formats import read
from espalier.data.labelled import read_labelled
from espalier.data.prepare import prepare
from espalier.data.sources import FileSource, open_sources
from espalier.errors import UserError
from tests.manpages import man_texts

KOREAN = (
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 "
    "양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다. 모든 사람은 인종, 피부색, 성, 언어, 종교, "
    "정치적 또는 기타의 견해, 민족적 또는 사회적 출신, 재산, 출생 또는 기타의 신분과 같은 어떠한 종류의 "
    "차별이 없이, 이 선언에 규정된 모든 권리와 자유를 향유할 자격이 있다. "
)
RUSSIAN = (
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны "
    "поступать в отношении друг друга в духе братства. Каждый человек имеет право на жизнь, на свободу и на личную "
    "неприкосновенность. Никто не должен содержаться в рабстве или в подневольном состоянии. "
)
GERMAN = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen. Jeder hat Anspruch auf die in dieser Erklärung verkündeten "
    "Rechte und Freiheiten ohne irgendeinen Unterschied, etwa nach Überzeugung oder Vermögen, „ähnlich“ groß. "
)
FAMILIES = {
    "gb18030": ("zh", {"gb18030"}),
    "gbk": ("zh", {"gb18030"}),
    "big5": ("zh_TW", {"big5", "cp950", "big5hkscs"}),
    "shift_jis": ("ja", {"cp932", "shift_jis_2004"}),
    "cp932": ("ja", {"cp932"}),
    "euc_jp": ("ja", {"euc_jp", "euc_jis_2004"}),
    "iso2022_jp": ("ja", {"iso2022_jp_2"}),
    "cp949": ("ko", {"cp949"}),
    "utf-16-le": ("zh", {"utf-16-le"}),
    "utf-16-be": ("ja", {"utf-16-be"}),
    "utf-16": ("zh_TW", {"utf-16-le", "utf-16-be"}),
    "utf-32-be": ("zh", {"utf-32-be"}),
    "cp1251": ("ru", {"cp1251"}),
    "koi8_r": ("ru", {"koi8-r"}),
    "cp1252": ("de", {"cp1252"}),
}
"""Python's codec → a text, and what it may be named."""
SHORT = {"ko": KOREAN, "ru": RUSSIAN, "de": GERMAN}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Each of 100,000 characters or more that is mostly not ASCII."""
    return {name: "".join(man_texts(name)) for name in ("zh", "zh_TW", "ja")} | {
        name: text * (100_000 // len(text)) for name, text in SHORT.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_right_family_is_named(texts, name):
    """Of 200 pieces of 200 to 2,000 bytes, drawn from real text and cut anywhere, at least 99 %."""
    language, right = FAMILIES[name]
    draw = random.Random(name)
    found = []
    while len(found) < 200:
        begin, size = draw.randrange(len(texts[language]) - 2000), draw.choice([200, 500, 2000])
        piece = texts[language][begin : begin + 2000].encode(name, "ignore")[:size]
        if len(piece) == size and sum(byte > 0x7F or byte in (0, 0x1B) for byte in piece) > size // 50:
            found.append(detect(piece).codec)
    assert sum(one in right for one in found) >= 198, {one: found.count(one) for one in set(found)}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gbk", "shift_jis")])
def test_the_line_of_iconv_converts_it(texts, tmp_path, name):
    """The advice that people are given, followed: its output is the text."""
    language, _ = FAMILIES[name]
    text = texts[language][:3000].encode(name, "ignore").decode(name)
    (tmp_path / "a.txt").write_bytes(text.encode(name))
    (reject,) = read(str(tmp_path / "a.txt"), "text", 10**6)
    assert isinstance(reject, Reject) and reject.kind == "utf-8" and "\n" not in reject.message
    command = re.search(r"`(iconv -f (\S+) -t UTF-8)`", reject.message)
    assert command, reject.message
    done = subprocess.run([*command[1].split(), tmp_path / "a.txt"], capture_output=True, check=True)
    assert done.stdout.decode().removeprefix("\ufeff") == text
    # And the flag reads the same.
    given = re.search(r"--data.encoding ([\w-]+)", reject.message)
    assert given
    *marks, document = read(str(tmp_path / "a.txt"), "text", 10**6, codec(given[1]))
    assert isinstance(document, Document) and document.text == text
    assert [mark.kind for mark in marks if isinstance(mark, Reject)] == ["bom"] * (name == "utf-16")


@pytest.mark.parametrize(
    ("language", "name"), [("zh", "gb18030"), ("ja", "cp932"), ("ja", "euc_jp"), ("zh_TW", "big5")]
)
def test_a_few_characters_are_read_as_what_they_are(texts, language, name):
    """Of 2 to 15 characters that are UTF-8, or what was said: at least 98 % right, both ways."""
    draw = random.Random(0)
    characters = "".join(character for character in texts[language] if character > "\x7f")
    wrong = []
    for _ in range(500):
        begin, size = draw.randrange(len(characters) - 15), draw.randint(2, 15)
        text = characters[begin : begin + size].encode(name, "ignore").decode(name)
        wrong += [one for one in ("utf-8", name) if text and truth(text.encode(one), name) != one]
    assert wrong.count("utf-8") <= 10 and wrong.count(name) <= 10, wrong


def test_damaged_utf8_is_not_another_encoding(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in ("自由と権利", KOREAN, GERMAN)]
    path.write_bytes(b"\n".join([*lines, b'{"text": "caf\xe9"}', *lines]))
    (reject,) = [item for item in read(str(path), "text", 10**6) if isinstance(item, Reject)]
    assert reject.name == f"{path}:4" and "most of it is UTF-8, and damaged" in reject.message
    assert "iconv" not in reject.message


def test_ascii_with_a_foreign_word_far_behind(tmp_path):
    """What is looked at are the bytes around the fault, not the beginning of the file."""
    path = tmp_path / "a.txt"
    foreign = "机器学习是人工智能的一个分支，它研究计算机怎样模拟人类的学习行为。" * 3
    path.write_bytes(b"plain text\n" * 30_000 + foreign.encode("gbk"))
    (reject,) = read(str(path), "text", 10**6)
    assert isinstance(reject, Reject) and "GB18030 (or GBK)" in reject.message and reject.name == f"{path}:30001"


def test_of_many_files_the_bad_one_is_listed_with_its_name(texts, tmp_path):
    """And goes on to be read where --data.encoding names it, among files that are UTF-8."""
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_text(f"第{number}篇\n" + texts["zh"][number * 300 :][:300])
    (tmp_path / "77.txt").write_bytes(texts["zh_TW"][:3000].encode("big5", "ignore"))
    settings = {"files": (f"{tmp_path}/*.txt",), "tokenizer_kind": "bpe", "cache": str(tmp_path / "cache")}
    store = prepare(DataConfig(**settings), 400, for_masked_lm=False).train["text"]
    entries = [json.loads(line) for line in (store.folder / "rejects.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in entries] == [f"{tmp_path}/77.txt:4"]
    assert "Big5" in entries[0]["message"] and "--data.encoding big5" in entries[0]["message"]

    store = prepare(DataConfig(**settings, encoding="big5"), 400, for_masked_lm=False).train["text"]
    entries = [json.loads(line) for line in (store.folder / "rejects.jsonl").read_text().splitlines()]
    assert store.manifest["rejected"] == {} and store.manifest["repaired"] == {"encoding": 60}
    assert entries[0]["message"] == "is UTF-8, not Big5, and is read as that"


TEXTS = ["第一行，𠀀𠮷€ß\n第二行", "😀 emoji 上古汉字𪚥", "plain", '逗号,"引号"'] * 40
"""With characters of one, two and four bytes in GB18030, and pairs of surrogates in UTF-16."""


def as_kind(kind: str, encoding: str) -> bytes:
    if kind == ".jsonl":
        whole = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    elif kind == ".csv":
        quoted = ('"' + text.replace('"', '""') + '"' for text in TEXTS)
        whole = "".join(f"{cell}\n" for cell in ("text", *quoted))
    else:
        whole = "\n\n".join(TEXTS)
    return whole.encode(encoding)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
@pytest.mark.parametrize("encoding", ["gb18030", "utf-16-le", "utf-16-be", "utf-16", "utf-32", "utf-32-be"])
def test_blocks_cut_no_character(tmp_path, monkeypatch, encoding, kind, packed):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(pack(as_kind(kind, encoding)))
    for block in (101, 2**16):
        monkeypatch.setattr(espalier.data.recode, "BLOCK", block)
        items = [item for item in read(str(path), "text", 10**6, encoding) if item[1:2] != ("bom",)]
        found = [item.text if isinstance(item, Document) else item for item in items]
        assert found == (["\n\n".join(TEXTS)] if kind == ".txt" else TEXTS)
    if kind != ".txt" and not packed:
        before = len(TEXTS) - 1 if kind == ".jsonl" else 1 + sum(text.count("\n") + 1 for text in TEXTS[:-1])
        assert items[-1].name == f"{path}:{before + 1}"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(tmp_path, texts, encoding):
    """Whichever way round its bytes are, `utf-16` reads it."""
    for name in ("utf-16-le", "utf-16-be"):
        (tmp_path / "a.txt").write_bytes(texts["zh"][:5000].encode(name))
        *notices, document = read(str(tmp_path / "a.txt"), "text", 10**6, encoding)
        assert isinstance(document, Document) and document.text == texts["zh"][:5000].replace("\r\n", "\n")
        assert [notice.kind for notice in notices if isinstance(notice, Reject)] == (
            [] if encoding in ("utf-16", name) else ["encoding"]
        )


def test_utf8_under_another_name_is_read_as_what_it_is(tmp_path, texts):
    """Chinese in UTF-8 decodes as GB18030 without an error, into other characters."""
    text = "an English head\n" * 10_000 + texts["zh"][:5000]
    (tmp_path / "a.txt").write_text(text)
    notice, document = read(str(tmp_path / "a.txt"), "text", 10**6, "gb18030")
    assert isinstance(document, Document) and document.text == text
    assert notice == Reject(
        f"{tmp_path}/a.txt", "encoding", "is UTF-8, not GB18030 (or GBK), and is read as that", dropped=False
    )
    # A French word is enough where an encoding has one byte a character; three of them may be Chinese.
    (tmp_path / "b.txt").write_text("un café")
    _, document = read(str(tmp_path / "b.txt"), "text", 99, "cp1252")
    assert isinstance(document, Document) and document.text == "un café"


def test_bytes_that_are_not_of_the_given_encoding_cost_their_line(tmp_path):
    lines = ["自由は権利です" * 5, "人間は平等です" * 5, "日本語の文章です" * 5]
    content = [json.dumps({"text": line}, ensure_ascii=False).encode("euc_jp") for line in lines]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([content[0], content[1].replace("平".encode("euc_jp"), b"\xff\xff"), content[2]]))
    first, reject, last = read(str(path), "text", 10**6, "euc_jp")
    assert [item.text for item in (first, last) if isinstance(item, Document)] == [lines[0], lines[2]]
    assert reject == Reject(f"{path}:2", "utf-8", "bytes that are not valid EUC-JP; correct or remove it")
    # Another encoding altogether.
    path.write_bytes(b"\n".join(json.dumps({"text": KOREAN}, ensure_ascii=False).encode("cp949") for _ in range(3)))
    rejects = [item for item in read(str(path), "text", 10**6, "cp932") if isinstance(item, Reject)]
    assert rejects and "Shift-JIS; it looks like EUC-KR" in rejects[0].message


def test_what_was_read_before_damage_is_kept(tmp_path):
    lines = [json.dumps({"text": f"{number}中文"}, ensure_ascii=False) + "\n" for number in range(500)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode("gbk"))[:-8])
    items = list(read(str(tmp_path / "a.jsonl.gz"), "text", 10**6, "gb18030"))
    assert [item.text for item in items if isinstance(item, Document)] == [f"{n}中文" for n in range(500)]
    assert isinstance(items[-1], Reject) and items[-1].kind == "damaged"


def test_the_fingerprint_knows_the_encoding_and_not_its_spelling(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    files = (f"{tmp_path}/a.txt",)

    def fingerprint(**settings) -> str:
        (source,) = open_sources(DataConfig(files=files, validation_files=(), **settings)).train.values()
        return source.source.fingerprint()

    assert (
        FileSource(files).fingerprint()
        == fingerprint()
        == fingerprint(encoding="UTF8")
        == (
            # What it was before there were other encodings.
            "c830ce27f1e327ff322444a7c83d02aa93aba657d6d971858e4cc186433b720a"
        )
    )
    assert fingerprint(encoding="gbk") == fingerprint(encoding="GB18030") != fingerprint()
    assert fingerprint(encoding="big5") != fingerprint(encoding="gbk")


@pytest.mark.parametrize(
    ("name", "message"),
    [("gb-18030x", "did you mean gb18030"), ("shift-jiss", "did you mean shift-jis"), ("base64", "is no encoding"),
     ("idna", "is no encoding"), ("", "is no encoding"), ("a\0b", "is no encoding")],
)  # fmt: skip
def test_an_unknown_encoding_is_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        DataConfig(encoding=name)
    assert "\n" not in str(error.value) and "gb18030" in str(error.value)


def test_an_encoding_without_files_is_refused():
    with pytest.raises(UserError, match="data.encoding=gbk is of files, and no files were given"):
        open_sources(DataConfig(builtin="pydoc", encoding="gbk"))


def test_all_codecs_have_a_name_for_iconv():
    known = subprocess.run(["iconv", "-l"], capture_output=True, text=True, check=True).stdout.replace("//", "").split()
    from espalier.data.encodings import EAST_ASIAN, ESCAPED, SINGLE_BYTE, WIDE

    codecs = [*SINGLE_BYTE, *WIDE, *(name for _, name in ESCAPED), *(name for names in EAST_ASIAN for name in names)]
    assert [name for name in codecs if iconv_name(codec(name)) not in known] == []


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-16", "utf-16-le"])
def test_labelled_files(tmp_path, encoding):
    rows = [("这部电影很好看，我很喜欢", "好"), ("太无聊了，浪费时间", "坏")] * 20
    if encoding == "big5":
        rows = [("這部電影很好看，我很喜歡", "好"), ("太無聊了，浪費時間", "壞")] * 20
    path = tmp_path / "a.tsv"
    path.write_bytes("".join(f"{a}\t{b}\r\n" for a, b in [("text", "label"), *rows]).encode(encoding))
    with pytest.raises(UserError) as error:
        read_labelled(path)
    name = {"gb18030": "GB18030", "big5": "BIG5"}.get(encoding, "UTF-16LE")
    assert f"`iconv -f {name} -t UTF-8`" in str(error.value) and "\n" not in str(error.value)
    found = read_labelled(path, encoding=encoding)
    assert found.labels and list(zip(found.texts_a, found.labels, strict=True)) == rows and found.notes == ()


def test_a_labelled_file_that_is_utf8_in_truth(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n这部电影很好看,好\n太无聊了,坏\n")
    found = read_labelled(path, encoding="gbk")
    assert found.texts_a == ["这部电影很好看", "太无聊了"]
    assert found.notes == (f"{path} is UTF-8, not GB18030 (or GBK), and is read as that",)
    path.write_bytes(b"text,label\nfine,a\nbad \xff,b\n")
    with pytest.raises(UserError, match="a.csv:3: bytes that are not valid GB18030"):
        read_labelled(path, encoding="gbk")


def test_nothing_else_is_lost(tmp_path):
    """Documents of a mixed folder: every file once, whatever it is in."""
    for number, encoding in enumerate(("utf-8", "gbk", "utf-16", "utf-8-sig")):
        text = "中文文本，第" + "一二三四"[number] + "个文件。" * 9
        (tmp_path / f"{number}.txt").write_bytes(text.encode(encoding))
    found = documents(FileSource((f"{tmp_path}/*.txt",), encoding="gb18030"))
    assert [item.text for item in found] == ["中文文本，第" + number + "个文件。" * 9 for number in "一二三四"]
