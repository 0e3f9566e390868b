"""Text files in other encodings, presented as UTF-8."""

from __future__ import annotations

import codecs
import io
from typing import IO, Any

from espalier.data.encodings import SAMPLE_BYTES, label, truth
from espalier.data.storage import damaged_errors

BLOCK = 2**16
MARK = "\udcff"
"""Stands for bytes that cannot be decoded; it becomes the byte 0xff, which no UTF-8 holds."""


class Recoded(io.RawIOBase):
    """The bytes of a text file, decoded from `encoding` and encoded in UTF-8, in blocks.

    A file that is actually UTF-8, UTF-16 or UTF-32 is read as such, and `notice` says so. What cannot be decoded
    becomes a byte that is no UTF-8, so that its record alone is rejected.
    """

    def __init__(self, file: IO[bytes], encoding: str):
        self._file: Any = file
        self._given = encoding
        self.encoding = encoding
        """What is decoded, as far as is known yet."""
        self._decided, self._ended = False, False
        self._decoder: codecs.IncrementalDecoder | None = None
        self._ready = memoryview(b"")
        self._failure: Exception | None = None

    def readable(self) -> bool:
        return True

    @property
    def notice(self) -> str | None:
        """What people should know about the encoding of this file; None where it is as they said."""
        if self.encoding == self._given or self.encoding.startswith(f"{self._given}-"):
            return None
        return f"is {label(self.encoding)}, not {label(self._given)}, and is read as that"

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._block()
            self._ended = not block
            self._decide(block)
            assert self._decoder
            text = self._decoder.decode(block, final=self._ended)
            self._ready = memoryview(text.encode("utf-8", "surrogateescape"))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _decide(self, block: bytes) -> None:
        """Keep to the encoding of the first block that tells it: up to there all was ASCII."""
        if self._decided:
            return
        found = truth(block, self._given)
        if self._decoder is None or found not in (None, self.encoding):
            self.encoding = found or self._given
            self._decoder = codecs.getincrementaldecoder(self.encoding)("espalier.mark")
        self._decided = found is not None

    def _block(self) -> bytes:
        """The next bytes, as many wherever they come from, so that what is decided on them is the same."""
        if self._failure:
            raise self._failure
        parts = bytearray()
        try:
            while len(parts) < BLOCK and (more := self._file.read1(BLOCK - len(parts))):
                parts += more
        except (OSError, *damaged_errors()) as error:
            # First what came before the fault.
            if not parts:
                raise
            self._failure = error
        return bytes(parts)


def fault(file: IO[bytes], encoding: str) -> bytes:
    """SAMPLE_BYTES of a file around the first bytes that are not of this encoding; else its beginning."""
    decoder = codecs.getincrementaldecoder(encoding)()
    before = first = b""
    while block := file.read(SAMPLE_BYTES // 2):
        first = first or block
        try:
            decoder.decode(block)
        except UnicodeDecodeError:
            return before[before.rfind(b"\n") + 1 :] + block + file.read(SAMPLE_BYTES // 2)
        before = block
    return first


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return MARK, error.end


codecs.register_error("espalier.mark", _mark)
