"""Ranking: files of every layout, both losses, runs, exports and what is refused."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from test_objective_contract import after, assert_same
from tiny_models import BERT, LLAMA, strict_and_quick  # noqa: F401
from tiny_runs import write_run

from espalier import load
from espalier.assembly import opened
from espalier.errors import UserError
from espalier.files import write_json
from espalier.intervals import mean_interval
from espalier.models.config import Execution
from espalier.models.transformer import init_params
from espalier.predict.use import use_of
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneOptimizer
from finetune.ranking_metrics import intervals, of_query
from finetune.tasks.rank.examples import GroupBatches, training_pairs
from finetune.tasks.rank.files import read_judged
from finetune.tasks.rank.judged import Judged, Query
from finetune.tasks.rank.metrics import measured, validation_loss
from finetune.tasks.rank.record import RankConfig, RankData
from finetune.tasks.rank.task import measure, ranking_objective, scores
from finetune.train import main
from sharding.mesh import MeshConfig

SMALL = dict(num_hidden_layers=1, max_position_embeddings=32, hidden_dropout=0.1, attention_dropout=0.1)
ENCODER, DECODER = (dataclasses.replace(model, **SMALL) for model in (BERT, LLAMA))
FRUIT = "apple pear plum cherry 苹果 梨子 李子".split()
TOOLS = "saw axe file plane hammer 锯子 斧头 锤子".split()


def judged_rows(count: int, seed: int = 0) -> list[dict]:
    """Queries in two languages; what names a fruit is relevant, among tools that are not."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        query = f"what can we eat {number}" if number % 2 else f"什么可以吃{number}"
        texts = [
            f"we saw the {random.choice(FRUIT)} here",
            *(f"the {word} 在这里" for word in random.choice(TOOLS, 3, False)),
        ]
        rows.append({"query": query, "positives": texts[:1], "negatives": texts[1:]})
    return rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("rank")
    texts = [text for row in judged_rows(60) for text in (row["query"], *row["positives"], *row["negatives"])]
    return SimpleNamespace(
        root=root,
        encoder=write_run(root / "encoder", ENCODER, texts),
        decoder=write_run(root / "decoder", DECODER, texts),
        train=write_jsonl(root / "train.jsonl", judged_rows(40, 1)),
        validation=write_jsonl(root / "validation.jsonl", judged_rows(12, 2)),
    )


def config_for(there, run_dir, **changes) -> RankConfig:
    defaults = dict(
        init_from=str(there.encoder),
        run_dir=str(run_dir),
        steps=30,
        batch_size=8,
        eval_every=15,
        data=RankData(train=there.train, validation=there.validation, negatives=3),
        optimizer=FinetuneOptimizer(learning_rate=5e-3),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(2, 2, 2),
    )
    return RankConfig(**defaults | changes)


# Files


PAIRS = [("what is ripe", "a plum", 1), ("what is ripe", "an axe", 0), ("什么锋利", "斧头", 2), ("什么锋利", "李子", 0)]


def plain(judged: Judged, graded: bool = True) -> list:
    """Texts and grades, without ids."""
    return [
        (
            query.text,
            {
                judged.texts[name]: grade if graded else min(grade, 1)
                for name, grade in query.relevance.items()
                if grade
            },
            None if query.candidates is None else sorted(judged.texts[name] for name in query.candidates),
        )
        for query in judged.queries
    ]


EXPECTED = [("what is ripe", {"a plum": 1}, ["a plum", "an axe"]), ("什么锋利", {"斧头": 2}, ["斧头", "李子"])]
ONES = [(query, dict.fromkeys(relevance, 1), texts) for query, relevance, texts in EXPECTED]


