"""Multiple choice by likelihood: scores and loss against PyTorch, files, minimal pairs, runs, and what is refused."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from test_objective_contract import after, assert_same
from tiny_models import BERT, LLAMA, strict_and_quick  # noqa: F401
from tiny_runs import write_run

from espalier import load
from espalier.commands.evaluate import record_of
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.predict.choose import Asked, encode, joined, scores
from espalier.predict.use import use_of
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneOptimizer
from finetune.tasks.choose.files import read_both, read_questions
from finetune.tasks.choose.record import ChooseConfig, ChooseData
from finetune.tasks.choose.task import ChoiceBatches, choice_objective, measure
from finetune.train import main
from sharding.mesh import MeshConfig

SMALL = dict(num_hidden_layers=1, max_position_embeddings=96, hidden_dropout=0.1, attention_dropout=0.1)
DECODER, ENCODER = (dataclasses.replace(model, **SMALL) for model in (LLAMA, BERT))
FRUIT, TOOLS = "apple pear plum 苹果 梨子".split(), "saw axe plane 锯子 锤子".split()


def question_rows(count: int, seed: int) -> list[dict]:
    """In two languages, some with a third choice: what can be eaten is right."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        choices = [f"the {random.choice(FRUIT)}", f"the {random.choice(TOOLS)}"] + ["锤子"] * (number % 3 == 0)
        order = random.permutation(len(choices))
        asked = f"what can we eat {number % 5}?" if number % 2 else f"什么可以吃{number % 5}？"
        rows.append(
            {"question": asked, "choices": [choices[at] for at in order], "label": int(np.flatnonzero(order == 0)[0])}
        )
    return rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("choose")
    texts = [" ".join((row["question"], *row["choices"])) for row in question_rows(80, 0)]
    return SimpleNamespace(
        root=root,
        decoder=write_run(root / "decoder", DECODER, texts),
        encoder=write_run(root / "encoder", ENCODER, texts),
        train=write_jsonl(root / "train.jsonl", question_rows(48, 1)),
        validation=write_jsonl(root / "validation.jsonl", question_rows(15, 2)),
    )


def config_for(there, run_dir, **changes) -> ChooseConfig:
    defaults = dict(
        init_from=str(there.decoder),
        run_dir=str(run_dir),
        steps=60,
        batch_size=8,
        eval_every=30,
        data=ChooseData(train=there.train, validation=there.validation),
        optimizer=FinetuneOptimizer(learning_rate=1e-2),
        dropout=0.0,
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(2, 2, 2),
    )
    return ChooseConfig(**defaults | changes)


def logprobs(model, ids) -> torch.Tensor:
    """PyTorch's log-softmax over the logits of one row by itself."""
    rows = {"input_ids": np.array([ids], np.int32), "attention_mask": np.ones((1, len(ids)), np.int32)}
    return torch.log_softmax(torch.tensor(np.array(model.logits(rows)[0])), -1)


ASKED = [
    Asked("what can we eat?", ("the apple", "the old saw", "it")),
    Asked("什么可以吃？", ("苹果", "锤子")),
    Asked("", ("a whole text", "another one 梨子")),
]


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_scores_are_brute_force(there, kind):
    """Σ log p of the choice's tokens: given those before (decoder), or all others (encoder); by tokens and by bytes."""
    model = load(getattr(there, kind))
    tokenizer = model.tokenizer
    found = scores(model, ASKED)
    for asked, found_3C in zip(ASKED, found, strict=True):
        for at, choice in enumerate(asked.choices):
            blank = " " if asked.question.isascii() and asked.question else ""
            ids = tokenizer(asked.question + blank + choice, add_special_tokens=False).input_ids
            before = len(tokenizer(asked.question, add_special_tokens=False).input_ids) if asked.question else 0
            if kind == "decoder":
                framed = [tokenizer.bos_token_id, *ids]
                given = logprobs(model, framed)
                expected = sum(float(given[place - 1, framed[place]]) for place in range(before + 1, len(framed)))
            else:
                framed = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
                expected = 0.0
                for place in range(before + 1, len(framed) - 1):
                    masked = [*framed[:place], tokenizer.mask_token_id, *framed[place + 1 :]]
                    expected += float(logprobs(model, masked)[place, framed[place]])
            divided = [expected, expected / (len(ids) - before), expected / len(choice.encode())]
            np.testing.assert_allclose(found_3C[:, at], divided, rtol=1e-4)


