"""Text that a function of the user's own gives, as a source: python:FILE.py:NAME."""

from __future__ import annotations

from collections.abc import Iterator

from espalier import user_code
from espalier.data.documents import Item, from_text
from espalier.errors import UserError
from espalier.files import sha256_of_text

FORM = "texts()"


class UserSource:
    """The texts of `NAME()` in FILE.py, each a document. It is called anew for each reading, and must give the same."""

    def __init__(self, given: str):
        self.given = given
        self._texts = user_code.function(given, FORM)
        self._code = user_code.recorded(given)

    def __iter__(self) -> Iterator[Item]:
        texts, number = self._texts(), 0
        if isinstance(texts, str) or not hasattr(texts, "__iter__"):
            raise UserError(f"{self.given} returns a {type(texts).__name__}; accepted is texts, each a string")
        with user_code.one_line(self.given, self._code["file"]):
            for number, text in enumerate(texts, 1):
                yield from from_text(text, f"{self._code['name']}:{number}")

    def fingerprint(self) -> str:
        """Over the file of the function: its texts are taken to be the same as long as that is."""
        return sha256_of_text(f"python 1 {self._code['name']} {self._code['sha256']}")

    def size(self) -> int | None:
        return None
