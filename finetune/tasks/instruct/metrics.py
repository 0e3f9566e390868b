"""How near written answers are to their references: BLEU, chrF (sacrebleu) and ROUGE.

BLEU (Papineni et al. 2002) is of a corpus, on the tokens of sacrebleu (Post 2018): 13a, of Chinese `zh`, of other
scripts without blanks `char`. chrF (Popović 2015): character n-grams up to 6, β = 2. ROUGE-1, -2 and -L (Lin 2004) are
mean F1 of the answers, on words of letters and digits, in scripts without blanks on characters; all in percent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from espalier.data.token_tables import unspaced

TOKENIZERS = {"13a": "words", "zh": "Chinese by characters", "char": "characters"}
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
KANA = re.compile("[\u3040-\u30ff]")


def answer_metrics(written: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """bleu, chrf, rouge1, rouge2 and rougeL; and what is to be known of how they were counted, in words."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    tokenizer = bleu_tokenizer(references)
    bleu = BLEU(tokenize=tokenizer, force=True)
    found = {
        "bleu": bleu.corpus_score(list(written), [list(references)]).score,
        "chrf": CHRF().corpus_score(list(written), [list(references)]).score,
    } | rouge(written, references)
    said = []
    if tokenizer != "13a":
        said.append(
            f"BLEU on sacrebleu's tokenizer {tokenizer!r} and ROUGE by characters, for the script of the answers"
        )
    return found, said


def bleu_tokenizer(texts: Sequence[str]) -> str:
    """The tokenizer of sacrebleu for most of the letters: 13a, zh, or char."""
    letters = [character for text in texts for character in text if character.isalpha()]
    if 2 * sum(map(unspaced, letters)) <= len(letters):
        return "13a"
    joined = "".join(letters)
    return "zh" if len(HAN.findall(joined)) > len(letters) / 2 and not KANA.search(joined) else "char"


def rouge(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """rouge1, rouge2, rougeL."""
    scores = np.zeros((len(references), 3))
    for row, (text, reference) in enumerate(zip(written, references, strict=True)):
        mine, right = words(text), words(reference)
        overlaps = [(sum((_grams(mine, n) & _grams(right, n)).values()), n) for n in (1, 2)]
        for at, (shared, n) in enumerate([*overlaps, (longest_common(mine, right), 1)]):
            sizes = max(len(mine) - n + 1, 0), max(len(right) - n + 1, 0)
            scores[row, at] = 2 * shared / sum(sizes) if shared else 0.0
    return dict(zip(("rouge1", "rouge2", "rougeL"), (100 * scores.mean(0)).tolist(), strict=True))


def words(text: str) -> list[str]:
    """Letters and digits in a row, in lower case; characters of scripts without blanks each for itself."""
    found: list[str] = []
    inside = False
    for character in text.lower():
        if unspaced(character):
            found.append(character)
            inside = False
        elif character.isalnum():
            if inside:
                found[-1] += character
            else:
                found.append(character)
            inside = True
        else:
            inside = False
    return found


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for at, other in enumerate(b):
            row.append(before[at] + 1 if word == other else max(row[-1], before[at + 1]))
        before = row
    return before[-1]


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[at:] for at in range(n)), strict=False))
