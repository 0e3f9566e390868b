"""Question answering: files, what is learnt, measured, exported and predicted."""

import dataclasses
import json
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import random_params
from tiny_runs import write_run

import espalier
from espalier.commands.convert import ExportConfig, export_model
from espalier.commands.predict import PredictConfig, PredictData
from espalier.commands.predict import main as predict
from espalier.data.tokenizer import load_tokenizer
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.families.bert import BERT_BASE
from espalier.models.families.llama import LLAMA_1B
from espalier.models.hub import save_pretrained
from espalier.models.pretrained import load_weights
from espalier.predict.answer import Answering, windows_of
from espalier.task import find
from espalier.training.config import CheckpointConfig
from espalier.training.run import RunDirectory
from espalier.training.start import find_origin
from finetune.config import FinetuneOptimizer
from finetune.tasks.answer.examples import part_of, read_parts
from finetune.tasks.answer.questions import read_questions, split_by_article
from finetune.tasks.answer.record import AnswerConfig, AnswerData
from finetune.tasks.answer.report import entry
from finetune.tasks.answer.task import QuestionAnswering, answering_objective, chosen_threshold
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

ENCODER = dataclasses.replace(
    BERT_BASE, vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=64, hidden_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
DECODER = dataclasses.replace(
    LLAMA_1B, vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=32, head_dim=None, max_position_embeddings=64,
)  # fmt: skip
NAMES = "ann bob cid dora eve finn gil hal ida jon".split()
THINGS = "apple pear plum cherry fig melon".split()


def question(number: int, rng: np.random.Generator, answerable: bool = True) -> dict:
    """Who has a thing, out of three sentences; or of a thing that nobody has."""
    names, things = rng.choice(NAMES, 3, replace=False), rng.choice(THINGS, 4, replace=False)
    context = " ".join(f"{name} has the {thing} ." for name, thing in zip(names, things[:3], strict=True))
    at = int(rng.integers(3))
    answers = [{"text": str(names[at]), "answer_start": context.index(names[at])}] if answerable else []
    asked = f"who has the {things[at] if answerable else things[3]} ?"
    return {"context": context, "qas": [{"id": f"q{number}", "question": asked, "answers": answers}]}


def squad(path, count: int, seed: int, none: float = 0.0) -> str:
    """A file of SQuAD's layout with eight articles."""
    rng = np.random.default_rng(seed)
    paragraphs = [question(number, rng, rng.random() >= none) for number in range(count)]
    articles = [{"title": f"Article {n}", "paragraphs": paragraphs[n::8]} for n in range(8)]
    path.write_text(json.dumps({"version": "v2.0" if none else "1.1", "data": articles}))
    return str(path)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("answer")
    rng = np.random.default_rng(0)
    texts = [f"{row['context']} {row['qas'][0]['question']}" for row in (question(n, rng) for n in range(60))] * 3
    return SimpleNamespace(
        root=root,
        encoder=write_run(root / "encoder", ENCODER, texts),
        decoder=write_run(root / "decoder", DECODER, texts),
        one=squad(root / "one.json", 64, 1),
        two=squad(root / "two.json", 96, 2, none=0.4),
        validation=squad(root / "validation.json", 24, 3, none=0.4),
    )


def config_for(there, run_dir, init_from=None, **changes) -> AnswerConfig:
    defaults = dict(
        init_from=str(init_from or there.encoder),
        run_dir=str(run_dir),
        steps=40,
        batch_size=16,
        eval_every=20,
        # So much that the part has questions of both kinds.
        data=AnswerData(train=there.two, validation=there.validation, threshold_part=0.3),
        optimizer=FinetuneOptimizer(learning_rate=3e-3),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(1, 1, 1),
    )
    return AnswerConfig(**defaults | changes)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Tiny programs run for microseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def trained(there, quick, tmp_path_factory):
    """A run with a no-answer threshold, on a mesh."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    summary = main(config_for(there, folder))
    return SimpleNamespace(path=folder, summary=summary)


def test_what_a_run_measures_and_writes(there, trained, capsys):
    metrics = trained.summary["metrics"]
    assert metrics.keys() == {
        *("em", "f1", "has_answer_em", "has_answer_f1", "no_answer_em", "baseline_em", "baseline_f1", "threshold"),
        *("best_em", "best_f1", "best_em_threshold", "best_f1_threshold", "em_interval", "f1_interval"),
    }
    low, high = metrics["f1_interval"]
    # The standard error of a mean of 24, once and thrice.
    spread = np.std([row["f1"] for row in lines_of(trained.path / "predictions.jsonl")]) / 24**0.5
    assert low <= metrics["f1"] <= high and 2 * spread < high - low < 6 * spread
    assert metrics["best_f1"] >= metrics["f1"] and metrics["baseline_f1"] > 0
    tuned = json.loads((trained.path / "tuned.json").read_text())
    assert tuned == {"no_answer_threshold": metrics["threshold"]}
    rows = lines_of(trained.path / "predictions.jsonl")
    assert len(rows) == 24 and np.mean([row["em"] for row in rows]) == pytest.approx(metrics["em"])
    for row in rows:
        assert (row["answer"] == "") == (row["no_answer"] > metrics["threshold"])
        assert row["answer"] == ("" if row["begin"] is None else row["context"][row["begin"] : row["end"]])
        assert len(row["n_best"]) == 5 and sum(best["score"] for best in row["n_best"]) <= 1 + 1e-6
        scores = [best["score"] for best in row["n_best"]]
        assert scores == sorted(scores, reverse=True)
    page = (trained.path / "report.html").read_text()
    assert "Mistakes" in page and "<mark>" in page and "exact match" in page

    # What the threshold was chosen on is a part of the training file, and not learnt from.
    config = json.loads((trained.path / "config.json").read_text())
    assert config["no_answer"] is True and config["score_by"] == "words"


def test_predictions_and_an_evaluation_are_those_of_the_run(there, trained):
    model = espalier.load(trained.path)
    rows = lines_of(trained.path / "predictions.jsonl")
    found = model.answer([row["question"] for row in rows], [row["context"] for row in rows])
    for got, row in zip(found, rows, strict=True):
        assert got["answer"] == row["answer"] and got["score"] == pytest.approx(row["score"], abs=1e-3)
    evaluation = find("question_answering").evaluate(model, AnswerData(validation=there.validation))
    wanted = trained.summary["metrics"]
    for name in wanted:
        assert evaluation.metrics[name] == pytest.approx(wanted[name], abs=1e-3), name
    assert len(evaluation.rows) == 24
    with pytest.raises(UserError, match="2 questions and 1 contexts"):
        model.answer(["a", "b"], ["c"])
    with pytest.raises(UserError, match="does not classify; it can answer"):
        model.classify("text")


def test_a_resumed_run_ends_alike(there, trained, tmp_path):
    run = tmp_path / "parts"
    assert not main(config_for(there, run, stop_at=3))["finished"]
    assert main(config_for(there, run))["finished"]
    for name in ("predictions.jsonl", "tuned.json"):
        assert (run / name).read_bytes() == (trained.path / name).read_bytes()


def test_a_mesh_trains_and_answers_as_one_device(there, trained, tmp_path):
    main(config_for(there, tmp_path / "mesh", mesh=MeshConfig(2, 2, 2)))
    mesh, one = (
        [row["loss"] for row in lines_of(run / "metrics.jsonl") if "loss" in row]
        for run in (tmp_path / "mesh", trained.path)
    )
    assert len(one) >= 2
    np.testing.assert_allclose(mesh, one, rtol=1e-4)
    pairs = zip(*(lines_of(run / "predictions.jsonl") for run in (tmp_path / "mesh", trained.path)), strict=True)
    for got, wanted in pairs:
        assert got["no_answer"] == pytest.approx(wanted["no_answer"], abs=1e-3)


def test_it_learns_as_a_loop_of_pytorch_and_always_answers_where_all_questions_have_one(there, tmp_path):
    data = AnswerData(train=there.one, holdout=0.25)
    optimizer = FinetuneOptimizer(learning_rate=4e-3)
    changes = dict(data=data, optimizer=optimizer, dropout=0.0, steps=200, eval_every=200, log_every=1)
    config = config_for(there, tmp_path / "run", **changes)
    summary = main(config)
    assert summary["metrics"].keys() == {"em", "f1", "baseline_em", "baseline_f1", "em_interval", "f1_interval"}
    rows = lines_of(tmp_path / "run" / "predictions.jsonl")
    assert len(rows) == 16 and all(row["answer"] for row in rows) and not (tmp_path / "run" / "tuned.json").exists()
    # A name of three; by chance a span of the context would hardly ever be one.
    assert summary["metrics"]["em"] > summary["metrics"]["baseline_em"] == 0
    assert np.mean([row["answer"] in NAMES for row in rows]) > 0.7

    # Without training again: on what was held out, or on another file that is named.
    model, measure = espalier.load(tmp_path / "run"), find("question_answering").evaluate
    again = measure(model, data)
    assert again.metrics["f1"] == pytest.approx(summary["metrics"]["f1"]) and len(again.rows) == 16
    other = measure(model, dataclasses.replace(data, validation=there.validation))
    assert len(other.rows) == 24 and "in which all have one: it always gives one" in other.warnings[-1]

    losses = [row["loss"] for row in lines_of(tmp_path / "run" / "metrics.jsonl") if "learning_rate" in row][:50]
    np.testing.assert_allclose(losses, losses_of_pytorch(config, tmp_path, 50), atol=1e-3)
    assert losses[-1] < losses[0] / 1.5


def losses_of_pytorch(config: AnswerConfig, folder: pathlib.Path, steps: int) -> list[float]:
    """What a loop around transformers' class loses on the same rows from the same weights, head included."""
    origin = find_origin(config, RunDirectory(folder / "none"))
    given = ModelConfig.from_dict(origin.config["model"])
    model = dataclasses.replace(given, hidden_dropout=0.0, attention_dropout=0.0)
    mesh = build_mesh(config.mesh)
    tokenizer = load_tokenizer(pathlib.Path(config.init_from) / "tokenizer")
    learnt = QuestionAnswering(config, model, tokenizer, mesh)
    shapes = jax.eval_shape(learnt.init_params, jax.random.key(0))
    abstract = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shard_params(shapes, mesh)
    )
    params = load_weights(origin, learnt.model, "question_answering", learnt.init_params, config.seed)(abstract)
    save_pretrained(folder / "first", learnt.model, params, tokenizer, head="question_answering")

    theirs = hf.AutoModelForQuestionAnswering.from_pretrained(folder / "first").train()
    free = [p for name, p in theirs.named_parameters() if re.search("bias|LayerNorm|embeddings", name)]
    decayed = [p for name, p in theirs.named_parameters() if not re.search("bias|LayerNorm|embeddings", name)]
    o = config.optimizer
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": free, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps)
    warmup, losses = o.warmup * config.steps, []
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = o.learning_rate * min((step + 1) / warmup, (config.steps - step) / (config.steps - warmup))
        batch = {name: torch.tensor(array).long() for name, array in learnt.batch(step).items()}
        found = theirs(
            input_ids=batch["input_ids"],
            attention_mask=batch["segment_ids"],
            token_type_ids=batch["token_type_ids"],
        )
        padding = batch["segment_ids"] == 0
        both = [logits.masked_fill(padding, -torch.inf) for logits in (found.start_logits, found.end_logits)]
        ends = [torch.nn.functional.cross_entropy(*pair) for pair in zip(both, batch["span"].T, strict=True)]
        loss = sum(ends) / 2
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), o.clip_norm)
        adam.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_export_has_the_same_scores_in_transformers(there, trained, tmp_path, kind, capsys):
    run = trained.path
    if kind == "decoder":
        run = tmp_path / "run"
        main(config_for(there, run, there.decoder, steps=2))
        assert "an encoder (mlm) answers better" in " ".join(capsys.readouterr().out.split())
    export_model(ExportConfig(str(run), str(tmp_path / "exported")))
    model = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "exported").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "exported")
    row = lines_of(run / "predictions.jsonl")[0]
    tokens = tokenizer(row["question"], row["context"], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**tokens)
    expected = torch.stack([theirs.start_logits[0], theirs.end_logits[0]], dim=-1).numpy()
    ours = espalier.load(run)
    [window] = windows_of(ours.tokenizer, [(row["question"], row["context"])], 64, 32, kind == "decoder").rows
    assert window.example.ids.tolist() == tokens["input_ids"][0].tolist()
    np.testing.assert_allclose(ours.outputs_of_head([window.example])[0][: len(expected)], expected, atol=1e-4)

    # The threshold goes with the weights.
    [found] = espalier.load(f"hf:{tmp_path / 'exported'}").answer(row["question"], row["context"])
    assert found["answer"] == row["answer"] and found["no_answer"] == pytest.approx(row["no_answer"], abs=1e-3)


