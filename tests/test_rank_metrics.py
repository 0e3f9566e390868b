"""Metrics of rankings beside ir-measures and published definitions; BM25 by its formula."""

import math
from collections import Counter

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, R, nDCG

from finetune.tasks.rank.bm25 import BM25, K1, B, words
from finetune.tasks.rank.judged import Judged, Query
from finetune.tasks.rank.metrics import means, measured


@st.composite
def rankings(draw):
    """Queries with graded judgements and few different scores; some judged texts are not ranked, and some queries rank
    nothing or have nothing relevant."""
    queries, scores_N = [], []
    for number in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.integers(0, 40).map(lambda at: f"d{at}"), unique=True, max_size=18))
        judged = draw(st.dictionaries(st.sampled_from([*names, "x1", "x2", "x3"]), st.integers(0, 3), min_size=1))
        queries.append(Query(f"q{number}", "", judged, names))
        scores_N += draw(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 3.0]), min_size=len(names), max_size=len(names)))
    return queries, np.array(scores_N, np.float32)


@given(rankings())
@settings(max_examples=150, deadline=None)
def test_metrics_are_those_of_trec_eval(drawn):
    """By ir-measures, which asks trec_eval's code; ties are broken as there: of equal scores the later name first."""
    queries, scores_N = drawn
    found, _ = means(queries, scores_N)
    run, first = {}, 0
    for query in queries:
        names = sorted(query.candidates)
        run[query.id] = dict(zip(names, map(float, scores_N[first : first + len(names)]), strict=True))
        first += len(names)
    qrels = {query.id: dict(query.relevance) for query in queries}
    measures = {"ndcg@10": nDCG @ 10, "map": AP, "recall@1": R @ 1, "recall@10": R @ 10}
    expected = ir_measures.calc_aggregate(measures.values(), qrels, run)
    assert found == pytest.approx(
        {name: expected[measure] for name, measure in measures.items()} | {"mrr@10": found["mrr@10"]}, abs=1e-9
    )
    assert found["mrr@10"] == pytest.approx(ms_marco(queries, run))


def ms_marco(queries, run) -> float:
    """As ms_marco_eval.py: the reciprocal place of the first relevant text among ten, over all queries judged."""
    total = 0.0
    for query in queries:
        ranked = sorted(run[query.id], key=lambda name: (run[query.id][name], name), reverse=True)
        for place, name in enumerate(ranked[:10]):
            if query.relevance.get(name, 0) > 0:
                total += 1 / (place + 1)
                break
    return total / len(queries)


def test_the_written_run_is_what_trec_eval_measures(tmp_path):
    random = np.random.default_rng(0)
    texts = {f"d{at}": f"text {at}" for at in range(30)}
    queries = [
        Query(
            f"q{at}",
            "text",
            {f"d{one}": int(random.integers(0, 3)) for one in random.choice(30, 9, False)},
            list(texts),
        )
        for at in range(5)
    ]
    scores_N = np.round(random.normal(size=150), 1).astype(np.float32)
    evaluation = measured(Judged("f", queries, texts, False, (), ""), scores_N, scores_N[::-1])
    for name in ("run.trec", "qrels.trec"):
        (tmp_path / name).write_text(evaluation.files[name])
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels.trec")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "run.trec")))
    expected = ir_measures.calc_aggregate([nDCG @ 10, AP], qrels, run)
    # MS MARCO's script knows places, not scores.
    places = [row.split() for row in evaluation.files["run.trec"].splitlines()]
    places = [ir_measures.ScoredDoc(query, name, -float(place)) for query, _, name, place, *_ in places]
    expected |= ir_measures.calc_aggregate([RR @ 10], qrels, places)
    found = evaluation.metrics
    assert [found["ndcg@10"], found["map"]] == pytest.approx([expected[nDCG @ 10], expected[AP]])
    assert found["mrr@10"] == pytest.approx(expected[RR @ 10]) and found["baseline_map"] != found["map"]
    assert [row["ranking"][0]["score"] for row in evaluation.rows] == [
        max(scores_N[at : at + 30]) for at in range(0, 150, 30)
    ]


# BM25


def test_bm25_is_its_formula_and_knows_chinese():
    texts = ["the crow sat on the oak", "a robin in the oak, a robin", "苹果和梨子", "吃苹果", ""]
    bm25 = BM25(texts)
    split = [list(words(text)) for text in texts]
    assert split[2] == ["苹果", "果和", "和梨", "梨子"] and list(words("梨 Crow's 2x")) == ["梨", "crow", "s", "2x"]
    mean = np.mean([len(found) for found in split])

    def score(query: str, number: int) -> float:
        total, counts = 0.0, Counter(split[number])
        for word in words(query):
            n = sum(word in found for found in split)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            total += idf * counts[word] / (counts[word] + K1 * (1 - B + B * len(split[number]) / mean))
        return total

    for query in ("the robin", "苹果", "robin robin oak", "nothing"):
        np.testing.assert_allclose(bm25.scores(query), [score(query, at) for at in range(5)], rtol=1e-12)
    assert bm25.first("苹果", 5).tolist() == [3, 2] and bm25.first("the oak robin", 1).tolist() == [1]
    assert bm25.first("zebra", 5).tolist() == [] and BM25([]).scores("a").tolist() == []
