"""The bytes of text that each token of a vocabulary stands for, behind other tokens."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from espalier.data.tokenizer import plain_backend, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """By id: what a token adds to the text of those before it, in UTF-8; special tokens are their names.

    A token of a byte-level vocabulary, or one for a single byte, may be a part of a character. In other vocabularies a
    token is what it decodes to behind another one, with the blank that may stand between both.
    """
    backend, size = tokenizer.backend_tokenizer, vocabulary_size(tokenizer)
    found = [b""] * size
    kinds = set(_kinds(json.loads(backend.to_str())["decoder"]))
    added = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
    names = backend.get_vocab(with_added_tokens=False)
    if "ByteLevel" in kinds:
        stands_for = {character: byte for byte, character in byte_alphabet().items()}
        for name, index in names.items():
            found[index] = bytes(stands_for[character] for character in name if character in stands_for)
    else:
        before = plain_backend(tokenizer).encode("a", add_special_tokens=False).ids[-1:]
        first = backend.decode(before, skip_special_tokens=False)
        ids = list(names.values())
        texts = backend.decode_batch([[*before, index] for index in ids], skip_special_tokens=False)
        for index, text in zip(ids, texts, strict=True):
            found[index] = text.removeprefix(first).encode()
        if "ByteFallback" in kinds:
            for name, index in names.items():
                if single := BYTE.fullmatch(name):
                    found[index] = bytes.fromhex(single[1])
    for index, text in added.items():
        found[index] = text.encode()
    return found


def byte_alphabet() -> dict[int, str]:
    """The character by which byte-level vocabularies write each byte (Radford et al. 2019).

    Visible ones of Latin-1 are themselves; the others are, in their order, the characters from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


def _kinds(decoder: Any) -> list[str]:
    """The types of a decoder and of those that it is made of."""
    if not decoder:
        return []
    return [decoder["type"], *(kind for part in decoder.get("decoders", ()) for kind in _kinds(part))]