def test_predict_writes_answers_beside_their_rows(there, trained, tmp_path):
    rows = lines_of(trained.path / "predictions.jsonl")[:3]
    asked = [{name: row[name] for name in ("id", "question", "context")} for row in rows]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*asked, {"question": "who?"}]))
    config = PredictConfig(
        str(trained.path), data=PredictData((str(tmp_path / "asked.jsonl"),)), output=str(tmp_path / "answers.jsonl")
    )
    predict(config)
    *found, bad = lines_of(tmp_path / "answers.jsonl")
    for got, row in zip(found, rows, strict=True):
        assert (
            got.keys() == {*("id", "question", "context", "answer", "score", "begin", "end", "no_answer", "n_best")}
            and got["answer"] == row["answer"]
        )
    assert "a row has both, and this one question" in bad["error"]
    # The file that was measured on, as it is.
    predict(dataclasses.replace(config, data=PredictData((there.validation,))))
    found, rows = lines_of(tmp_path / "answers.jsonl"), lines_of(trained.path / "predictions.jsonl")
    assert [row["answer"] for row in found] == [row["answer"] for row in rows] and found[0]["id"] and found[0]["title"]


def test_chinese_is_measured_by_characters(there, trained, tmp_path):
    """By a model that knows none of its characters: what it is measured by hangs on the file alone."""
    path = tmp_path / "zh.jsonl"
    context = "北京大学创办于1898年，初名京师大学堂。"
    row = {
        "question": "北京大学创办于哪一年？",
        "context": context,
        "answers": {"text": ["1898年"], "answer_start": [7]},
    }
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="gb18030")
    model = espalier.load(trained.path)
    with pytest.raises(UserError, match="iconv|--data.encoding"):
        find("question_answering").evaluate(model, AnswerData(validation=str(path)))
    evaluation = find("question_answering").evaluate(model, AnswerData(validation=str(path), encoding="gb18030"))
    assert "f1_in_order" in evaluation.metrics and "has_answer_em" not in evaluation.metrics
    words = AnswerData(validation=str(path), encoding="gb18030", score_by="words")
    assert "f1_in_order" not in find("question_answering").evaluate(model, words).metrics


