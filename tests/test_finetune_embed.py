"""Sentence embeddings: losses and gradients against other libraries, files, whole runs, exports, mined negatives."""

import dataclasses
import json
import pathlib
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score
from tiny_models import BERT, GPT, close, random_params, strict_and_quick  # noqa: F401
from tiny_runs import write_run

import espalier
from espalier.assembly import opened
from espalier.commands.convert import ExportConfig, ImportConfig, export_model, import_model
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.models.sentence_transformers import read_modules
from espalier.predict.embed import pooled
from espalier.training.config import CheckpointConfig
from finetune import ranking_metrics
from finetune.config import FinetuneOptimizer
from finetune.tasks.embed.batches import PairBatches
from finetune.tasks.embed.examples import pairs_of
from finetune.tasks.embed.loss import contrastive, cosent, embedding_objective, negatives, square_error
from finetune.tasks.embed.mine import MineConfig
from finetune.tasks.embed.mine import main as mine
from finetune.tasks.embed.record import EmbedConfig, EmbedData
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh, place_batch

EIGHT = MeshConfig(2, 2, 2)
COLOURS = {
    "红": ("红色的苹果", "red apple"),
    "绿": ("绿色的树叶", "green leaf"),
    "蓝": ("蓝色的天空", "blue sky"),
    "黄": ("黄色的香蕉", "yellow banana"),
}


NUMBERS = "一二三四五六七八九十"
TEXTS = [*(text for pair in COLOURS.values() for text in pair), " ".join(NUMBERS), "0 1 2 3 4 5 6 7 8 9 too"] * 3
BERT_48 = dataclasses.replace(BERT, num_hidden_layers=1, max_position_embeddings=48)


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Losses


def vectors(B: int, S: int, D: int = 8, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, S, D)), jnp.float32)


def apart(B: int, S: int) -> dict:
    """A batch in which no text is twice."""
    ids_BS = np.arange(B * S, dtype=np.int32).reshape(B, S)
    return {"text_ids": ids_BS, "known": ids_BS[:, 1:2], "example_weights": np.ones(B, np.float32)}


@pytest.mark.parametrize("symmetric", [False, True], ids=["queries", "both"])
@pytest.mark.parametrize("S", [2, 4], ids=["pairs", "hard negatives"])
def test_the_loss_is_that_of_sentence_transformers(S, symmetric):
    from sentence_transformers.sentence_transformer import losses

    e_BSD = vectors(5, S)
    kind = losses.MultipleNegativesSymmetricRankingLoss if symmetric else losses.MultipleNegativesRankingLoss
    theirs = kind(model=None, scale=20.0)
    want = theirs.compute_loss_from_embeddings([torch.tensor(np.array(e_BSD[:, s])) for s in range(S)], None)
    total, sums = contrastive(e_BSD, apart(5, S), 0.05, symmetric, (8,))
    assert float(total) / 5 == pytest.approx(float(want), rel=1e-5)
    cosine = torch.nn.functional.normalize(torch.tensor(np.array(e_BSD)), dim=-1).numpy()
    scores = cosine[:, 0] @ cosine[:, 1:].reshape(-1, 8).T
    hits = (scores.argmax(1) == np.arange(5) * (S - 1)).sum()
    assert (float(sums["accuracy"][0]), float(sums["accuracy"][1])) == (hits, 5)


