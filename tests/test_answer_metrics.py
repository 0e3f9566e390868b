"""Exact match and F1 are those of the published scripts; Chinese is compared by characters."""

import random

import numpy as np
import pytest

from finetune.tasks.answer.metrics import (
    at_best_thresholds,
    baseline,
    best_threshold,
    in_order,
    metrics,
    score,
    unit_of,
)

WORDS = (
    "The",
    "a",
    "an",
    "Denver",
    "Broncos",
    "denver",
    "24–10",
    "U.S.",
    "it's",
    "(the)",
    "half-time",
    "$1,000",
    "Beyoncé",
    "café",
    "the",
    "1066",
    "'",
    "New\u00a0York",
)


def drawn(seed: int) -> tuple[list[str], list[list[str]], np.ndarray]:
    """400 predictions, right answers (0 to 3 of each) and no-answer scores from 0 to 1."""
    rng = random.Random(seed)
    rows = []
    for _ in range(400):
        answers = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        prediction = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4))) if rng.random() < 0.8 else ""
        if answers and rng.random() < 0.3:
            prediction = rng.choice(answers).upper()
        rows.append((prediction, answers, rng.random()))
    predictions, answers, no_answer = map(list, zip(*rows, strict=True))
    return predictions, answers, np.array(no_answer)


def test_figures_are_those_of_the_published_scripts():
    """Expected: what evaluate-v2.0.py of SQuAD says on `drawn(0)`, and evaluate-v1.1.py on those with an answer."""
    predictions, answers, no_answer_N = drawn(0)
    found = metrics(predictions, answers, "words")
    expected = {
        "em": 28.5,
        "f1": 37.32500000000001,
        "has_answer_em": 29.13907284768212,
        "has_answer_f1": 40.827814569536436,
        "no_answer_em": 26.53061224489796,
    }
    assert {name: 100 * value for name, value in found.items()} == pytest.approx(expected, rel=1e-12)
    best = at_best_thresholds(predictions, answers, no_answer_N, "words")
    assert 100 * best["best_em"] == pytest.approx(27.75) and best["best_em_threshold"] == 0.26185850639517394
    assert 100 * best["best_f1"] == pytest.approx(36.075) and best["best_f1_threshold"] == 0.9838493603530462
    with_answer = [(given, right) for given, right in zip(predictions, answers, strict=True) if right]
    first = metrics(*map(list, zip(*with_answer, strict=True)), "words")
    assert first == pytest.approx({"em": 0.3708609271523179, "f1": 0.39172185430463585})


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos", "The Broncos"], 1, 1),
        ("half time", ["half-time"], 0, 0),
        ("Denver", ["the Denver Broncos"], 0, 2 / 3),
        ("", [], 1, 1),
        ("Denver", [], 0, 0),
        ("", ["Denver"], 0, 0),
    ],
)
def test_well_known_cases(prediction, answers, exact, f1):
    assert score(prediction, answers, "words", 2) == pytest.approx((exact, f1))


def test_an_answer_of_articles_alone_is_what_each_script_takes_it_for():
    assert score("the", ["a"], "words", 1) == (1, 0) and score("the", ["a"], "words", 2) == (1, 1)
    assert score("x", ["the", "x"], "words", 2) == (1, 1)


def test_chinese_is_compared_by_characters():
    assert unit_of(["北京大学是中国的一所大学，建于1898年。", "Peking"]) == unit_of(["東京大学は日本の大学です"])
    assert unit_of(["北京大学"]) == unit_of(["มหาวิทยาลัย"]) == "characters"
    assert (
        unit_of(["Peking University (北京大学) is in Beijing"])
        == unit_of(["서울 대학교"])
        == unit_of(["1898"])
        == "words"
    )
    # 3 of 4 and 3 of 5 characters; as words they would have nothing in common.
    assert score("北京大学", ["北京大"], "characters", 1) == pytest.approx((0, 6 / 7))
    assert score("《红楼梦》", ["红楼梦"], "characters", 1) == (1, 1)
    assert score("1898 年", ["1898年"], "characters", 1) == (1, 1)
    assert score("1898年", ["1899年"], "characters", 1) == pytest.approx((0, 1 / 2))
    assert score("BERT模型", ["bert 模型"], "characters", 1) == (1, 1)
    # The longest common piece of 大学北京 and 北京大学 has two characters of four.
    assert score("大学北京", ["北京大学"], "characters", 1) == (0, 1)
    assert in_order("大学北京", ["天津", "北京大学"], "characters") == pytest.approx(1 / 2)
    assert metrics(["北京"], [["北京"]], "characters") == {"em": 1, "f1": 1, "f1_in_order": 1}


def test_the_best_threshold_is_that_of_all():
    """Against trying each; values come several times."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 12))
        score_N, answerable_N = rng.integers(0, 3, size) / 2, rng.random(size) < 0.6
        value_N = rng.integers(-3, 4, size).astype(float)
        threshold, best = best_threshold(np.where(answerable_N, score_N, 0), answerable_N, value_N)
        tried = {
            at: np.where(value_N > at, ~answerable_N, np.where(answerable_N, score_N, 0)).mean() for at in range(-5, 6)
        }
        assert best == pytest.approx(max(tried.values()))
        given = np.where(value_N > threshold, ~answerable_N, np.where(answerable_N, score_N, 0))
        assert given.mean() == pytest.approx(best)


def test_the_baseline_is_a_sentence_of_the_context():
    context = "Rome is old. The play was written by Marlowe. It rained."
    questions = [("Who wrote the play?", context)]
    assert baseline(questions, [["Marlowe"]], "words") == {"baseline_em": 0, "baseline_f1": pytest.approx(2 / 6)}
    assert baseline(questions * 2, [["Marlowe"], []], "words") == {"baseline_em": 1 / 2, "baseline_f1": 1 / 2}
