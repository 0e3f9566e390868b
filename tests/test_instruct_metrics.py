"""BLEU, chrF and ROUGE of answers against sacrebleu's command line and rouge-score; Chinese by characters."""

import random
import subprocess
import sys

import pytest

from finetune.tasks.instruct.metrics import answer_metrics, bleu_tokenizer, longest_common, rouge, words

REFERENCES = {
    "en": [
        "A man in a blue shirt is standing on a ladder.",
        "Two men are at the stove preparing food!",
        "A girl, a boy",
    ],
    "zh": ["一个穿蓝衬衫的男人站在梯子上。", "两个男人在炉边准备食物", "小女孩2个"],
    "ja": ["青いシャツの男がはしごに立っている。", "ふたりの男が料理をしている", "少女と少年"],
}


def written(references):
    """With words moved, lost and doubled."""
    rng = random.Random(3)
    texts = []
    for text in references:
        parts = list(text) if " " not in text else text.split(" ")
        del parts[rng.randrange(len(parts))]
        parts.insert(1, rng.choice(parts))
        texts.append(("" if " " not in text else " ").join(parts))
    return texts


@pytest.mark.parametrize(("language", "tokenizer"), [("en", "13a"), ("zh", "zh"), ("ja", "char")])
def test_bleu_and_chrf_are_those_of_the_command(language, tokenizer, tmp_path):
    references = REFERENCES[language]
    texts = written(references)
    found, said = answer_metrics(texts, references)
    for name, lines in (("reference", references), ("written", texts)):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = subprocess.run(
        [*(sys.executable, "-m", "sacrebleu", "reference", "-i", "written", "-m", "bleu", "chrf"),
         *("-tok", tokenizer, "-b", "-w", "4", "--force")], cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    scores = [float(number) for number in out.replace("[", " ").replace("]", " ").replace(",", " ").split()]
    assert [found["bleu"], found["chrf"]] == pytest.approx(scores, abs=1e-4)
    assert 20 < found["bleu"] < 95 and bleu_tokenizer(references) == tokenizer
    assert bool(said) == (language != "en") and all(tokenizer in line for line in said)


def test_rouge_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    references, texts = REFERENCES["en"], written(REFERENCES["en"])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for pairs in (
        zip(texts, references, strict=True),
        [("", "a b"), ("a b", ""), ("same words", "same words"), ("b a", "a b")],
    ):
        for text, reference in pairs:
            expected = {name: 100 * score.fmeasure for name, score in scorer.score(reference, text).items()}
            assert rouge([text], [reference]) == pytest.approx(expected)


def test_rouge_of_chinese_is_by_characters():
    """On identical text rouge-score gives 0: it knows Latin letters alone."""
    from rouge_score.rouge_scorer import RougeScorer

    text = "一个穿蓝衬衫的男人"
    assert RougeScorer(["rougeL"]).score(text, text)["rougeL"].fmeasure == 0
    assert rouge([text], [text]) == {"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0}
    assert words("2008年 in Ωmega,东京") == ["2008", "年", "in", "ωmega", "东", "京"]
    # As rouge-score counts the same text with blanks between letters that it knows.
    spelled = {character: f"w{number} " for number, character in enumerate(sorted(set(text + "女人站")))}
    other = "一个蓝衬衫的女人站"
    latin = ["".join(map(spelled.get, given)) for given in (text, other)]
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(*latin)
    assert rouge([other], [text]) == pytest.approx({name: 100 * score.fmeasure for name, score in expected.items()})


def test_longest_common_subsequence():
    assert longest_common("abcbdab", "bdcaba") == 4 and longest_common("", "ab") == 0


def test_the_tokenizer_is_that_of_most_letters():
    assert bleu_tokenizer(["He said 你好."]) == "13a" and bleu_tokenizer(["他说 hi 然后走了，真的"]) == "zh"
    assert bleu_tokenizer(["สวัสดีครับ"]) == "char" and bleu_tokenizer(["", "12"]) == "13a"
