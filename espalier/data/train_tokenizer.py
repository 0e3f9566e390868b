"""Train a tokenizer on the text of a run: WordPiece, byte-level BPE or Unigram.

WordPiece as in BERT (Devlin et al. 2019), byte-level BPE as in GPT-2 (Radford et al. 2019), Unigram as in T5 and
ALBERT (Kudo 2018), all by `tokenizers`. Training gives the same tokenizer wherever it runs. WordPiece and Unigram know
the characters of their alphabet, byte-level BPE knows every byte.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier import progress
from espalier.data.config import ALPHABET
from espalier.data.tokenizer import (
    BPE_MASKED_LM_SPECIALS,
    BPE_SPECIALS,
    SENTENCEPIECE_SPECIALS,
    WORDPIECE_SPECIALS,
    pieces,
    template,
    wrap,
)
from espalier.errors import UserError
from espalier.files import hash_of_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

SURE_ALPHABET = 1000
"""The most frequent characters that are always in the alphabet, if half of the vocabulary has room for them."""
LONGEST_WORD = 1000
"""Characters; a longer word becomes [UNK]. The usual 100 are too few for Thai, with blanks only between phrases."""
SAMPLE = 2**28
"""Characters a tokenizer is trained on at most: more would hardly change its vocabulary, and cost memory and time."""
COUNTED = 2**24
"""Characters on which the scores of Unigram's tokens are counted."""
HARD_EM_ROUNDS = 5
BATCH = 64
"""Pieces of text that are encoded at once; Ctrl-C takes effect between batches."""
MIN_VOCABULARY = 300
"""256 bytes and the special tokens must fit."""
MARKS = r"(?<=[[\p{Latin}\p{Greek}\p{Cyrillic}]&&\p{L}])\p{Mn}+"
"""The marks behind a letter of these scripts, of decomposed text."""


def train_tokenizer(
    texts: Iterable[str],
    kind: str,
    vocab_size: int,
    *,
    for_masked_lm: bool = True,
    alphabet: float = ALPHABET,
    lowercase: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most vocab_size tokens for these texts. kind: "wordpiece", "bpe" or "unigram".

    Learnt from at most SAMPLE characters, drawn by hash. A bpe tokenizer has cls, sep and mask tokens of its own only
    with for_masked_lm; alphabet and lowercase (data.config.DataConfig) are for the others. UserError where the alphabet
    does not fit into the vocabulary.
    """
    if vocab_size < MIN_VOCABULARY:
        raise UserError(f"a vocabulary of {vocab_size} tokens is too small; give at least {MIN_VOCABULARY}")
    if kind not in ("wordpiece", "bpe", "unigram"):
        raise UserError(f"unknown kind of tokenizer {kind!r}; choose wordpiece, bpe or unigram")
    chosen = sample(texts, SAMPLE)
    with progress.waiting(f"training a {kind} tokenizer") as far:
        if kind == "wordpiece":
            return wrap(_train_wordpiece(chosen, vocab_size, alphabet, lowercase), WORDPIECE_SPECIALS)
        if kind == "unigram":
            return wrap(_train_unigram(chosen, vocab_size, alphabet, lowercase, far), SENTENCEPIECE_SPECIALS)
        specials = BPE_MASKED_LM_SPECIALS if for_masked_lm else BPE_SPECIALS
        return wrap(_train_bpe(chosen, vocab_size, specials), specials)


def sample(texts: Iterable[str], limit: int) -> list[str]:
    """The texts in pieces; of more than `limit` characters an even part of the pieces, drawn by their hash."""
    kept: list[tuple[int, str]] = []
    size, threshold = 0, 2**64
    for text in texts:
        for piece in pieces(text):
            mark = hash_of_text(piece)
            if mark < threshold:
                kept.append((mark, piece))
                size += len(piece)
            while size > limit:
                threshold //= 2
                kept = [item for item in kept if item[0] < threshold]
                size = sum(len(piece) for _, piece in kept)
    return [piece for _, piece in kept]


def _learn(backend: Tokenizer, texts: Iterable[str], trainer: Any) -> None:
    """backend.train_from_iterator, which ignores signals for minutes; here Ctrl-C ends the wait at once.

    The library continues in a thread that nobody waits for, until the process ends.
    """
    failures: list[BaseException] = []
    given_up = threading.Event()

    def learn() -> None:
        try:
            backend.train_from_iterator((text for text in texts if not given_up.is_set()), trainer)
        except BaseException as error:
            failures.append(error)

    learner = threading.Thread(target=learn, name="learning tokens", daemon=True)
    learner.start()
    try:
        while learner.is_alive():
            learner.join(0.1)
    finally:
        given_up.set()
    if failures:
        raise failures[0]


def _train_bpe(texts: list[str], vocab_size: int, specials: dict[str, str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(specials.values())),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    _learn(backend, texts, trainer)
    if "cls_token" in specials:
        backend.post_processor = template(backend, specials["cls_token"], specials["sep_token"])
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _lowercased() -> list[normalizers.Normalizer]:
    """Lower case, and no marks on letters of Latin, Greek and Cyrillic; those of all other scripts are kept.

    Marks can only be told apart where text is decomposed, and that of other scripts is composed again: か with its
    voicing mark is が.
    """
    from tokenizers import Regex, normalizers

    return [normalizers.Lowercase(), normalizers.NFD(), normalizers.Replace(Regex(MARKS), ""), normalizers.NFC()]


def _train_wordpiece(texts: list[str], vocab_size: int, alphabet: float, lowercase: bool) -> Tokenizer:
    """WordPiece whose vocabulary depends on the texts alone.

    As in BERT, control characters are dropped and every Han character is a word. Other than there, text is composed
    (NFC), for the same word may be written in two ways.

    The trainer of `tokenizers` numbers the inner characters ("##e") in the order of a hash table that is seeded anew in
    every process, and breaks ties between merges by these numbers. Handing it all of them as special tokens fixes
    the numbers; afterwards they are made ordinary ones.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    cleaned = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.normalizer = normalizers.Sequence([cleaned, *(_lowercased() if lowercase else [normalizers.NFC()])])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = list(WORDPIECE_SPECIALS.values())
    counts, inside = _characters(texts, backend)
    characters = _alphabet(counts, inside, alphabet, vocab_size, len(specials))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*specials, *(f"##{character}" for character in characters if character in inside)],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        min_frequency=2,
        show_progress=False,
    )
    _learn(backend, texts, trainer)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    trained = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    trained.normalizer, trained.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    trained.decoder = decoders.WordPiece(prefix="##")
    trained.add_special_tokens(specials)
    trained.post_processor = template(trained, "[CLS]", "[SEP]")
    return trained