def test_the_loss_is_that_of_transformers_and_micro_batches_add_up(tmp_path):
    """BertForQuestionAnswering's own, on rows without padding; padding and empty rows then change nothing."""
    model = dataclasses.replace(ENCODER, hidden_dropout=0.0, attention_dropout=0.0)
    params = random_params(model, ("question_answering",))
    save_pretrained(tmp_path / "bert", model, params, head="question_answering")
    theirs = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "bert").eval()
    rng = np.random.default_rng(0)
    ids, span = rng.integers(5, 300, (4, 12)), np.array([[0, 0], [3, 5], [7, 7], [2, 11]])
    first, last = torch.tensor(span).T
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), start_positions=first, end_positions=last).loss.item()

    segments = np.pad(np.ones((4, 12), np.int32), ((0, 2), (0, 4)))
    batch = {
        "input_ids": np.pad(ids, ((0, 2), (0, 4))).astype(np.int32),
        "segment_ids": segments,
        "positions": np.arange(16, dtype=np.int32) * segments,
        "token_type_ids": np.zeros((6, 16), np.int32),
        "span": np.pad(span, ((0, 2), (0, 0))).astype(np.int32),
        "example_weights": np.array([1, 1, 1, 1, 0, 0], np.float32),
    }
    objective = answering_objective(model, execution=Execution())
    prepared, norms = objective.prepare(batch, jax.random.key(0), 0, False)

    @jax.jit
    def run(part):
        differentiated = jax.value_and_grad(
            lambda p: objective.loss(p, part, jax.random.key(0), norms, False), has_aux=True
        )
        (loss, sums), grads = differentiated(params)
        return loss, sums, grads

    loss, sums, grads = run(prepared)
    assert loss == pytest.approx(expected, rel=1e-5) and sums["loss"][1] == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    halves = [run({name: value[start::2] for name, value in prepared.items()}) for start in (0, 1)]
    together = jax.tree.map(jnp.add, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), together, (loss, sums, grads))