def test_files_of_pairs_lists_and_triples_are_told_apart(tmp_path):
    rows = [{"query": query, "text": text, "relevance": grade} for query, text, grade in PAIRS]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    read = read_judged(RankData(train=pairs), "train")
    assert plain(read) == EXPECTED and read.paired and "pairs of 'query' and 'text'" in read.facts[0]
    (tmp_path / "pairs.tsv").write_text(
        "question\tsentence\tlabel\n" + "".join(f"{query}\t{text}\t{grade}\n" for query, text, grade in PAIRS)
    )
    assert plain(read_judged(RankData(train=str(tmp_path / "pairs.tsv")), "train")) == EXPECTED
    lists = [
        {"query": "what is ripe", "positives": ["a plum"], "negatives": ["an axe"]},
        {"query": "什么锋利", "positives": "斧头", "negatives": [{"title": "", "text": "李子"}]},
    ]
    read = read_judged(RankData(train=write_jsonl(tmp_path / "lists.jsonl", lists)), "train")
    assert plain(read) == ONES and not read.paired
    (tmp_path / "triples.tsv").write_text("what is ripe\ta plum\tan axe\n什么锋利\t斧头\t李子\n")
    read = read_judged(RankData(train=str(tmp_path / "triples.tsv")), "train")
    assert plain(read) == ONES and "2 triples" in read.facts[0]
    # Twice the same pair: once, with the higher relevance.
    again = write_jsonl(tmp_path / "again.jsonl", [*rows, rows[1] | {"relevance": 1}])
    read = read_judged(RankData(train=again), "train")
    assert read.queries[0].relevance == {"d1": 1, "d2": 1} and "1 pairs are there again" in read.facts[1]
    # Where nothing is irrelevant, BM25 finds what a query ranks.
    alone = [{"query": "ripe plum", "positive": "a plum"}, {"query": "an axe", "positive": "the axe of a smith"}]
    read = read_judged(RankData(train=write_jsonl(tmp_path / "alone.jsonl", alone)), "train")
    assert [query.candidates for query in read.queries] == [None, None] and "BM25 finds" in read.facts[0]
    assert [list(query.candidates) for query in read.retrieved(5).queries] == [["d1"], ["d2"]]


def beir(folder):
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [
        {"_id": "t1", "title": "Plums", "text": "a ripe plum"}, {"_id": "t2", "title": "", "text": "a ripe axe"},
        {"_id": "t3", "text": "李子"},
    ])  # fmt: skip
    write_jsonl(folder / "queries.jsonl", [{"_id": "7", "text": "ripe plums"}, {"_id": "8", "text": "unused"}])
    for name in ("train", "test"):
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n7\tt1\t2\n7\tt3\t1\n")
    return folder


def marco(folder):
    folder.mkdir()
    (folder / "collection.tsv").write_text("1\ta ripe plum\n2\ta ripe axe\n3\t李子\n4\tnever asked for\n")
    for name in ("train", "dev.small"):
        (folder / f"queries.{name}.tsv").write_text("70\tripe plum\n71\tunused\n")
        (folder / f"qrels.{name}.tsv").write_text("70\t0\t1\t1\n")
    (folder / "top1000.dev.tsv").write_text("70\t2\tripe plum\ta ripe axe\n70\t1\tripe plum\ta ripe plum\n")
    return folder


def test_folders_of_beir_and_ms_marco(tmp_path):
    folder = beir(tmp_path / "beir")
    for path, name in ((folder, "train"), (folder, "validation"), (folder / "qrels" / "test.tsv", "train")):
        read = read_judged(RankData(**{name: str(path)}), name)
        assert read.texts == {"t1": "Plums a ripe plum", "t2": "a ripe axe", "t3": "李子"}
        assert read.queries == [Query("7", "ripe plums", {"t1": 2, "t3": 1}, None)]
    assert list(read.retrieved(10).queries[0].candidates) == ["t1", "t2"]
    # What is relevant and was not found counts against the ranking; the share that was found is said.
    evaluation = measured(read.retrieved(10), np.array([2.0, 1.0]), np.array([2.0, 1.0]))
    assert evaluation.metrics["recall@10"] == evaluation.metrics["candidates_recall"] == 0.5
    assert evaluation.metrics["ndcg@10"] == pytest.approx(2 / (2 + 1 / math.log2(3)))

    folder = marco(tmp_path / "marco")
    read = read_judged(RankData(validation=str(folder)), "validation")
    assert read.queries == [Query("70", "ripe plum", {"1": 1}, ["2", "1"])] and "top1000.dev.tsv" in read.facts[0]
    assert read.texts.keys() == {"1", "2"}
    assert read_judged(RankData(train=str(folder)), "train").queries[0].candidates is None
    (tmp_path / "found.run").write_text("70 Q0 3 1 9.5 bm25\n70 Q0 1 2 9.4 bm25\n99 Q0 2 1 1 bm25\n")
    read = read_judged(RankData(validation=str(folder), run=str(tmp_path / "found.run")), "validation")
    assert read.queries[0].candidates == ["3", "1"]