def test_scored_losses_are_those_of_sentence_transformers():
    from sentence_transformers.sentence_transformer import losses

    e_BSD, scores = vectors(6, 2), np.array([0.0, 1.0, 0.5, 0.5, 0.2, 0.9], np.float32)
    batch = {"scores": scores, "example_weights": np.ones(6, np.float32)}
    sides = [torch.tensor(np.array(e_BSD[:, side])) for side in (0, 1)]
    want = losses.CoSENTLoss(model=None, scale=20.0).compute_loss_from_embeddings(sides, torch.tensor(scores))
    assert float(cosent(e_BSD, batch, 0.05, (8,))[0]) / 6 == pytest.approx(float(want), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(*sides)
    want = torch.nn.functional.mse_loss(cosine, torch.tensor(scores))
    assert float(square_error(e_BSD, batch, (8,))[0]) / 6 == pytest.approx(float(want), rel=1e-5)
    # A row that fills up the batch counts nothing.
    more = {"scores": np.append(scores, 0.7).astype(np.float32), "example_weights": np.append(np.ones(6), 0.0)}
    more = {name: jnp.asarray(array, jnp.float32) for name, array in more.items()}
    longer = jnp.concatenate([e_BSD, vectors(1, 2, seed=9)])
    close(cosent(longer, more, 0.05, (8,))[0], cosent(e_BSD, batch, 0.05, (8,))[0])


def test_the_loss_is_summed_over_sizes_each_normalised_anew():
    e_BSD, batch = vectors(4, 3), apart(4, 3)
    alone = [contrastive(e_BSD[..., :size], batch, 0.1, True, (size,))[0] for size in (8, 4, 2)]
    close(contrastive(e_BSD, batch, 0.1, True, (8, 4, 2))[0], sum(alone))


@pytest.mark.parametrize("symmetric", [False, True], ids=["queries", "both"])
def test_copies_of_what_belongs_to_a_query_are_no_negatives(symmetric):
    """By brute force: two rows share a document, two a query, one document is another's query, one row is empty."""
    #              query, positive, hard negative
    ids = np.array([[0, 1, 2], [3, 1, 0], [0, 4, -1], [5, 6, 1], [6, 7, 4], [-1, -1, -1]], np.int32)
    known = {0: {1, 4}, 3: {1}, 5: {6}, 6: {7}}
    padded = np.array([sorted(known.get(q, ())) + [-1] * (2 - len(known.get(q, ()))) for q in ids[:, 0]], np.int32)
    weights = (ids[:, 0] >= 0).astype(np.float32)
    e_BSD = vectors(6, 3)
    batch = {"text_ids": ids, "known": padded, "example_weights": weights}
    total, _ = contrastive(e_BSD, batch, 0.1, symmetric, (8,))

    e = np.asarray(e_BSD, np.float64)
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    want = 0.0
    for i in range(5):
        own, forward, backward = e[i, 0] @ e[i, 1] / 0.1, [], []
        for j in range(6):
            for k in (1, 2):
                d = ids[j, k]
                if (j, k) == (i, 1) or (d >= 0 and d not in known[ids[i, 0]] and d != ids[i, 0]):
                    forward.append(e[i, 0] @ e[j, k] / 0.1)
            q, d = ids[j, 0], ids[i, 1]
            if j == i or (q >= 0 and d not in known[q] and d != q):
                backward.append(e[j, 0] @ e[i, 1] / 0.1)
        there = np.log(np.exp(forward).sum()) - own
        back = np.log(np.exp(backward).sum()) - own
        want += (there + back) / 2 if symmetric else there
    assert float(total) == pytest.approx(want, rel=1e-5)
    # Row 0: its own positive's copies and its other positive are none; 6 and 7 of other rows are.
    got = negatives(jnp.asarray(ids), jnp.asarray(padded))[0].reshape(6, 2)
    assert got.tolist() == [[0, 1], [0, 0], [0, 0], [1, 0], [1, 0], [0, 0]]


# Gradients


def token_batch(model, B: int = 8, S: int = 3, T: int = 6, apart_sides: bool = False) -> dict:
    rng = np.random.default_rng(5)

    def side(S, T):
        lengths = rng.integers(2, T + 1, (B, S))
        segments = (np.arange(T) < lengths[..., None]).astype(np.int32)
        ids = rng.integers(0, model.vocab_size, (B, S, T)).astype(np.int32)
        return {"input_ids": ids, "segment_ids": segments, "positions": np.arange(T, dtype=np.int32) * segments}

    batch = apart(B, S)
    batch["text_ids"][3, 1] = batch["text_ids"][2, 1]  # A document that two queries share.
    batch["example_weights"][5] = 0
    if apart_sides:
        return batch | {"queries": side(1, T), "documents": side(S - 1, 2 * T)}
    return batch | {"texts": side(S, T)}


def objective_of(model, **changes):
    settings = dict(pooling="mean", temperature=0.1, symmetric=True, sizes=(32, 8), scored="cosent")
    return embedding_objective(model, **settings | changes, execution=Execution())


def test_the_cached_gradient_is_that_of_the_whole_batch_with_the_same_dropout():
    """Cut, on eight devices, beside one that keeps all activations and differentiates through everything at once."""
    model = dataclasses.replace(BERT, hidden_dropout=0.2, attention_dropout=0.2, num_hidden_layers=1)
    params, batch, objective = random_params(model), token_batch(model), objective_of(model)
    key, A = jax.random.key(7), 2

    def whole(params, dropping):
        parts = []
        for number in range(A):
            rows = {name: x[number::A].reshape(-1, x.shape[-1]) for name, x in batch["texts"].items()}
            draw = jax.random.fold_in(jax.random.fold_in(key, number), 0) if dropping else None
            parts.append(pooled(model, "mean", Execution(), params, rows, draw).reshape(8 // A, 3, -1))
        e_BSD = jnp.stack(parts, axis=1).reshape(8, 3, -1)
        return contrastive(e_BSD, batch, 0.1, True, (32, 8))[0] / 7

    (loss, sums), gradient = on(EIGHT, cut(objective, key, A), params, batch)
    close((loss, gradient), jax.jit(jax.value_and_grad(lambda params: whole(params, True)))(params), 2e-6)
    assert float(sums["loss"][1]) == 7
    # Dropout is on: without it, the loss is another.
    assert abs(float(jax.jit(lambda params: whole(params, False))(params)) - float(loss)) > 1e-2


def test_on_a_mesh_negatives_come_from_the_whole_batch():
    """Queries and documents of different lengths: sharded and cut equals the whole batch on one device."""
    model = dataclasses.replace(BERT, hidden_dropout=0.0, attention_dropout=0.0, num_hidden_layers=1)
    params, batch, objective = random_params(model), token_batch(model, apart_sides=True), objective_of(model)
    key = jax.random.key(7)

    def uncut(params, batch):
        whole = jax.value_and_grad(lambda p: objective.loss(p, batch, key, jnp.float32(7), True), has_aux=True)
        return whole(params)

    close(on(EIGHT, cut(objective, key, 2), params, batch), jax.jit(uncut)(params, batch), 1e-5)


def cut(objective, key, accumulation: int):
    """(params, batch) → ((loss, Sums), gradient), the seven rows with a weight in micro-batches."""
    assert objective.gradient is not None
    return lambda params, batch: objective.gradient(lambda p: p, params, batch, key, jnp.float32(7), accumulation)


def on(sizes: MeshConfig, function, params, batch):
    mesh = build_mesh(sizes)
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(function)(params, place_batch(batch, mesh)))


# Files


def read(tmp_path, name: str, text: str, **settings):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return pairs_of(str(path), EmbedData(**settings))


def shown(pairs) -> dict:
    return {
        pairs.texts[query]: ([pairs.texts[t] for t in right], [pairs.texts[t] for t in pairs.negatives.get(query, ())])
        for query, right in pairs.known.items()
    }


def test_pairs_triplets_and_lists_are_read(tmp_path):
    plain = read(tmp_path, "a.tsv", "en\tde\na dog\tein Hund\na cat\teine Katze\na dog\tHund\n")
    assert shown(plain) == {"a dog": (["ein Hund", "Hund"], []), "a cat": (["eine Katze"], [])}
    assert plain.facts[0].endswith("a.tsv: 3 pairs, 'en' with 'de', of 2 queries")
    triplets = read(tmp_path, "b.csv", 'anchor,positive,negative_1,negative_2\n"狗, 犬",小狗,猫,\n')
    assert shown(triplets) == {"狗, 犬": (["小狗"], ["猫"])}
    lists = [
        {"query": "天", "positives": ["蓝天", "天空"], "negatives": ["地", "蓝天", "天"]},
        {"query": "地", "positives": "土地", "negatives": []},
        {"query": "天", "positives": ["天"], "negatives": None},
    ]
    found = read(tmp_path, "c.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lists))
    # A positive is never a negative, nor is the query itself; a pair of a text with itself teaches nothing.
    assert shown(found) == {"天": (["蓝天", "天空"], ["地"]), "地": (["土地"], [])}
    assert any("1 pairs of a text with itself" in fact for fact in found.facts)
    scores = read(tmp_path, "d.tsv", "sentence1\tsentence2\tscore\na\tb\t4.5\na\tc\t0\n")
    assert scores.scored and scores.scores_N.tolist() == [4.5, 0.0] and not scores.known
    labels = read(tmp_path, "e.tsv", "Quality\t#1 String\t#2 String\n1\ta\tb\n0\ta\tc\n0\td\te\n")
    assert shown(labels) == {"a": (["b"], ["c"])}
    assert any("2 rows with 0 in 'Quality' are no pairs" in fact for fact in labels.facts)
    named = read(tmp_path, "f.tsv", "a\tb\tc\n1\t2\t3\n", query="c", positive="a")
    assert shown(named) == {"3": (["1"], [])}


def test_nothing_of_a_file_is_left_out_in_silence(there, tmp_path):
    """Several queries in a row, negatives beside a score; a label that is asked for is not also a score; long texts."""
    with pytest.raises(UserError, match="a.jsonl:1: 2 texts under 'query', and a query is one"):
        read(tmp_path, "a.jsonl", '{"query": ["a", "b"], "positive": "c"}\n')
    row = '{{"query": "{}", "positive": "c", "negative": ["d", "e"], "score": {}}}\n'
    scored = read(tmp_path, "b.jsonl", row.format("a", 1) + row.format("b", 0))
    assert scored.scored and "4 hard negatives are left out" in scored.facts[-1]
    labelled = read(tmp_path, "c.tsv", "text1\ttext2\tscore\tlabel\na\tb\t3\t1\na\tc\t1\t0\n", label="label")
    assert shown(labelled) == {"a": (["b"], ["c"])}
    long = tmp_path / "long.tsv"
    long.write_text(f"query\tpositive\n三\t{'蓝' * 60}\n二\tyellow\n")
    config = config_for(there, tmp_path / "run", data=EmbedData(train=str(long), validation=there.validation))
    said = f"{long}: 1 of 4 texts are longer than 48 tokens, the longest by 14; their ends were cut off"
    assert said in opened(config).task.facts


BAD = {
    "no such column": ("a\tb\nx\ty\n", dict(query="q"), "no column 'q'; its columns are 'a', 'b'"),
    "three columns": ("a\tb\tc\nx\ty\tz\n", {}, "which columns hold the two texts.*--data.query and --data.positive"),
    "empty text": ("query\tpositive\nx\t \n", {}, r"x.tsv:2: no text under 'positive'; correct or remove"),
    "no number": ("text1\ttext2\tscore\nx\ty\thigh\n", {}, "'high' under 'score' is not a number"),
    "one score": ("text1\ttext2\tscore\nx\ty\t1\nz\ty\t1\n", {}, "every pair has the score 1"),
    "classes": ("premise\thypothesis\tlabel\nx\ty\tneutral\n", {}, "'neutral' under 'label'; .*labelled by 1 .* or 0"),
    "nothing true": ("text1\ttext2\tlabel\nx\ty\t0\n", {}, "no pair of different texts"),
    "both": ("a\tb\tc\td\nx\ty\t1\t1\n", dict(query="a", positive="b", score="c", label="d"), "give one of them"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, case):
    text, settings, words = BAD[case]
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, "x.tsv", text, **settings)
    assert "\n" not in str(error.value)


def test_other_hard_negatives_come_in_each_epoch_and_rows_are_what_they_are_said_to_be(tmp_path):
    from espalier.data.examples import Example

    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}{k}" for k in range(i)]} for i in range(6)]
    pairs = pairs_of(write_jsonl(tmp_path / "rows.jsonl", rows), EmbedData())
    encoded = [Example([1, 7 + number, 2], [0] * 3) for number in range(len(pairs.texts))]
    batches = PairBatches(pairs, encoded, 4, hard_negatives=2, pad_id=0, max_length=16)
    assert len(batches) == 6
    seen: dict[str, set] = {}
    for step in range(9):  # Six epochs.
        batch = batches.batch(step)
        assert batch["texts"]["input_ids"].shape == (4, 4, 16)
        for row, ids in enumerate(batch["text_ids"]):
            texts = [pairs.texts[number] if number >= 0 else None for number in ids]
            number = int(texts[0][1:])
            assert texts[1] == f"p{number}" and [pairs.texts[t] for t in batch["known"][row]] == [f"p{number}"]
            assert sum(text is not None for text in texts[2:]) == min(number, 2)
            seen.setdefault(texts[0], set()).update(text for text in texts[2:] if text)
            for place, text in enumerate(ids):
                tokens = batch["texts"]["input_ids"][row, place]
                want = [1, 7 + text, 2] if text >= 0 else []
                assert tokens.tolist() == want + [0] * (16 - len(want))
                assert batch["texts"]["segment_ids"][row, place].sum() == len(want)
    assert all(len(seen[f"q{i}"]) == i for i in range(6) if f"q{i}" in seen)
    # A part of the rows is that part of the whole; the last evaluation batch is filled up.
    whole, part = batches.batch(1), batches.batch(1, np.array([1, 3]))
    np.testing.assert_array_equal(part["texts"]["input_ids"], whole["texts"]["input_ids"][[1, 3]])
    assert [batch["example_weights"].tolist() for batch in batches.fixed()] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    # Long documents have a length of their own.
    sizes = [42 if text.startswith("p") else 4 for text in pairs.texts]
    long = [Example([5] * size, [0] * size) for size in sizes]
    batch = PairBatches(pairs, long, 4, hard_negatives=0, pad_id=0, max_length=64).batch(0)
    shapes = {name: batch[name]["input_ids"].shape for name in ("queries", "documents")}
    assert shapes == {"queries": (4, 1, 16), "documents": (4, 1, 48)}


def test_rankings_are_measured_as_elsewhere():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, relevance = rng.normal(size=30), rng.integers(0, 4, 30) * (rng.random(30) < 0.3)
        if not relevance.any():
            continue
        got = ranking_metrics.of_query(scores, relevance)
        order = np.argsort(-scores)
        first = int(np.flatnonzero(relevance[order])[0]) + 1
        want = {
            "ndcg@10": ndcg_score([relevance], [scores], k=10),
            "map": label_ranking_average_precision_score([relevance > 0], [scores]),
            "mrr@10": 1 / first if first <= 10 else 0,
            "recall@1": (relevance[order[:1]] > 0).sum() / (relevance > 0).sum(),
            "recall@10": (relevance[order[:10]] > 0).sum() / (relevance > 0).sum(),
        }
        assert got == pytest.approx(want)


# Whole runs


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Runs and pairs in Chinese and English, of four meanings."""
    root = tmp_path_factory.mktemp("embed")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(64):
        chinese, english = COLOURS[list(COLOURS)[number % 4]]
        other = COLOURS[list(COLOURS)[(number + 1) % 4]][1]
        fill = " ".join(rng.choice(list(NUMBERS), 3))
        rows.append({"query": f"{fill}{chinese}", "positive": f"{english} {number}", "negatives": [f"{other} too"]})
    return SimpleNamespace(
        root=root,
        encoder=write_run(root / "encoder", BERT_48, TEXTS, vocabulary=400),
        decoder=write_run(root / "decoder", GPT, TEXTS, vocabulary=400),
        train=write_jsonl(root / "train.jsonl", rows[:48]),
        validation=write_jsonl(root / "validation.jsonl", rows[48:]),
    )


def config_for(there, run_dir, **changes) -> EmbedConfig:
    defaults = dict(
        init_from=str(there.encoder),
        run_dir=str(run_dir),
        steps=20,
        batch_size=16,
        accumulation=2,
        eval_every=20,
        data=EmbedData(train=there.train, validation=there.validation),
        optimizer=FinetuneOptimizer(learning_rate=5e-3),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(2, 1, 1),
    )
    return EmbedConfig(**defaults | changes)


def test_an_encoder_learns_resumes_and_is_the_same_elsewhere(there, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    exported = tmp_path / "exported"
    settings = dict(matryoshka=(8,), symmetric=True, pooling="first")
    summary = main(config_for(there, tmp_path / "whole", export=str(exported), **settings))
    found = summary["metrics"]
    assert found["ndcg@10"] > found["ndcg@10_before"] + 0.1 and 0 < found["ndcg@10_8"] <= 1
    out = " ".join(capsys.readouterr().out.split())
    assert "48 pairs, 'query' with 'positive', of 48 queries, with 48 hard negatives" in out
    assert f"nDCG@10 {found['ndcg@10']:.3f} (before {found['ndcg@10_before']:.3f})" in out
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (saved["pooling"], saved["longest"], saved["head"]) == ("first", 48, "embedding")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and np.mean([row["rank"] == 1 for row in rows]) <= 1
    assert np.mean([1 / row["rank"] for row in rows]) >= found["mrr@10"] - 1e-6

    # Resumed equals uninterrupted, where the origin is gone too: without its figures then.
    parts, moved = tmp_path / "parts", shutil.copytree(there.encoder, tmp_path / "encoder")
    assert not main(config_for(there, parts, init_from=str(moved), stop_at=9, **settings))["finished"]
    shutil.rmtree(moved)
    again = main(config_for(there, parts, init_from=str(moved), **settings))
    assert again["finished"] and "the model before tuning is not measured" in capsys.readouterr().out
    assert again["metrics"] == {name: value for name, value in found.items() if not name.endswith("_before")}
    assert (parts / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()

    texts = ["三 二 一红色的苹果", "a green leaf", "蓝色的天空" * 30, "yellow"]
    reference = SentenceTransformer(str(exported), device="cpu")
    want = reference.encode(texts)
    for source in (tmp_path / "whole", f"hf:{exported}"):
        model = espalier.load(source)
        np.testing.assert_allclose(model.embed(texts), want, atol=1e-5)
        cut = model.embed(texts, size=8)
        theirs = reference.encode(texts, truncate_dim=8, normalize_embeddings=True)
        np.testing.assert_allclose(cut, theirs, atol=1e-5)
        np.testing.assert_allclose(model.similarity(texts), reference.similarity(want, want).numpy(), atol=1e-5)
    assert "SentenceTransformer(" in (exported / "README.md").read_text()
    # A fine-tuning that starts from the folder pools as it says.
    assert opened(config_for(there, tmp_path / "on", init_from=f"hf:{exported}")).task.settings["pooling"] == "first"


def test_a_decoder_is_pooled_by_its_last_token(there, tmp_path):
    from sentence_transformers import SentenceTransformer

    scored = [
        {"sentence1": a, "sentence2": b, "score": 5.0 * (i == j)}
        for i, (a, _) in enumerate(COLOURS.values())
        for j, (_, b) in enumerate(COLOURS.values())
    ]
    path = write_jsonl(tmp_path / "scored.jsonl", scored)
    data = EmbedData(train=path, validation=path)
    settings = dict(init_from=str(there.decoder), data=data, steps=25, dropout=0.0, accumulation=1)
    summary = main(config_for(there, tmp_path / "run", mesh=MeshConfig(1, 1, 1), **settings))
    found = summary["metrics"]
    assert found["spearman"] > 0.7 > found["spearman_before"]
    export_model(ExportConfig(str(tmp_path / "run"), str(tmp_path / "exported")))
    assert read_modules(tmp_path / "exported")["pooling"] == "last"
    texts = ["红色的苹果", "a green leaf and more"]
    want = SentenceTransformer(str(tmp_path / "exported"), device="cpu").encode(texts)
    for source in (tmp_path / "run", f"hf:{tmp_path / 'exported'}"):
        np.testing.assert_allclose(espalier.load(source).embed(texts), want, atol=1e-5)


def test_a_folder_as_sentence_transformers_writes_it_is_read(there, tmp_path):
    """Version 6's spelling, without normalisation; and what is not supported."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    export_model(ExportConfig(str(there.encoder), str(tmp_path / "mlm")))
    for mode, name in (("mean", "mean"), ("cls", "first"), ("lasttoken", "last")):
        theirs = SentenceTransformer(
            modules=[Transformer(str(tmp_path / "mlm"), max_seq_length=12), Pooling(32, mode)], device="cpu"
        )
        theirs.save(str(tmp_path / mode))
        model = espalier.load(f"hf:{tmp_path / mode}")
        assert model.saved["pooling"] == name
        texts = ["a red apple", "green leaf " * 20, "蓝色"]
        np.testing.assert_allclose(model.embed(texts), theirs.encode(texts), atol=1e-5)
    # What always stands before a text is read, and survives a run directory.
    path = tmp_path / "cls" / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"own": "red green "}, "default_prompt_name": "own"}))
    want = SentenceTransformer(str(tmp_path / "cls"), device="cpu").encode(texts)
    import_model(ImportConfig(str(tmp_path / "cls"), str(tmp_path / "imported")))
    export_model(ExportConfig(str(tmp_path / "imported"), str(tmp_path / "again")))
    for source in (f"hf:{tmp_path / 'cls'}", tmp_path / "imported", f"hf:{tmp_path / 'again'}"):
        np.testing.assert_allclose(espalier.load(source).embed(texts), want, atol=1e-5)
    path = tmp_path / "mean" / "1_Pooling" / "config.json"
    path.write_text(path.read_text().replace('"mean"', '"max"'))
    with pytest.raises(UserError, match="pools by max; one of mean, first"):
        espalier.load(f"hf:{tmp_path / 'mean'}")
    (tmp_path / "mean" / "modules.json").write_text('[{"idx": 0, "path": "", "type": "x.WordEmbeddings"}]')
    with pytest.raises(UserError, match="has the modules WordEmbeddings; those of Transformer"):
        espalier.load(f"hf:{tmp_path / 'mean'}")