def test_tokens_of_a_choice_are_its_own_and_questions_lose_their_beginning(there):
    tokenizer = load(there.decoder).tokenizer
    assert joined("what?", "it") == ("what? it", 5) and joined("什么？", "它") == ("什么？它", 3)
    assert joined("ท้องฟ้า", "สี") == ("ท้องฟ้าสี", 7) and joined("하늘은", "파란") == ("하늘은 파란", 3)
    assert joined("a \n", "b") == ("a \nb", 3) and joined("a ", "b") == ("a b", 1) and joined("", " b") == (" b", 0)
    ((first, second),) = encode(tokenizer, [Asked("what can we eat?", ("the apple", "苹果"))], 64)
    assert tokenizer.decode(first.ids[-first.own :]).strip() == "the apple" and first.bytes == 9
    assert tokenizer.decode(second.ids[-second.own :]).strip() == "苹果" and second.bytes == 6
    ((short, _),) = encode(tokenizer, [Asked("what can we eat? " * 20, ("the apple", "苹果"))], 12)
    assert short.cut and len(short.ids) == 12 and short.ids[-short.own :] == first.ids[-first.own :]
    with pytest.raises(UserError, match="question 1: the choice 'the apple' has .* room for 1 to 2; shorten"):
        encode(tokenizer, [Asked("a", ("the apple", "b"))], 2)


@pytest.mark.parametrize("normalize", ["none", "bytes"])
def test_the_loss_is_pytorchs_and_is_sharded_alike(there, normalize):
    model = load(there.decoder)
    config = dataclasses.replace(model.config, hidden_dropout=0.0, attention_dropout=0.0)
    rows = question_rows(8, 5)
    asked = [Asked(row["question"], tuple(row["choices"])) for row in rows]
    choices, right = encode(model.tokenizer, asked, 32), [row["label"] for row in rows]
    specials = dict(bos=model.tokenizer.bos_token_id, pad_id=model.tokenizer.pad_token_id)
    batches = ChoiceBatches(choices, right, 8, 0, most=3, normalize=normalize, max_length=32, **specials)
    (batch,) = batches.fixed()
    assert batch["input_ids"].shape[:2] == (8, 3) and batch["right"].tolist() == right
    objective = choice_objective(config, execution=Execution())
    prepared, norms = objective.prepare(batch, jax.random.key(0), 0, True)
    loss, sums = jax.jit(lambda part: objective.loss(model.params, part, jax.random.key(0), norms, True))(prepared)
    found = [torch.tensor(one[0 if normalize == "none" else 2])[None] for one in scores(model, asked)]
    losses = [
        torch.nn.functional.cross_entropy(one, torch.tensor([label])) for one, label in zip(found, right, strict=True)
    ]
    assert float(loss) == pytest.approx(float(sum(losses)) / 8, rel=1e-4) and float(sums["loss"][1]) == 8
    if normalize == "none":
        one = after(objective, model.params, batch)
        assert_same(after(objective, model.params, batch, MeshConfig(2, 2, 2), accumulation=2), one)
    # Parts of a batch are the batch, and empty questions count nothing.
    whole, halves = batches.batch(3), [batches.batch(3, part) for part in (slice(0, 5), slice(5, 8))]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)
    uneven = ChoiceBatches(choices[:5], right[:5], 4, 0, most=3, normalize="none", max_length=32, **specials).fixed()
    assert [float(one["example_weights"][:, 0].sum()) for one in uneven] == [4, 1]


# Files


