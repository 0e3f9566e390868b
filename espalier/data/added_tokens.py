"""Tokens of a domain added to a pretrained tokenizer: words that it would cut into pieces become one token each."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"
)
"""Thai, Lao, Burmese, Khmer, kana, Chinese characters, and Hangul, whose particles follow without a blank."""


class Added(NamedTuple):
    """What was added to a tokenizer."""

    pieces: dict[int, list[int]]
    """Id of a new token → ids of the tokens that it was until now."""
    known: list[str]
    """Tokens that there were already."""


def add_tokens(tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike) -> Added:
    """Add the tokens of a text file, one a line (UTF-8), to the tokenizer, behind those that it has.

    A token stands for a whole word; in scripts that are written without blanks it stands wherever it is found.
    UserError where the file has none that is new.
    """
    from tokenizers import AddedToken

    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"add_tokens: {path} is no text file in UTF-8 ({error}); give one with a token a line"
        ) from None
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    pieces, known = {}, []
    for text in dict.fromkeys(line.strip() for line in lines if line.strip()):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if text in vocabulary or len(ids) == 1 and ids[0] != tokenizer.unk_token_id or not ids:
            known.append(text)
        else:
            pieces[text] = ids
    if not pieces:
        raise UserError(f"add_tokens: {path} has no token that is new ({len(known)} are there already); leave it out")
    # Words are found whatever their case, where the tokenizer ignores that; BERT would put blanks into Chinese ones.
    words = {text: WITHOUT_BLANKS.search(text) is None for text in pieces}
    new: list[Any] = [AddedToken(text, single_word=words[text], normalized=words[text]) for text in pieces]
    tokenizer.add_tokens(new)
    after = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    return Added({after[text]: ids for text, ids in pieces.items()}, known)