def test_mined_negatives_keep_their_distance(there, tmp_path, capsys):
    output = tmp_path / "mined.jsonl"
    config = MineConfig(str(there.encoder), str(output), EmbedData(train=there.train), negatives=3, margin=0.05)
    result = mine(config)
    model, given = espalier.load(there.encoder), {}
    for line in pathlib.Path(there.train).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        given[row["query"]] = row
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["query"] for row in rows] == list(given) and result["queries"] == len(rows)
    documents = sorted({text for row in given.values() for text in (row["positive"], *row["negatives"])})
    cosines = model.similarity(list(given), documents)
    dropped = 0
    for row, cosine in zip(rows, cosines, strict=True):
        near, (positive,), (own,) = (
            dict(zip(documents, cosine, strict=True)),
            row["positives"],
            given[row["query"]]["negatives"],
        )
        bound = near[positive] - 0.05 * abs(near[positive])
        allowed = sorted((text for text in documents if near[text] <= bound), key=lambda text: -near[text])
        dropped += own not in allowed
        want = [own] * (own in allowed) + [text for text in allowed if text != own]
        assert sorted(row["negatives"]) == sorted(want[:3]) or np.allclose(
            sorted(near[text] for text in row["negatives"]), sorted(near[text] for text in want[:3]), atol=1e-6
        )
    assert result["dropped"] == dropped
    # What was mined is trained on, and a file is never overwritten.
    assert "hard negatives" in pairs_of(str(output), EmbedData()).facts[0]
    with pytest.raises(UserError, match="exists already"):
        mine(config)


def test_settings_that_cannot_be_meant(there, tmp_path):
    for changes, words in (
        (dict(temperature=0.0), "temperature=0.0 must be greater"),
        (dict(matryoshka=(0,)), "sizes are 1 or more"),
    ):
        with pytest.raises(UserError, match=words):
            config_for(there, tmp_path / "run", **changes)
    with pytest.raises(UserError, match="matryoshka=32: the embeddings of this model have 32 numbers"):
        main(config_for(there, tmp_path / "run", matryoshka=(32,)))
    with pytest.raises(UserError, match="no --data.train FILE given: name pairs of texts"):
        main(config_for(there, tmp_path / "run", data=EmbedData()))
    assert not (tmp_path / "run").exists()
    model = espalier.load(there.encoder)
    with pytest.raises(UserError, match="size=33: the embeddings of this model have 32 numbers"):
        model.embed("a text", size=33)
    assert model.embed([]).shape == (0, 32)