def test_files_of_many_kinds_say_the_same(tmp_path):
    expected = ([Asked("what is ripe?", ("a plum", "an axe")), Asked("什么锋利？", ("李子", "斧头"))], [0, 1])
    (tmp_path / "a.csv").write_text(
        "question,choice1,choice2,label\nwhat is ripe?,a plum,an axe,0\n什么锋利？,李子,斧头,1\n"
    )
    (tmp_path / "b.tsv").write_text(
        "goal\tsol1\tsol2\tanswer\nwhat is ripe?\ta plum\tan axe\tA\n什么锋利？\t李子\t斧头\tB\n"
    )
    files = [str(tmp_path / "a.csv"), str(tmp_path / "b.tsv")]
    lists = [["a plum", "an axe"], ["李子", "斧头"]]
    questions = ["what is ripe?", "什么锋利？"]
    kinds = (
        lambda at: {"question": questions[at], "choices": lists[at], "label": at},
        lambda at: {"ctx": questions[at], "endings": lists[at], "label": str(at)},
        lambda at: {"question": questions[at], "choices": lists[at], "answer": lists[at][at]},
        lambda at: {"question": questions[at], "options": lists[at], "answer": at + 1},
        lambda at: {"question": questions[at], "choices": {"text": lists[at], "label": list("12")}, "gold": "12"[at]},
        lambda at: {"question": questions[at], "choices": {"text": lists[at], "label": ["C", "D"]}, "answer": "CD"[at]},
    )  # fmt: skip
    files += [write_jsonl(tmp_path / f"{number}.jsonl", map(kind, (0, 1))) for number, kind in enumerate(kinds)]
    for file in files:
        read = read_questions(ChooseData(validation=file), "validation")
        assert (read.asked, read.labels) == expected, file
        assert ("1 is the first" in read.facts[-1]) == file.endswith("3.jsonl")
    rows = [{"context": "A plum.", "question": "Ripe?", "a": "yes", "b": "no", "right": "yes"}]
    data = ChooseData(validation=write_jsonl(tmp_path / "own.jsonl", rows), choices=("a", "b"), label="right")
    assert read_questions(data, "validation").asked == [Asked("A plum.\nRipe?", ("yes", "no"))]


def test_labels_that_are_numbers_are_places_or_texts_by_the_whole_file(tmp_path):
    """Choices may be numbers themselves; what one file leaves open, the other may say."""

    def read(rows, name="validation"):
        return read_questions(ChooseData(**{name: write_jsonl(tmp_path / "rows.jsonl", rows)}), name)

    sums = [["3", "4", "5"], ["7", "1", "2"], ["0.0", "1.0", "2.0"]]
    for rights, expected in (
        (["4", "7", "2.0"], [1, 0, 2]),
        (["1", "0", "2.0"], [1, 0, 2]),
        ([1, 0, 2.0], [1, 0, 2]),
        ([3, 1, 2], [2, 0, 1]),
    ):
        found = read([{"choices": sums[at], "label": right} for at, right in enumerate(rights)])
        assert found.labels == expected, rights
        assert ("always the text of a choice" in found.facts[-1]) == (rights[0] == "4")
    with pytest.raises(UserError, match="rows.jsonl:1: '1111.* names none of the 3 choices"):
        read([{"choices": sums[0], "label": "1" * 5000}])

    three = ["plum", "pear", "axe"]
    said = write_jsonl(tmp_path / "said.jsonl", [{"choices": three, "label": at} for at in (3, 1)])
    left_open = write_jsonl(tmp_path / "open.jsonl", [{"choices": three, "label": at} for at in (1, 2)])
    for train, validation in ((said, left_open), (left_open, said)):
        by_file = {file.path: file for file in read_both(ChooseData(train=train, validation=validation))}
        assert by_file[said].labels == [2, 0] and by_file[left_open].labels == [0, 1]
        assert "as in the other file" in by_file[left_open].facts[-1]
    assert read_questions(ChooseData(validation=left_open), "validation").labels == [1, 2]
    assert read_questions(ChooseData(validation=left_open), "validation", from_one=True).labels == [0, 1]