BAD = {
    "no file": (dict(train=None), "no --data.train FILE given"),
    "empty folder": ({}, "holds neither corpus.jsonl .* nor collection.tsv"),
    "no relevance": ([{"query": "a", "text": "b"}], "which column holds the relevance.*--data.label"),
    "no text": ([{"query": "a", "body": "b", "label": 1}], "which column holds the text.*'body'"),
    "decimals": ([{"query": "a", "text": "b", "label": 0.5}], "rows.jsonl:1: the relevance '0.5' is no whole number"),
    "no number": ([{"query": "a", "text": "b", "label": math.nan}], "rows.jsonl:1: the relevance 'nan' is no whole"),
    "endless": ([{"query": "a", "text": "b", "label": math.inf}], "rows.jsonl:1: the relevance 'inf' is no whole"),
    "object": (
        [{"query": "a", "positives": [{"text": 3}], "negatives": []}],
        "'positives' holds list; expected a text",
    ),
    "nothing found": (
        dict(validation=[{"query": "七", "positive": "plum"}]),
        "no query ranks any text, for BM25 finds",
    ),
    "all relevant": ([{"query": "a", "text": "b", "label": 1}], "every pair has the relevance 1"),
    "none relevant": ([{"query": "a", "text": "b", "label": 0}], "no text is relevant"),
    "empty text": ([{"query": "a", "text": " ", "label": 1}], "rows.jsonl:1: no text under 'text'"),
    "no positive": ([{"query": "a", "positives": [], "negatives": ["b"]}], "rows.jsonl:1: a query and one relevant"),
    "wrong column": (dict(query="ask"), "no column 'ask'; its columns are 'query', 'positives', 'negatives'"),
    "no depth": (dict(depth=0), "data.depth=0"),
    "run of a file": (dict(run="x.run"), "--data.run is for folders"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_one_line_and_leaves_nothing(there, tmp_path, case):
    given, message = BAD[case]
    changes = dict(train=there.train, validation=there.validation)
    if isinstance(given, list):
        changes["train"] = write_jsonl(tmp_path / "rows.jsonl", given)
    elif not given:
        (tmp_path / "empty").mkdir()
        changes["train"] = str(tmp_path / "empty")
    else:
        changes |= {
            name: write_jsonl(tmp_path / "rows.jsonl", value) if isinstance(value, list) else value
            for name, value in given.items()
        }
    with pytest.raises(UserError, match=message) as error:
        main(config_for(there, tmp_path / "run", data=RankData(**changes)))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_what_is_cut_is_said(there, tmp_path):
    """A row of 32 tokens has room for 29 of query and text."""
    rows = [*judged_rows(4), {"query": "什么可以吃", "positives": ["apple " * 60], "negatives": ["the axe"]}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    task = opened(config_for(there, tmp_path / "run", data=RankData(train=path, validation=path))).task
    for part in ("learnt from", "measured during the training"):
        (fact,) = [fact for fact in task.facts if part in fact]
        assert fact.startswith(f"{path}: 1 of ") and "longer than 32 tokens, the longest by" in fact


def test_damaged_folders_are_refused(tmp_path):
    folder = beir(tmp_path / "beir")
    for name, content, message in (
        ("qrels/train.tsv", "9\tt1\t1\n", "the query '9' is not there"),
        ("qrels/train.tsv", "7\tt9\t1\n", "the text 't9' is not there"),
        ("qrels/train.tsv", "7\tt1\n", "train.tsv:1: 2 cells"),
        ("qrels/train.tsv", "7\tt1\thigh\n", "the relevance 'high' is no whole number"),
        ("queries.jsonl", '{"id": "7"}\n', "queries.jsonl:1: no object with _id and text"),
        ("corpus.jsonl", '{"_id": "t1", "text": null}\n', "corpus.jsonl:1: .*is no string"),
        ("corpus.jsonl", '{"_id": "t1", "text": "\\ud800"}\n', "corpus.jsonl:1: half a surrogate pair"),
    ):
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read_judged(RankData(train=str(copy)), "train")
        shutil.rmtree(copy)
    (folder / "corpus.jsonl").write_bytes('{"_id": "t1", "text": "李"}\n'.encode("gb18030"))
    with pytest.raises(UserError, match="corpus.jsonl:1: byte 0x.. is not valid UTF-8"):
        read_judged(RankData(train=str(folder)), "train")


# Losses


def tiny_batch(groups: bool):
    """Rows of different lengths; of the second group a text is missing."""
    random = np.random.default_rng(3)
    shape = (8, 3) if groups else (24,)
    lengths = random.integers(3, 9, shape)
    real = np.arange(8) < lengths[..., None]
    weights = np.ones(shape, np.float32)
    weights[(1, 2) if groups else 5] = 0
    labels = np.zeros(shape, np.float32)
    labels[..., 0] = 1
    if not groups:
        labels = random.choice(np.float32([0, 0.5, 1]), shape)
    return {
        "input_ids": random.integers(0, 200, real.shape).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "positions": np.arange(8, dtype=np.int32) * real,
        "token_type_ids": np.zeros(real.shape, np.int32),
        "labels": labels,
        "index": np.arange(weights.size, dtype=np.int32).reshape(shape),
        "example_weights": weights,
    }


@pytest.fixture(scope="module")
def ranker():
    model = dataclasses.replace(ENCODER, labels=("relevance",), hidden_dropout=0.0, attention_dropout=0.0)
    params = init_params(model, jax.random.key(0), heads=("sequence_classification",))
    params = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)), params)
    return model, params, ranking_objective(model, 24, execution=Execution())