def test_articles_are_held_out_by_their_titles(there):
    questions = read_questions(there.two).questions
    kept, held = split_by_article(questions, 0.2)
    titles = [{question.title for question in part} for part in (kept, held)]
    assert len(titles[1]) == 2 and not titles[0] & titles[1] and len(kept) + len(held) == 96
    # Whatever the order of the file, and whatever questions it has of an article.
    assert {q.title for q in split_by_article(questions[::-1], 0.2)[1]} == titles[1]
    assert {q.title for q in split_by_article(questions[::3], 0.2)[1]} == titles[1]
    bare = [question._replace(title="") for question in questions]
    kept, held = split_by_article(bare, 0.2)
    assert not {q.context for q in kept} & {q.context for q in held} and 0.1 < len(held) / 96 < 0.3
    with pytest.raises(UserError, match="on one context"):
        split_by_article([questions[0]] * 3, 0.2)


def test_a_threshold_needs_questions_of_both_kinds(there, tmp_path):
    """Of one kind alone, any threshold beyond all scores would do: then no question, or each, were given an answer."""
    questions = read_questions(there.two).questions
    tokenizer = load_tokenizer(there.encoder / "tokenizer")
    asked = [question for question in questions if not question.answers][:3]
    model, how = espalier.load(there.encoder), Answering(64, threshold=0.0)
    head = "question_answering"
    model = dataclasses.replace(model, head=head, params=random_params(model.config, (head,)))
    both = [*asked, *(question for question in questions if question.answers)][:6]
    for some, expected in ((asked, True), (both[3:], True), (both, False)):
        found = chosen_threshold(model, part_of(some, tokenizer, 64, 16, False), how, "words")
        assert (found == 0.0) == expected
    # A file whose only context has such questions, with another one to measure on.
    one = [row for row in json.loads(pathlib.Path(there.two).read_text())["data"][0]["paragraphs"] if row["qas"]][0]
    asked = [one["qas"][0], {"id": "x", "question": "who has none ?", "answers": []}]
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"data": [{"title": "a", "paragraphs": [{**one, "qas": asked}]}]}))
    with pytest.raises(UserError, match="cannot be divided; .*one.json has questions without an answer"):
        main(config_for(there, tmp_path / "run", data=AnswerData(train=str(path), validation=there.validation)))
    path.write_text(json.dumps({"data": [{"title": str(at), "paragraphs": [
        {"context": f"{at} ann has it", "qas": [{"id": at, "question": "who ?", "answers": answers}]}]}
        for at, answers in enumerate([[], [], [{"text": "ann", "answer_start": 2}]])]}))  # fmt: skip
    facts = read_parts(AnswerData(train=str(path), validation=there.validation), tokenizer, ENCODER).facts
    assert sum("on which the no-answer threshold is chosen has " in fact for fact in facts) == 1


