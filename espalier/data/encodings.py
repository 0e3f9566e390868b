"""Encodings of text files: how they are recognised, and what they are called.

Unicode and the East Asian encodings are told apart by decoding and counting: each of those standards keeps a part for
the characters in common use (level 1 of GB 2312, Big5 and JIS X 0208, the syllables of KS X 1001, kana), and text
decoded with the right encoding consists almost only of these. Encodings of one byte are left to charset-normalizer.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import pkgutil
import re
from typing import NamedTuple

from espalier.errors import UserError

SAMPLE_BYTES = 2**16
"""Bytes that are examined to recognise an encoding."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
"""Byte-order marks; those of UTF-32 begin like those of UTF-16."""
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
UNMARKED = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}
"""What a file without a mark is taken for, where its text does not say."""
ESCAPED = ((rb"\x1b\$[@B]|\x1b\$\([DOPQ]", "iso2022_jp_2"), (rb"\x1b\$\)C", "iso2022_kr"))
"""Encodings whose bytes are all ASCII, by the escape sequences that they cannot do without."""
EAST_ASIAN = (
    ("cp949",),
    ("euc_jp", "euc_jis_2004"),
    ("cp932", "shift_jis_2004"),
    ("big5", "cp950", "big5hkscs"),
    ("gb18030",),
)
"""By language; of one row, the first that decodes all. An earlier row wins a tie, for a Korean text may decode as
nothing but common Chinese characters, and no Chinese one as nothing but common Korean syllables."""
MANY_BYTES = frozenset(name for names in EAST_ASIAN for name in names) | {"shift_jis", "shift_jisx0213", "johab"}
SINGLE_BYTE = (
    *("cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874"),
    *("iso8859_2", "iso8859_5", "iso8859_7", "iso8859_15", "cp437", "cp850", "cp852", "cp866", "mac_roman"),
)
WESTERN = frozenset("äöüßÄÖÜáàâãåæçéèêëíìîïñóòôõœøúùûÉÈÊÀÂÁÇÅÆØÑÓÍÚ„“”‘’‚…»«–—€§°·•©®™£´ª\xa0¡¿")
"""What texts of Western European languages are written with, of the characters of Windows-1252."""
LABELS = {
    "gb18030": "GB18030 (or GBK)",
    "cp932": "Shift-JIS",
    "cp949": "EUC-KR",
    "big5": "Big5",
    "cp950": "Big5",
    "big5hkscs": "Big5",
    "euc_jis_2004": "EUC-JP",
    "shift_jis_2004": "Shift-JIS",
    "cp1252": "Windows-1252 (nearly Latin-1)",
}
"""Names that people know, where they are not those of iconv."""
ICONV = {
    "euc_jp": "EUC-JP",
    "euc_jis_2004": "EUC-JISX0213",
    "shift_jis_2004": "SHIFT_JISX0213",
    "big5hkscs": "BIG5-HKSCS",
    "iso2022_jp_2": "ISO-2022-JP-2",
    "iso2022_kr": "ISO-2022-KR",
    "koi8-r": "KOI8-R",
    "mac-roman": "MACINTOSH",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
}
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "euc_kr": "cp949", "ascii": "utf-8", "utf-8-sig": "utf-8"}
"""What decodes all that the named one does, to the same characters, and more."""
ALONE = re.compile(r"(?<!\S)[^\0-\x7f\ufffd](?=[ \t]+[A-Z]\S*$)", re.MULTILINE)
"""A character with a tag behind it, on a line of its own."""
NO_ENCODINGS = frozenset("idna punycode undefined unicode_escape raw_unicode_escape mbcs oem".split())
"""Codecs of Python that are for other things than text files."""


def codec(name: str) -> str:
    """The name that Python gives an encoding; UserError where there is none."""
    try:
        found = codecs.lookup(name)
    except (LookupError, ValueError):  # a NUL in the name is a ValueError
        found = None
    if found is None or not getattr(found, "_is_text_encoding", True) or found.name.replace("-", "_") in NO_ENCODINGS:
        near = difflib.get_close_matches(name.lower(), _codecs(), cutoff=0.6)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"data.encoding={name!r} is no encoding that Python knows{meant} Known are utf-8, gb18030, big5, cp932 "
            "(Shift-JIS), euc-jp, euc-kr, utf-16, cp1252, latin-1 and many more"
        )
    return SUPERSETS.get(found.name, found.name)


