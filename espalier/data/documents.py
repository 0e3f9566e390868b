"""What a source yields: documents, and a reject with place and reason for each record that could not be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Document(NamedTuple):
    """A self-contained text and where it comes from (`file`, `file:line` or `file::name`)."""

    text: str
    name: str


class Reject(NamedTuple):
    """A record that is bad, or that was repaired."""

    name: str
    """Where it is: `file:line`, `file:row` of a table, or `file` where the file itself is bad."""
    kind: str
    """One of KINDS."""
    message: str
    """What is wrong with it, for people."""
    dropped: bool = True
    """False: it was repaired, and its document follows."""


Item = Document | Reject

KINDS = {
    "json": "no JSON object",
    "field": "no such field",
    "type": "the field holds no string",
    "utf-8": "bytes that are not UTF-8 (or what data.encoding says)",
    "encoding": "another encoding than data.encoding says (read as what it is)",
    "surrogate": "half a surrogate pair",
    "nul": "NUL bytes",
    "empty": "no text",
    "long": "longer than data.max_document_bytes",
    "table": "a row or table that does not fit its columns",
    "damaged": "a compressed file that is cut off or damaged",
    "unreadable": "a file that cannot be opened",
    "bom": "a byte-order mark (removed)",
}


def documents(items: Iterable[Item]) -> Iterator[Document]:
    """The documents among the items."""
    return (item for item in items if isinstance(item, Document))


def from_text(text: object, name: str, field: str = "text") -> Iterator[Item]:
    """The document of a text, or the reject that says why there is none. text: the value of `field`, of any type."""
    if text is None:
        yield Reject(name, "field", f"no field {field!r}")
        return
    if not isinstance(text, str):
        yield Reject(name, "type", f"field {field!r} is of type {type(text).__name__}; expected a string")
        return
    if text.startswith("\ufeff"):
        text = text.lstrip("\ufeff")
        yield Reject(name, "bom", "begins with a byte-order mark; it was removed", dropped=False)
    if not text or text.isspace():
        yield Reject(name, "empty", "holds no text")
    elif "\0" in text:
        yield Reject(name, "nul", f"NUL byte after {text.index(chr(0))} characters")
    elif not _encodable(text):
        yield Reject(name, "surrogate", "half a surrogate pair (\\ud800 …) is no character")
    else:
        yield Document(text, name)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