def test_the_layouts_say_the_same(there, tmp_path):
    nested = read_questions(there.two).questions
    flat = tmp_path / "flat.jsonl"
    rows = [
        {
            "id": question.name.split()[-1],
            "title": question.title,
            "question": question.question,
            "context": question.context,
            "answers": {"text": list(question.answers), "answer_start": list(question.begins)},
        }
        for question in nested
    ]
    flat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps([{**row, "answers": _listed(row["answers"])} for row in rows]))
    lines = tmp_path / "articles.jsonl"
    articles = json.loads(pathlib.Path(there.two).read_text())["data"]
    lines.write_text("".join(json.dumps(article) + "\n" for article in articles))
    for path in (flat, listed, lines):
        found = read_questions(str(path)).questions
        assert [q._replace(name="") for q in found] == [q._replace(name="") for q in nested], path


def _listed(answers: dict) -> list[dict]:
    return [{"text": t, "answer_start": at} for t, at in zip(answers["text"], answers["answer_start"], strict=True)]


ROW = {"question": "Who?", "context": "The play is by Marlowe.", "answers": {"text": ["Marlowe"], "answer_start": [15]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["Marlowe"], "answer_start": [14]}, "id": "x7"},
         "question x7: the answer 'Marlowe' is not at answer_start 14, where ' Marlow' stands; it stands at 15"),
        ({"answers": {"text": ["Kyd"], "answer_start": [90]}},
         "at answer_start 90, where the context has no text; it is nowhere in its context"),
        ({"answers": {"text": ["Kyd"], "answer_start": [-1]}}, "is not at answer_start -1"),
        ({"answers": {"text": ["Marlowe"], "answer_start": ["15"]}}, "answer_start is '15'; expected the number"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "an answer without text; a question that has none has"),
        ({"answers": {"text": "Marlowe", "answer_start": 15}}, "lists of one length"),
        ({"answers": None}, "has no answers; write \\[\\] where"),
        ({"context": " "}, "no text under 'context'"),
        ({"is_impossible": True}, "is_impossible, and has the answer 'Marlowe'"),
        ({"question": None}, "no text under 'question'"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW | change) + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_questions(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_what_a_run_cannot_start_from_is_refused(there, tmp_path):
    for data, message in (
        (dict(train=there.one), "no --data.validation FILE given: .* --data.holdout 0.2"),
        (dict(validation=there.one), "no --data.train FILE"),
        (dict(train=there.one, validation=there.one, holdout=0.2), "both data.validation and data.holdout"),
        (dict(train=str(tmp_path / "none.json"), holdout=0.2), "no file"),
    ):
        with pytest.raises(UserError, match=message):
            main(config_for(there, tmp_path / "run", data=AnswerData(**data)))
    for wrong in (dict(holdout=1.0), dict(stride=-1), dict(threshold_part=0.0)):
        with pytest.raises(UserError, match="data"):
            AnswerData(train="a", **wrong)
    for name, content in (("empty", '{"data": []}'), ("none", '{"data": [{"title": "a", "paragraphs": []}]}')):
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises(UserError, match="holds no questions; expected SQuAD's JSON"):
            read_questions(str(tmp_path / f"{name}.json"))
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    with pytest.raises(UserError, match="neither SQuAD's JSON .* there are the fields 'rows'"):
        read_questions(str(other))
    assert not (tmp_path / "run").exists()


def test_xquad_is_read_as_it_is(shared_data):
    questions = read_questions(str(shared_data / "xquad" / "xquad.en.json")).questions
    assert len(questions) == 1190 and len({question.title for question in questions}) == 48
    kept, held = split_by_article(questions, 0.2)
    assert len({question.title for question in held}) == 10 and len(held) == 238


def test_the_report_marks_both_answers():
    row = {
        "question": "谁写的？", "context": f"这部戏是<马洛>写的。{'x' * 400}马洛", "answers": ["马洛"], 
        "begins": [5], "answer": "<马洛>写", "begin": 4, "end": 9, "score": 0.4, "f1": 0.8, "em": 0.0, "n_best": [],
    }  # fmt: skip
    found = entry(row)
    assert "这部戏是<mark>&lt;</mark><mark><u>马洛</u></mark><mark>&gt;写</mark>的。" in found and "lang=zh" in found
    assert found.count("x") < 200 and "…" in found
    none = entry(row | {"answer": "", "begin": None, "end": None, "answers": [], "begins": []})
    assert "no answer" in none and "it has none" in none and "<mark>" not in none