def _characters(texts: list[str], backend: Tokenizer) -> tuple[Counter[str], set[str]]:
    """How often each character occurs after normalisation, and those that occur inside words.

    Normalisation mostly looks at one character at a time, so it runs on the distinct ones only; on the whole of a text
    that holds marks or parts of Korean syllables, which join others.
    """
    count_C = np.zeros(sys.maxunicode + 1, np.int64)
    joins_C = np.zeros(sys.maxunicode + 1, bool)
    inner_C = np.zeros(sys.maxunicode + 1, bool)
    normal: dict[int, str] = {}
    for text in texts:
        codes = _codes(text)
        present = np.bincount(codes)
        if any(map(_combines, np.flatnonzero(present).tolist())):
            codes = _codes(backend.normalizer.normalize_str(text))
            present = np.bincount(codes)
        count_C[: len(present)] += present
        for code in np.flatnonzero(present).tolist():
            if code not in normal:
                normal[code] = backend.normalizer.normalize_str(chr(code))
                joins_C[code] = len(backend.pre_tokenizer.pre_tokenize_str(f"a{normal[code]}a")) == 1
        inner_C[codes[1:][joins_C[codes[1:]] & joins_C[codes[:-1]]]] = True
    counts: Counter[str] = Counter()
    inner: set[str] = set()
    for code, characters in normal.items():
        characters = characters.strip()  # of the blanks around a Han character, which is never inside a word
        counts.update({character: int(count_C[code]) for character in characters if not character.isspace()})
        inner.update(characters[0 if inner_C[code] else 1 :])
    return counts, inner


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@functools.cache
def _combines(code: int) -> bool:
    """Whether the character may join the one before it: a mark, or a part of a Korean syllable."""
    return unicodedata.category(chr(code))[0] == "M" or 0x1100 <= code < 0x1200


