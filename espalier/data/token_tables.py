"""Tables over a vocabulary: how many bytes each token stands for, and where words begin and end."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTINUES, CONTINUABLE = 1, 2
"""Bits of `word_table`."""
UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x2FDF),  # radicals of Han
    (0x3005, 0x3007),  # marks of iteration
    (0x3021, 0x30FF),  # Hangzhou numerals, Hiragana, Katakana
    (0x3105, 0x312F),  # Bopomofo
    (0x31A0, 0x31FF),  # Bopomofo, strokes, Katakana extensions
    (0x3400, 0x9FFF),  # Han
    (0xA9E0, 0xA9FF),  # Myanmar extended
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),  # Han compatibility
    (0xFF66, 0xFF9F),  # half-width Katakana
    (0x1AFF0, 0x1B16F),  # Kana extensions
    (0x20000, 0x323AF),  # Han extensions
)
"""Code points of scripts that are written without blanks between words."""


# Of three- and four-byte characters; of two-byte ones b0 is a letter in almost every script.
_USUAL_SECOND_BYTE = {
    0xE0: b"\xa4",  # Devanagari
    0xE1: b"\xb8",  # Latin and Greek with two marks
    0xF0: b"\x9f",  # emoji
}


class Piece(NamedTuple):
    """The bytes of a token, and whether it is marked as the inside of a word (WordPiece's ##)."""

    content: bytes
    inside: bool = False


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """int32 [V]: UTF-8 bytes that each token stands for; 0 for special tokens and unused ids.

    Exact for byte-level tokenizers, which lose nothing; WordPiece drops blanks, accents and case, so that its sum is
    less than the bytes of the text.
    """
    return np.array([len(piece.content) if piece else 0 for piece in _pieces(tokenizer)], np.int32)


def token_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each id as a person would write it, with the blank before it: " word", "ing", " [CLS]".

    Bytes that are only a part of a character are shown as U+FFFD.
    """
    pieces = _pieces(tokenizer)
    marked = any(piece.inside for piece in pieces if piece)
    names = tokenizer.convert_ids_to_tokens(list(range(len(pieces))))
    texts = []
    for piece, name in zip(pieces, names, strict=True):
        if piece is None:
            texts.append(f" {name}")
        else:
            texts.append(" " * (marked and not piece.inside) + piece.content.decode(errors="replace"))
    return texts


def word_table(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """uint8 [V]: which tokens make up a word, to mask whole words (Cui et al. 2021).

    Token t belongs to the word of the token s before it iff table[t] & CONTINUES and table[s] & CONTINUABLE. In scripts
    without blanks between words each token is its own word; so are punctuation and special tokens.
    """
    pieces = _pieces(tokenizer)
    marked = any(piece.inside for piece in pieces if piece)
    table_V = np.zeros(len(pieces), np.uint8)
    for index, piece in enumerate(pieces):
        if piece and piece.content:
            table_V[index] = _marked_bits(piece) if marked else _byte_bits(piece.content)
    return table_V


def blank_table(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """bool [V]: tokens that stand for blanks and nothing else."""
    return np.array(
        [piece is not None and not piece.content.decode(errors="replace").strip() for piece in _pieces(tokenizer)]
    )


def _marked_bits(piece: Piece) -> int:
    """WordPiece says itself what is inside a word."""
    text = piece.content.decode()
    if unspaced(text[0]) or unspaced(text[-1]):
        return 0
    return CONTINUABLE | (CONTINUES if piece.inside else 0)


def _byte_bits(content: bytes) -> int:
    """Letters and digits that follow each other without a blank are one word; so are the parts of a character."""
    first, last = _first_character(content), _last_character(content)
    continues = first is None or _in_word(first)
    continuable = last is None or _in_word(last)
    return (CONTINUES if continues else 0) | (CONTINUABLE if continuable else 0)


def _first_character(content: bytes) -> str | None:
    """The first character, None where its beginning is in an earlier token.

    A character that ends in a later token counts as the first one with the same leading bytes, which mostly is of its
    script; after a lone byte that begins many scripts, as one of the most usual.
    """
    if content[0] & 0xC0 == 0x80:
        return None
    length = _length(content[0])
    start = content[:length]
    if len(content) == 1 < length:
        start += _USUAL_SECOND_BYTE.get(content[0], b"\xb0" if length == 2 else b"\x80")
    return start.ljust(length, b"\x80").decode(errors="replace")[0]


def _last_character(content: bytes) -> str | None:
    """The last character, None where it begins in an earlier or ends in a later token."""
    for back in range(1, min(4, len(content)) + 1):
        if content[-back] & 0xC0 != 0x80:
            return content[-back:].decode(errors="replace") if _length(content[-back]) == back else None
    return None


def _length(lead: int) -> int:
    """Bytes in the UTF-8 character that begins with this byte."""
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN" and not unspaced(character)


def unspaced(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in UNSPACED)


def _pieces(tokenizer: PreTrainedTokenizerFast) -> list[Piece | None]:
    """What each id stands for; None for special tokens and ids without a token."""
    backend = tokenizer.backend_tokenizer
    description = json.loads(backend.to_str())
    parts = json.dumps([description.get("pre_tokenizer"), description.get("decoder"), description.get("normalizer")])
    byte_level = '"ByteLevel"' in parts
    prefix = description["model"].get("continuing_subword_prefix") or ""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    pieces: list[Piece | None] = [None] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index in added:
            pieces[index] = None if added[index].special else Piece(token.encode())
        elif byte_level:
            pieces[index] = Piece(bytes(_BYTES[character] for character in token))
        elif prefix and token.startswith(prefix):
            pieces[index] = Piece(token.removeprefix(prefix).encode(), inside=True)
        elif len(token) == 6 and token.startswith("<0x"):
            pieces[index] = Piece(bytes([int(token[3:5], 16)]))
        else:
            pieces[index] = Piece(token.replace("▁", " ").encode())
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte → the byte: itself where it prints, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_alphabet()