@pytest.mark.parametrize("groups", [False, True], ids=["pairs", "groups"])
def test_losses_are_those_of_pytorch_and_are_sharded_alike(ranker, groups):
    model, params, objective = ranker
    batch = tiny_batch(groups)
    prepared, norms = objective.prepare(batch, jax.random.key(0), 0, True)
    run = jax.jit(lambda part: objective.loss(params, part, jax.random.key(0), norms, True))
    loss, sums = run(prepared)
    found = jax.jit(lambda batch: scores(model, params, batch, Execution()))(batch)
    logits, weights = torch.tensor(np.array(found)), torch.tensor(batch["example_weights"])
    if groups:
        logits[weights == 0] = -torch.inf
        expected = torch.nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    else:
        labels = torch.tensor(batch["labels"])
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[weights > 0], labels[weights > 0])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(sums["loss"][1]) == (8 if groups else 23)
    one = after(objective, params, batch)
    assert_same(after(objective, params, batch, MeshConfig(2, 2, 2), accumulation=2), one)


def test_an_evaluation_gathers_scores_and_loses_none(ranker):
    model, params, objective = ranker
    batch = tiny_batch(False)
    prepared, norms = objective.prepare(batch, jax.random.key(0), 0, False)
    _, sums = objective.loss(params, prepared, jax.random.key(0), norms, False)
    assert sums.keys() == {"scores"} and sums["scores"][1] is None
    expected = np.array(scores(model, params, batch, Execution())) * batch["example_weights"]
    np.testing.assert_allclose(sums["scores"][0], expected, rtol=1e-5)
    queries = [Query("a", "", {"d1": 1, "d3": 2}, ["d1", "d2", "d3"]), Query("b", "", {"d1": 0}, ["d1"])]
    scores_N, labels_N = np.array([0.5, -1, 2, 0.3]), np.array([0.5, 0, 1, 0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(scores_N), torch.tensor(labels_N))
    assert validation_loss(queries, scores_N, labels_N, "bce") == pytest.approx(float(expected))
    rows = torch.tensor([[0.5, -1.0], [2.0, -1.0]])
    expected = torch.nn.functional.cross_entropy(rows, torch.zeros(2, dtype=torch.long))
    assert validation_loss(queries, scores_N, labels_N, "softmax") == pytest.approx(float(expected))


def test_groups_stay_together_and_epochs_see_other_texts(there):
    tokenizer = load(there.encoder).tokenizer
    queries = [
        Query(f"q{at}", f"what {at}", {f"r{at}": 1}, [f"r{at}", "x1", "x2", "x3", "x4"][: 5 if at else 2])
        for at in range(6)
    ]
    texts = {name: f"{name} here" for query in queries for name in (*query.relevance, "x1", "x2", "x3", "x4")}
    judged = Judged("f", queries, texts, False, (), "")
    pairs = training_pairs(judged, tokenizer, 32, False, negatives=2, grouped=True, seed=0)
    assert len(pairs.groups) == 6 and pairs.relevance.count(1) == 6
    batches = GroupBatches(pairs, 4, 3, 0, pad_id=0, max_length=32)
    seen = []
    for step in range(6):
        batch = batches.batch(step)
        assert batch["input_ids"].ndim == 3 and batch["input_ids"].shape[:2] == batch["labels"].shape == (4, 3)
        assert (batch["labels"][:, 0] == 1).all() and (batch["labels"][:, 1:] == 0).all()
        for name, array in batch.items():
            halves = [batches.batch(step, part)[name] for part in (slice(0, 2), np.array([2, 3]))]
            np.testing.assert_array_equal(np.concatenate(halves), array)
        for row, weights in zip(batch["index"], batch["example_weights"], strict=True):
            real = row[weights > 0]
            seen.append(tuple(real))
            begins = [group for group, _ in pairs.groups]
            own = dict(pairs.groups)[begins[begins.index(real[0])]]
            assert set(real[1:]) <= set(own) and len(real) == min(3, 1 + len(own))
    assert Counter(row[0] for row in seen) == dict.fromkeys((group for group, _ in pairs.groups), 4)
    assert len(set(seen)) > 6
    # In pairs: of each relevant text so many, once.
    pairs = training_pairs(judged, tokenizer, 32, False, negatives=2, grouped=False, seed=0)
    assert len(pairs.encoded) == 6 + 5 * 2 + 1 and pairs.groups == []


# Runs


@pytest.fixture(scope="module")
def trained(there):
    """(the run of a ranker that learnt pairs, its export)"""
    run, exported = there.root / "trained", there.root / "exported"
    main(config_for(there, run, export=str(exported)))
    return run, exported


def test_a_ranker_learns_from_pairs(trained):
    run, _ = trained
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert metrics["ndcg@10"] == metrics["mrr@10"] == metrics["map"] == metrics["recall@1"] == 1.0
    assert metrics["baseline_ndcg@10"] < 0.8 and metrics["candidates_recall"] == 1.0
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert rows[0]["query"] == "什么可以吃0" and rows[0]["ranking"][0]["relevance"] == 1 and len(rows) == 12
    report = (run / "report.html").read_text()
    assert "什么可以吃0" in report and "nDCG@10" in report


def test_a_ranker_learns_from_groups_and_a_resumed_run_ends_alike(there, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(config_for(there, whole, loss="softmax"))["metrics"]["ndcg@10"] == 1.0
    out = " ".join(capsys.readouterr().out.split())
    assert "result nDCG@10 1.000 (baseline 0." in out and "12 queries rank 48 texts" in out
    assert "40 groups of a relevant text and irrelevant ones" in out
    logged = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["eval/ndcg@10"] == 1.0 and logged[-1]["eval/loss"] < 0.5
    assert not main(config_for(there, parts, loss="softmax", stop_at=15))["finished"]
    assert main(config_for(there, parts, loss="softmax"))["finished"]
    for name in ("predictions.jsonl", "run.trec"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_export_scores_alike_in_transformers_and_sentence_transformers(there, trained, tmp_path, kind):
    from sentence_transformers import CrossEncoder

    if kind == "encoder":
        run, folder = trained
    else:
        run, folder = tmp_path / "run", tmp_path / "exported"
        one = MeshConfig(1, 1, 1)
        main(config_for(there, run, init_from=str(there.decoder), steps=4, eval_every=4, export=str(folder), mesh=one))
    model = load(run)
    query, texts = "什么可以吃3", ["we saw the plum here", "the axe 在这里", "锤子", "a 苹果 " * 30]
    ranked = model.rank(query, texts)
    assert [row["text"] for row in ranked] == [texts[row["index"]] for row in ranked]
    assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)
    ours = np.array([row["score"] for row in sorted(ranked, key=lambda row: row["index"])])

    # One at a time: a decoder's class in transformers finds the last token by the padding token.
    encoder = CrossEncoder(str(folder), device="cpu", max_length=32)
    pairs = [(query, text) for text in texts[:3]]
    theirs = encoder.predict(pairs, activation_fn=torch.nn.Identity(), batch_size=1)
    np.testing.assert_allclose(ours[:3], theirs, atol=1e-5)
    np.testing.assert_allclose(1 / (1 + np.exp(-ours[:3])), encoder.predict(pairs, batch_size=3), atol=1e-5)
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.num_labels == 1
    tokens = hf.AutoTokenizer.from_pretrained(folder)([query] * 2, texts[:2], return_tensors="pt", padding=True)
    with torch.no_grad():
        np.testing.assert_allclose(ours[:2], classifier(**tokens).logits[:, 0].numpy(), atol=1e-5)
    again = load(f"hf:{folder}")
    assert [row["index"] for row in again.rank(query, texts)] == [row["index"] for row in ranked]
    evaluation = measure(again, RankData(validation=there.validation))
    summary = json.loads((run / "summary.json").read_text())
    assert evaluation.metrics.keys() == summary["metrics"].keys()
    for name, value in summary["metrics"].items():
        assert evaluation.metrics[name] == pytest.approx(value, abs=1e-6), name


def test_rows_are_ranked_or_scored(there, trained):
    model = load(trained[0])
    use = use_of(model)
    rows = [
        {"query": "a", "texts": ["the saw", "苹果", "the saw"]},
        {"query": "a", "text": "苹果"},
        {"query": "a", "texts": []},
    ]
    many, single, none = use.answers(model, [use.reads(row) for row in rows])
    assert single == {"score": pytest.approx(next(row["score"] for row in many["ranking"] if row["index"] == 1))}
    assert none == {"ranking": []} and sorted(row["index"] for row in many["ranking"]) == [0, 1, 2]
    equal = [row["index"] for row in many["ranking"] if row["text"] == "the saw"]
    assert equal == [0, 2]
    for row in ({"query": "a"}, {"texts": ["b"]}, {"query": "a", "texts": [1]}, {}):
        with pytest.raises(UserError, match="nothing to rank"):
            use.reads(row)
    with pytest.raises(UserError, match="head masked_lm, and a ranker"):
        load(there.encoder).rank("a", ["b"])


def test_a_ranker_goes_on_with_its_head(there, trained, tmp_path):
    """Whatever its one output is called, as in the cross-encoders of others (LABEL_0)."""
    shutil.copytree(trained[1], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    write_json(tmp_path / "hf" / "config.json", config | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}})
    still = FinetuneOptimizer(learning_rate=0.0)
    source = f"hf:{tmp_path / 'hf'}"
    assert use_of(load(source)).name == "rank"
    found = main(
        config_for(there, tmp_path / "more", init_from=source, steps=1, optimizer=still, mesh=MeshConfig(1, 1, 1))
    )
    assert found["metrics"]["ndcg@10"] == 1.0


def test_intervals_of_a_ranking_are_those_of_the_mean_over_queries():
    generator = np.random.default_rng(3)
    queries = [of_query(generator.random(12), generator.integers(0, 3, 12)) for _ in range(40)]
    found = intervals(queries)
    for name in queries[0]:
        assert found[f"{name}_interval"] == pytest.approx(mean_interval([query[name] for query in queries]))
    assert intervals(queries[:1]) == {}
