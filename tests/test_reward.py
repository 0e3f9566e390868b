"""Reward models: files of preferences, the loss against PyTorch, a run from its beginning to what others load."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import torch
from labelled_words import TEXTS, WORDS, write_jsonl
from tiny_models import BERT, LLAMA, close
from tiny_runs import write_run
from toy import quick_compilation  # noqa: F401

import espalier
from espalier.data.examples import Example, LabelledBatches
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.models.heads import sequence_logits
from espalier.models.transformer import apply, init_params
from espalier.predict.score import read
from espalier.predict.use import use_of
from espalier.training.config import CheckpointConfig
from espalier.training.step import make_eval_step, micro_batches
from finetune.config import FinetuneOptimizer
from finetune.preferences import Pair, as_verdicts, read_preferences
from finetune.tasks.reward.record import RewardConfig, RewardData
from finetune.tasks.reward.task import measure, reward_objective
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh, place_batch

ENCODER, DECODER = (dataclasses.replace(model, num_hidden_layers=1) for model in (BERT, LLAMA))


def liked(count: int, seed: int = 0) -> list[dict]:
    """People like fruit better than birds, whatever stands around them."""
    random = np.random.default_rng(seed)
    return [
        {"prompt": "we saw", "chosen": f"the {random.choice(WORDS['fruit'])} here" + " here" * (number % 2),
         "rejected": f"the {random.choice(WORDS['bird'])} here" + " here" * (number % 3)}
        for number in range(count)
    ]  # fmt: skip


def found(tmp_path, rows, **data):
    return read_preferences(RewardData(train=write_jsonl(tmp_path / "a.jsonl", rows), **data), "train")


def said(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def test_pairs_are_read_from_texts_chats_and_scored_lists(tmp_path):
    part = found(tmp_path, [{"prompt": "a?", "chosen": "b", "rejected": "c"}])
    assert part.pairs == [Pair(f"{tmp_path}/a.jsonl:1", "a?", "b", "c")] and not part.verdicts
    assert [(v.answer, v.good) for v in as_verdicts(part.pairs)] == [("b", True), ("c", False)]
    # Whole texts; and whole chats, of which what both begin with is the prompt (UltraFeedback says it twice).
    assert found(tmp_path, [{"chosen": "b", "rejected": "c"}]).pairs[0][1:] == ("", "b", "c")
    for extra in ({}, {"prompt": "a?"}):
        part = found(tmp_path, [{"chosen": said("a?", "b", "d?", "e"), "rejected": said("a?", "b", "d?", "f")} | extra])
        assert part.pairs[0][1:] == (said("a?", "b", "d?"), said("a?", "b", "d?", "e")[3:], said("", "", "", "f")[3:])
    answer = said("", "b")[1:]
    part = found(tmp_path, [{"prompt": said("a?"), "chosen": answer, "rejected": said("", "c")[1:]}])
    assert part.pairs[0][1:3] == (said("a?"), answer)
    # Of four answers with two equal scores, five pairs differ.
    rows = [{"prompt": "a?", "completions": list("wxyz"), "scores": [1, 3, 3, 2.5]}]
    part = found(tmp_path, rows)
    assert [pair[2:] for pair in part.pairs] == [("x", "w"), ("y", "w"), ("z", "w"), ("x", "z"), ("y", "z")]
    (tmp_path / "a.csv").write_text("prompt,response,label\na?,b,1\na?,c,0\n")
    part = read_preferences(RewardData(train=str(tmp_path / "a.csv")), "train")
    assert [(v.prompt, v.answer, v.good) for v in part.verdicts] == [("a?", "b", True), ("a?", "c", False)]
    assert part.facts[-1].endswith("single answers in 'response', 1 of 2 good by 'label'")


def test_identical_pairs_are_left_out_and_said(tmp_path):
    part = found(tmp_path, [{"chosen": "b", "rejected": "c"}, {"chosen": "b", "rejected": "b"}])
    assert len(part.pairs) == 1
    assert part.facts[-1].endswith("a.jsonl: 1 of 2 pairs are left out: chosen and rejected are the same")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "b", "rejected": "b"}, "in every pair chosen and rejected are the same"),
        ({"text": "b"}, "has 'text'; preferences have 'chosen' and 'rejected'"),
        ({"chosen": "b", "rejected": None}, "a.jsonl:1: 'rejected' holds neither a text nor messages"),
        ({"chosen": "b", "rejected": said("c")}, "a.jsonl:1: one of chosen and rejected is text and"),
        ({"completions": ["b", "c"], "scores": [1]}, "a.jsonl:1: 'completions' and 'scores' must be lists of the same"),
        ({"completions": ["b", "c"], "scores": [1, "x"]}, "a.jsonl:1: 'scores' holds something that is no number"),
        ({"completions": ["b", "c"], "scores": [1, 1]}, "no two answers to a prompt have different scores"),
        ({"completion": "b", "label": "maybe"}, "a.jsonl:1: label='maybe' is neither true nor false"),
    ],
)  # fmt: skip
def test_files_that_will_not_do_are_refused_in_a_line(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as caught:
        found(tmp_path, [row])
    assert "\n" not in str(caught.value)


def test_pairs_stay_in_one_row_in_every_epoch():
    examples = [Example([1] * (2 + number), [0] * (2 + number), of_row={"index": number}) for number in range(10)]
    batches = LabelledBatches(examples, 4, 3, pad_id=0, max_length=16, examples_per_row=2, together=2)
    seen = [batches.batch(step)["index"] for step in range(5)]
    assert all((index[:, 0] % 2 == 0).all() and (index[:, 1] == index[:, 0] + 1).all() for index in seen)
    # Two epochs of five pairs, each in an order of its own.
    firsts = np.concatenate(seen)[:, 0].tolist()
    assert sorted(firsts[:5]) == sorted(firsts[5:]) == [0, 2, 4, 6, 8] and firsts[:5] != firsts[5:]
    last = batches.fixed()[-1]
    assert last["index"].tolist() == [[8, 9], [0, 0]] and last["example_weights"].tolist() == [[1, 1], [0, 0]]
    assert last["segment_ids"][0].tolist()[:22] == [1] * 10 + [2] * 11 + [0]
    # Rows of two pairs hold the same pairs, side by side, a long one with a short one.
    batches, packed = (
        LabelledBatches(examples, 8, 3, pad_id=0, max_length=16, examples_per_row=size, together=2) for size in (2, 4)
    )
    for step in range(5):
        index, alone = packed.batch(step)["index"], batches.batch(step)["index"]
        assert index.shape == (2, 4) and sorted(index.reshape(-1, 2).tolist()) == sorted(alone.tolist())
        tokens = (index + 2).sum(1)
        assert abs(tokens[0] - tokens[1]) <= np.ptp((alone + 2).sum(1))
    assert packed.fixed()[-1]["example_weights"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_the_loss_is_that_of_pytorch_accumulated_and_sharded_alike(model):
    """Pairs in one row against each answer in a row of its own; the last of eight rows holds no pair."""
    random = np.random.default_rng(0)
    model = dataclasses.replace(model, labels=("reward",), hidden_dropout=0.0, attention_dropout=0.0)
    params = init_params(model, jax.random.key(0), heads=("sequence_classification",))
    examples = [
        Example(random.integers(5, 200, size).tolist(), [0] * int(size)) for size in random.integers(2, 15, size=14)
    ]
    execution, key = Execution(dtype="float32"), jax.random.key(0)
    rows = LabelledBatches(examples, 16, 0, pad_id=0, max_length=16, examples_per_row=2, together=2).fixed()[0]
    alone = LabelledBatches(examples, 14, 0, pad_id=0, max_length=16).fixed()[0]

    @jax.jit
    def score(params):
        x_BTD = apply(model, params, alone, execution=execution)
        return sequence_logits(model, params, x_BTD, alone["segment_ids"])[:, 0].reshape(7, 2)

    scores = torch.tensor(np.array(score(params)))
    expected = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1])

    objective = reward_objective(model, execution=execution)
    evaluated = jax.jit(make_eval_step(objective))(params, rows, key)
    total, weight = (float(part) for part in evaluated["loss"])
    assert weight == 7 and total == pytest.approx(float(expected.sum()), rel=1e-5)
    assert float(evaluated["accuracy"][0]) == int((scores[:, 0] > scores[:, 1]).sum())
    assert float(evaluated["margin"][0]) == pytest.approx(float((scores[:, 0] - scores[:, 1]).sum()), abs=1e-5)

    full = LabelledBatches(examples, 16, 0, pad_id=0, max_length=16, examples_per_row=8, together=2).fixed()[0]
    assert full["input_ids"].shape[0] == 2
    close(dict(jax.jit(make_eval_step(objective))(params, full, key)), dict(evaluated))
    if not model.causal:
        return

    @jax.jit
    def gradient(batch, norms):
        return jax.grad(lambda params: objective.loss(params, batch, key, norms, False)[0])(params)

    _, norms = objective.prepare(rows, key, 0, True)
    whole = gradient(rows, norms)
    parts = micro_batches(rows, 4)
    halves = [gradient({name: array[at] for name, array in parts.items()}, norms) for at in range(4)]
    close(whole, jax.tree.map(lambda *leaves: sum(leaves), *halves))
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        close(whole, gradient(place_batch(rows, mesh), norms))


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("reward")
    for name, model in (("encoder", ENCODER), ("decoder", DECODER)):
        write_run(root / name, model, TEXTS)
    return root, write_jsonl(root / "train.jsonl", liked(24)), write_jsonl(root / "validation.jsonl", liked(12, 1))


def config_for(there, run_dir, base: str = "encoder", **changes) -> RewardConfig:
    root, train, validation = there
    defaults = dict(
        init_from=str(root / base),
        run_dir=str(run_dir),
        steps=30,
        batch_size=8,
        eval_every=30,
        data=RewardData(train=train, validation=validation),
        optimizer=FinetuneOptimizer(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(1, 1, 1),
    )
    return RewardConfig(**defaults | changes)


def test_a_reward_model_learns_scores_and_is_loaded_by_others(there, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    summary = main(config_for(there, tmp_path / "run", export=str(tmp_path / "exported")))
    metrics = summary["metrics"]
    assert metrics["accuracy"] == 1.0 and metrics["margin"] > 1 and metrics["pairs"] == 12
    assert metrics["baseline_accuracy"] < 0.7 and metrics["loss"] < math.log(2) / 2
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert "Reward model" in (tmp_path / "run/report.html").read_text() and len(rows) == 12
    model = espalier.load(tmp_path / "run")
    texts = [rows[0]["rejected"], rows[0]["chosen"]]
    scores = model.score(texts, "we saw")
    assert scores == pytest.approx([rows[0]["score_rejected"], rows[0]["score_chosen"]], abs=1e-5)
    use = use_of(model)
    # Best of n: the first of the ranking.
    (found,) = use.answers(model, [use.reads({"prompt": "we saw", "texts": texts})])
    assert [one["index"] for one in found["ranking"]] == [1, 0] and use.name == "score"
    (alone,) = use.answers(model, [use.reads({"prompt": said("we saw"), "text": texts[1]})])
    assert alone == {"score": pytest.approx(scores[1], abs=1e-5)}
    assert measure(model, config_for(there, "").data).metrics == pytest.approx(metrics, abs=1e-5)

    # A cross-encoder with one output, for transformers and for us.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        batch = tokenizer(["we saw"] * 2, texts, return_tensors="pt", padding=True)
        assert theirs(**batch).logits[:, 0].numpy() == pytest.approx(scores, abs=1e-4)
    assert espalier.load(f"hf:{tmp_path / 'exported'}").score(texts, "we saw") == pytest.approx(scores, abs=1e-5)


def test_a_run_that_pauses_and_changes_its_mesh_learns_as_one_that_does_not(there, tmp_path):
    few = dict(steps=6, log_every=1, eval_every=6, dropout=0.0, base="decoder")
    whole = main(config_for(there, tmp_path / "whole", **few))
    main(config_for(there, tmp_path / "parts", **few, stop_at=3))
    parts = main(config_for(there, tmp_path / "parts", **few, mesh=MeshConfig(2, 2, 2), accumulation=2))
    assert parts["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-4)


def test_what_cannot_be_learnt_from_is_refused_before_anything_is_written(there, tmp_path):
    single = write_jsonl(tmp_path / "single.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    late = write_jsonl(tmp_path / "late.jsonl", [{"chosen": "we saw " * 20 + "it", "rejected": "we saw " * 20}])
    for path, message in (
        (single, "holds single answers with a label; a reward model learns from pairs"),
        (late, "lies behind the first 16 tokens of every pair; give more with --data.max-length"),
    ):
        with pytest.raises(UserError, match=message):
            main(config_for(there, tmp_path / "run", data=RewardData(path, there[2], max_length=16)))
    with pytest.raises(UserError, match="nothing to score: a row has text"):
        read({"prompt": "a", "texts": "b"})
    assert not (tmp_path / "run").exists()