def _codecs() -> list[str]:
    import encodings
    import encodings.aliases

    modules = {module.name for module in pkgutil.iter_modules(encodings.__path__)} | set(encodings.aliases.aliases)
    return sorted({name for known in modules - NO_ENCODINGS for name in (known, known.replace("_", "-"))})


def label(name: str) -> str:
    """A codec as people call it."""
    return LABELS.get(name) or iconv_name(name)


def iconv_name(name: str) -> str:
    """A codec as iconv calls it."""
    if name in ICONV:
        return ICONV[name]
    return re.sub(r"^CP(125\d)$", r"WINDOWS-\1", name.upper().replace("_", "-").replace("ISO8859", "ISO-8859"))


class Guess(NamedTuple):
    """What bytes seem to be."""

    codec: str | None
    """None where nothing fits; "utf-8" where only single bytes of it are damaged."""

    @property
    def advice(self) -> str:
        """How to have such a file read, as the rest of a line."""
        if self.codec is None:
            return (
                "its encoding is not recognised; convert it with `iconv -f NAME -t UTF-8`, or give --data.encoding NAME"
            )
        if self.codec == "utf-8":
            return "most of it is UTF-8, and damaged there; correct or remove the line"
        if self.codec in {codecs.lookup(name).name for name in SINGLE_BYTE}:
            return (
                f"it may be {label(self.codec)}, or another encoding of one byte a character: look at what "
                f"`iconv -f {iconv_name(self.codec)} -t UTF-8` makes of it, or --data.encoding {self.codec}"
            )
        return (
            f"it looks like {label(self.codec)}; convert it with `iconv -f {iconv_name(self.codec)} -t UTF-8`, or give "
            f"--data.encoding {self.codec}"
        )


def detect(sample: bytes) -> Guess:
    """Which encoding the beginning of a text is in, that is not valid UTF-8; up to SAMPLE_BYTES are looked at."""
    sample = sample[:SAMPLE_BYTES]
    found = other_unicode(sample)
    if found:
        return Guess(found)
    text = sample.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    if sum(character > "\x7f" for character in text) - damaged >= 4 * damaged:
        return Guess("utf-8")
    if _western(sample.decode("cp1252", "replace")):
        return Guess("cp1252")
    texts = {(name := _fitting(names, sample)): _decoded(sample, name) for names in EAST_ASIAN}
    # Alone between ASCII letters stands an accent with the letter behind it, not a word of East Asia. Alone in a cell
    # stands each character of tagged text.
    scores = {name: _common(text, name) for name, text in texts.items() if _in_company(ALONE.sub("，，", text)) >= 0.5}
    best = max(scores, key=lambda name: scores[name], default=None)
    return Guess(best if best and scores[best] >= 0.7 else _single_byte(sample))


def other_unicode(sample: bytes) -> str | None:
    """UTF-16, UTF-32 or an encoding with escape sequences, where a text is in one for certain; else None.

    These are the ones that may pass for UTF-8, or that lines of bytes must not be cut from.
    """
    mark = next((name for mark, name in MARKS if sample.startswith(mark)), None)
    if mark in WIDE:
        return mark
    for pattern, name in ESCAPED:
        if sample.isascii() and re.search(pattern, sample) and "\ufffd" not in _decoded(sample, name):
            return name
    zeros = sample.count(0)
    if zeros == 0 and _is_utf8(sample):
        return None
    best, fit = None, 0.8
    for name in WIDE:
        # A NUL in every second byte, or in three of four, makes a text; one by accident does not.
        text = _decoded(sample, name)
        common = _common(text, name) if len(text) >= (4 if zeros else 16) else 0.0
        if common > fit:
            best, fit = name, common
    return best


def truth(block: bytes, name: str) -> str | None:
    """The encoding of a text that is said to be in `name`, by its first block; None where ASCII alone cannot tell."""
    if not block:
        return None
    found = next((name for mark, name in MARKS if block.startswith(mark)), None) or other_unicode(block)
    if found:
        return name if found.startswith("iso2022") and name.startswith("iso2022") else found
    if name in UNMARKED:
        name = UNMARKED[name]
    if name in WIDE:
        text = _is_utf8(block) and not re.search(rb"[\0-\x08\x0e-\x1f]", block)
        return "utf-8" if text else name
    if block.isascii():
        return None
    if not _is_utf8(block):
        return name
    characters = [character for character in _decoded(block, "utf-8") if character > "\x7f"]
    if len(characters) >= 12 or name not in MANY_BYTES:
        return "utf-8"
    # Of two-byte characters, one in eight is valid UTF-8 by accident.
    usual = all(character in _everywhere() for character in characters)
    return "utf-8" if usual and _common(_decoded(block, name), name) < 1 else name