def test_minimal_pairs_of_blimp_are_measured_by_paradigm(there, shared_data, tmp_path):
    folder = tmp_path / "blimp"
    folder.mkdir()
    for name in ("anaphor_gender_agreement", "wh_island"):
        lines = (shared_data / "blimp" / f"{name}.tsv").read_text().splitlines()[:6]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    model = load(there.decoder)
    evaluation = measure(model, ChooseData(validation=str(folder)))
    right = {name: [] for name in ("anaphor_gender_agreement", "wh_island")}
    for name, found in right.items():
        for line in (folder / f"{name}.tsv").read_text().splitlines():
            likely = []
            for sentence in line.split("\t"):
                ids = [model.tokenizer.bos_token_id, *model.tokenizer(sentence, add_special_tokens=False).input_ids]
                loss = torch.nn.functional.nll_loss(logprobs(model, ids)[:-1], torch.tensor(ids[1:]), reduction="sum")
                likely.append(-float(loss))
            found.append(likely[0] > likely[1])
    measured = evaluation.metrics["paradigms"]
    assert {name: measured[name] for name in right} == {name: np.mean(found) for name, found in right.items()}
    assert (
        evaluation.metrics["accuracy"] == np.mean([*right.values()]) and evaluation.metrics["baseline_accuracy"] == 0.5
    )
    assert evaluation.rows[7]["paradigm"] == "wh_island" and evaluation.files["paradigms.json"]
    whole = read_questions(ChooseData(validation=str(shared_data / "blimp")), "validation")
    assert len(whole.asked) == 67_000 and len(set(whole.paradigms)) == 67
    assert "67,000 minimal pairs of 67 files" in whole.facts[0] and "twice the same sentence" in whole.facts[0]
    alone = read_questions(ChooseData(validation=str(folder / "wh_island.tsv")), "validation")
    assert len(alone.asked) == 6 and alone.paradigms == [] and "6 minimal pairs" in alone.facts[0]


def test_encoders_are_measured_and_ties_are_wrong(there, tmp_path):
    assert record_of({}, "masked_lm", "multiple_choice").name == "multiple_choice"
    with pytest.raises(UserError, match="head causal_lm or masked_lm, and this one has embedding"):
        record_of({}, "embedding", "multiple_choice")
    rows = [{"question": "什么可以吃？", "choices": ["苹果", "苹果"], "label": at % 2} for at in range(4)]
    data = ChooseData(validation=write_jsonl(tmp_path / "rows.jsonl", rows))
    found = measure(load(there.encoder), data).metrics
    names = ("accuracy", *(f"accuracy_by_{name}" for name in ("sum", "tokens", "bytes")))
    assert found == dict.fromkeys(names, 0) | {"accuracy_interval": [0, 0], "baseline_accuracy": 0.5}


# Runs