def _alphabet(counts: Counter[str], inside: set[str], share: float, vocab_size: int, others: int) -> list[str]:
    """The characters that a vocabulary of this size knows beside that many other tokens, sorted.

    The most frequent ones that make up this share of the text, or SURE_ALPHABET. One that occurs inside words takes two
    tokens. UserError where they are too many.
    """
    room = vocab_size - others
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    known = list(accumulate((counts[character] for character in ranked), initial=0))
    tokens = list(accumulate((1 + (character in inside) for character in ranked), initial=0))
    wanted = int(np.searchsorted(known, math.ceil(share * known[-1])))
    sure = min(SURE_ALPHABET, room // 2, len(ranked))
    if wanted > sure and tokens[wanted] > room:
        fits = known[int(np.searchsorted(tokens, room, side="right")) - 1] / known[-1]
        least = tokens[wanted] + others
        part = math.floor(fits * 1e4) / 1e4 or 1e-4
        raise UserError(
            f"the text has {wanted:,} characters to know (data.alphabet={share:g} of it), too many for {vocab_size:,} "
            f"tokens; give --model.vocab-size {least} or more (prepare: --vocab-size), --data.tokenizer-kind bpe, or "
            f"--data.alphabet {part:g}, which leaves the rest unknown ([UNK])"
        )
    return sorted(ranked[: max(wanted, sure)])


def _train_unigram(
    texts: list[str], vocab_size: int, alphabet: float, lowercase: bool, far: Callable[[str], None]
) -> Tokenizer:
    """Unigram (Kudo 2018) with SentencePiece's mark for blanks; text is normalised to NFKC, as T5 and ALBERT do.

    The trainer of `tokenizers` adds up floats in an order that changes from process to process: it finds the same
    tokens, with scores that differ from the third digit on. So only the tokens are taken, and their scores are counted
    anew from even ones, by the best segmentation under the last scores (hard EM): the same wherever it runs.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    lowercased = _lowercased() if lowercase else []
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), *lowercased, spaces, normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = list(SENTENCEPIECE_SPECIALS.values())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    counts, _ = _characters(texts, backend)
    # The mark for blanks is a token too; without room for one more, the trainer gives far more than it is asked for.
    characters = _alphabet(counts, set(), alphabet, vocab_size, len(specials) + 2)
    _learn(backend, _without(texts, counts.keys() - set(characters), backend), trainer)
    assert backend.get_vocab_size() <= vocab_size, "the trainer keeps to the size it was given"
    tokens = sorted(token for token in backend.get_vocab(with_added_tokens=False) if token not in specials)
    scores = dict.fromkeys(tokens, -math.log(max(len(tokens), 1)))
    some = list(islice(texts, max(len(texts) * COUNTED // max(sum(map(len, texts)), 1), 1)))
    for number in range(HARD_EM_ROUNDS):
        far(f"scores, round {number + 1} of {HARD_EM_ROUNDS}")
        tokens.sort(key=lambda token: (-scores[token], token))
        vocabulary = [(special, 0.0) for special in specials] + [(token, scores[token]) for token in tokens]
        backend.model = models.Unigram(vocabulary, unk_id=specials.index("<unk>"), byte_fallback=False)
        counts = np.zeros(len(vocabulary), np.int64)
        for start in range(0, len(some), BATCH):
            for encoding in backend.encode_batch_fast(some[start : start + BATCH], add_special_tokens=False):
                counts += np.bincount(encoding.ids, minlength=len(vocabulary))
        total = counts.sum() + len(tokens)
        scores = {token: math.log((counts[at + len(specials)] + 1) / total) for at, token in enumerate(tokens)}
    settled = [(special, 0.0) for special in specials] + [(token, scores[token]) for token in tokens]
    backend.model = models.Unigram(settled, unk_id=specials.index("<unk>"), byte_fallback=False)
    backend.add_special_tokens(specials)
    backend.post_processor = template(backend, "<s>", "</s>")
    return backend


def _without(texts: list[str], characters: set[str], backend: Tokenizer) -> list[str]:
    """The texts with blanks for these characters, because its trainer makes a token of every one it meets."""
    if not characters:
        return texts
    gone = re.compile(f"[{re.escape(''.join(sorted(characters)))}]")
    # All at once: a tokenizer that is being trained lets nobody use its normaliser, and would wait for ever.
    return [gone.sub(" ", backend.normalizer.normalize_str(text)) for text in texts]