def _is_utf8(sample: bytes) -> bool:
    """Whether all but a character that is cut off at the end is UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


def _decoded(sample: bytes, name: str) -> str:
    """As text, U+FFFD where it is none, without a character that is cut off at the end."""
    return codecs.getincrementaldecoder(name)("replace").decode(sample)


def _western(text: str) -> bool:
    """Whether it is like the text of a Western European language, decoded as Windows-1252."""
    beyond = [character for character in text if character > "\x7f"]
    # French has a blank within its quotation marks, which is beyond ASCII, too.
    words = re.sub(r"[«»“”„‘’‚…—–·\xa0]+", " ", text)
    letters, shared = sum(map(str.isalpha, text)), sum(character in WESTERN for character in beyond)
    return shared >= 0.95 * len(beyond) and len(beyond) < 0.3 * letters and _in_company(words) < 0.3


def _in_company(text: str) -> float:
    """The share of the characters beyond ASCII that stand beside another one."""
    runs = [len(run) for run in re.findall(r"[^\0-\x7f]+", text)]
    return sum(length for length in runs if length > 1) / max(sum(runs), 1)


def _fitting(names: tuple[str, ...], sample: bytes) -> str:
    return min(names, key=lambda name: _decoded(sample, name).count("\ufffd"))


def _common(text: str, name: str) -> float:
    """The share of characters in common use, of those that are not ASCII (in UTF-16 and UTF-32, of all)."""
    if name in WIDE:
        seen, common = text, _everywhere()
    else:
        seen, common = [character for character in text if character > "\x7f"], _level_1(name)
    if not seen:
        return 0.0
    share = sum(character in common for character in seen) / len(seen)
    if name.startswith(("euc_j", "cp932", "shift")) and sum("ぁ" <= c <= "ヿ" for c in seen) < 0.1 * len(seen):
        # Hardly a Japanese text is without kana.
        share *= 0.5
    # What cannot be decoded counts against it, too.
    return share - 5 * text.count("\ufffd") / len(seen)


def _rows(name: str, leads: range, trails: range) -> set[str]:
    pairs = (bytes((lead, trail)).decode(name, "ignore") for lead in leads for trail in trails)
    return {character for character in pairs if len(character) == 1}


@functools.cache
def _level_1(name: str) -> frozenset[str]:
    """Characters in common use, beside the ASCII ones, in the language that an East Asian encoding is for."""
    trails = range(0xA1, 0xFF)
    marks = {chr(code) for code in (*range(0x3001, 0x3020), *range(0xFF01, 0xFF5F))} | set("“”‘’—…·°×―→、。")
    if name == "cp949":
        return frozenset(_rows("euc_kr", range(0xB0, 0xC9), trails) | marks)
    if name.startswith(("euc_j", "cp932", "shift")):
        kana = {chr(code) for code in range(0x3041, 0x30FF)}
        return frozenset(_rows("euc_jp", range(0xB0, 0xD0), trails) | kana | marks)
    big5 = _rows("big5", range(0xA4, 0xC7), range(0x40, 0xFF))
    if name.startswith(("big5", "cp950")):
        return frozenset(big5 | marks)
    # Traditional characters are written in GBK, too.
    return frozenset(_rows("gb2312", range(0xB0, 0xD8), trails) | big5 | marks)


@functools.cache
def _everywhere() -> frozenset[str]:
    """Characters of running text in any language."""
    alphabets = (*range(0x20, 0x7F), *range(0xA0, 0x250), *range(0x370, 0x1400), *range(0x1780, 0x18B0))
    alphabets = (*alphabets, *range(0x1E00, 0x2000), *range(0x2010, 0x2040), 0x20AC, 0xFEFF, 0x9, 0xA, 0xD)
    asian = _level_1("cp949") | _level_1("cp932") | _level_1("big5") | _level_1("gb18030")
    return asian | {chr(code) for code in alphabets}


def _single_byte(sample: bytes) -> str | None:
    import charset_normalizer

    best = charset_normalizer.from_bytes(sample, cp_isolation=list(SINGLE_BYTE)).best()
    return best and codecs.lookup(best.encoding).name