def test_a_decoder_learns_to_choose_and_a_resumed_run_ends_alike(there, tmp_path, capsys):
    whole, parts, folder = tmp_path / "whole", tmp_path / "parts", tmp_path / "exported"
    before = measure(load(there.decoder), ChooseData(validation=there.validation)).metrics
    metrics = main(config_for(there, whole, export=str(folder)))["metrics"]
    assert metrics["accuracy"] == 1.0 > before["accuracy"]
    assert metrics["baseline_accuracy"] == before["baseline_accuracy"] == pytest.approx((10 / 2 + 5 / 3) / 15)
    out = " ".join(capsys.readouterr().out.split())
    assert "result accuracy 100.0 % (baseline 44.4 %)" in out and "48 questions with 2 to 3 choices" in out
    rows = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 15 and rows[0]["question"] == "什么可以吃0？" and rows[0]["prediction"] == rows[0]["label"]
    assert "divided by tokens" in (whole / "report.html").read_text()
    assert not main(config_for(there, parts, stop_at=30))["finished"]
    assert main(config_for(there, parts))["finished"]
    assert (parts / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()

    model = load(whole)
    use = use_of(model)
    assert (
        use.name == "choose"
        and use.answers(model, [use.reads({"context": "eat", "choices": ["the axe", "苹果"]})])[0]["label"] == 1
    )
    found = model.choose("什么可以吃3？", ["the old 锯子", "the pear"])
    assert found["choice"] == "the pear" and found["label"] == 1 and found["probability"] == found["probabilities"][1]
    assert math.fsum(found["probabilities"]) == pytest.approx(1)
    # The export is a language model of transformers, with the same likelihoods.
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer("什么可以吃3？the pear", add_special_tokens=False).input_ids]]
    )
    own = len(ids[0]) - 1 - len(tokenizer("什么可以吃3？", add_special_tokens=False).input_ids)
    with torch.no_grad():
        logprob = torch.log_softmax(theirs(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[-own:].sum()
    assert found["log_likelihoods"][1] == pytest.approx(float(logprob), rel=1e-4)
    again = load(f"hf:{folder}").choose("什么可以吃3？", ["the old 锯子", "the pear"], normalize="none")
    assert again["log_likelihoods"] == pytest.approx(found["log_likelihoods"], rel=1e-5)


ROW = {"question": "a?", "choices": ["b", "c"], "label": 0}
BAD = {
    "no file": (dict(train=None), "no --data.train FILE given"),
    "one choice": ([ROW | {"choices": ["b"]}], "rows.jsonl:1: two or more choices"),
    "empty choice": ([ROW, ROW | {"choices": ["b", " "]}], "rows.jsonl:2: two or more choices"),
    "no list": ([ROW, ROW | {"choices": "b"}], "rows.jsonl:2: 'choices' is no list"),
    "no choices": ([{"question": "a", "label": 0}], "which column holds the choices.*--data.choices"),
    "no label": ([{"question": "a", "choices": ["b", "c"]}], "which column holds the right answer.*--data.label"),
    "empty label": ([ROW | {"label": None}], "rows.jsonl:1: nothing under 'label' says which choice is right"),
    "label too high": ([ROW, ROW | {"label": 2}], "rows.jsonl:2: '2' under 'label' names none of the 2 choices"),
    "another text": ([ROW | {"label": "x"}], "'x' under 'label' names none of the 2 choices"),
    "wrong column": (dict(question=("ask",)), "no column 'ask'; its columns are 'question', 'choices', 'label'"),
    "empty folder": ({}, "has no .tsv or .jsonl of minimal pairs"),
    "a pair of one": ("a\tb\nc\n", "pairs.tsv:2: expected an acceptable and an unacceptable"),
    "long choice": ([ROW | {"choices": ["b " * 120, "c"]}], "question 1: the choice 'b b b.*room for 1 to 96"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_one_line_and_leaves_nothing(there, tmp_path, case):
    given, message = BAD[case]
    changes = dict(train=there.train, validation=there.validation)
    if isinstance(given, list):
        changes["train"] = write_jsonl(tmp_path / "rows.jsonl", given)
    elif isinstance(given, str):
        (tmp_path / "pairs.tsv").write_text(given)
        changes["train"] = str(tmp_path / "pairs.tsv")
    elif not given:
        (tmp_path / "empty").mkdir()
        changes["train"] = str(tmp_path / "empty")
    else:
        changes |= given
    with pytest.raises(UserError, match=message) as error:
        main(config_for(there, tmp_path / "run", data=ChooseData(**changes)))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_models_and_rows_that_will_not_do(there, tmp_path):
    with pytest.raises(UserError, match="choose trains decoders, and this model is an encoder"):
        main(config_for(there, tmp_path / "run", init_from=str(there.encoder)))
    model = load(there.decoder)
    for question, choices in (("a", ["b"]), ("a", ["b", ""]), ("a", [])):
        with pytest.raises(UserError, match="no choices: a row has question"):
            model.choose(question, choices)
    classifier = dataclasses.replace(model, head="sequence_classification")
    with pytest.raises(UserError, match="by a language model, and this model has the head sequence_classification"):
        classifier.choose("a", ["b", "c"])
    assert not (tmp_path / "run").exists()
