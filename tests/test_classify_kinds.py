"""Numbers and several labels a text: learnt, measured against scipy and scikit-learn, exported, predicted."""

import dataclasses
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score
from tiny_runs import write_run

import espalier
from espalier.errors import UserError
from espalier.intervals import bootstrap, mean_interval
from espalier.models.config import Execution, ModelConfig
from espalier.models.transformer import init_params
from espalier.predict.outputs import softmax
from espalier.report.card import model_card
from finetune.calibration import best_threshold, calibration_error, fitted_temperature
from finetune.config import FinetuneOptimizer
from finetune.tasks.classify import metrics as figures
from finetune.tasks.classify.examples import drawn_alike
from finetune.tasks.classify.record import CLASSIFICATION, ClassifyConfig, ClassifyData
from finetune.tasks.classify.task import class_logits, class_weights, classification_objective, finalized
from finetune.train import main
from sharding.mesh import MeshConfig

MODEL = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, type_vocab_size=2,
    max_position_embeddings=24, hidden_dropout=0.1, attention_dropout=0.1, classifier_pooling="mean",
)  # fmt: skip
COLOURS, SIZES = "red blue 绿色".split(), "tiny large".split()


def rows(count: int, seed: int) -> list[dict]:
    """Texts with colours and sizes in them: as lists, and as a number (how many there are, and a half for a size)."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        said = [word for word in COLOURS + SIZES if random.random() < 0.4]
        text = " ".join(random.permutation(["a", "bird", "sits", *said]))
        number = sum(word in COLOURS for word in said) + 0.5 * sum(word in SIZES for word in said)
        found.append({"text": text, "labels": said, "number": number})
    return found


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    files = {}
    for name, count in (("train", 160), ("validation", 60)):
        files[name] = root / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(count, count)))
    encoder = write_run(root / "encoder", MODEL, [row["text"] for row in rows(300, 1)])
    return SimpleNamespace(root=root, encoder=str(encoder), **{name: str(path) for name, path in files.items()})


def config_for(there, run_dir, **data) -> ClassifyConfig:
    return ClassifyConfig(
        init_from=there.encoder,
        run_dir=str(run_dir),
        steps=120,
        batch_size=16,
        eval_every=120,
        data=ClassifyData(train=there.train, validation=there.validation, text=("text",), examples_per_row=0, **data),
        optimizer=FinetuneOptimizer(learning_rate=5e-3),
        mesh=MeshConfig(2, 1, 1),
    )


def test_numbers_are_learnt_and_measured(there, tmp_path, capsys):
    summary = main(config_for(there, tmp_path / "run", label="number"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("labels: column 'number' holds numbers from 0 to 3.5, among them decimals (0.5, ")
    found = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    labels, predictions = (np.array([row[name] for row in found]) for name in ("label", "prediction"))
    metrics = summary["metrics"]
    assert metrics["pearson"] == pytest.approx(pearsonr(labels, predictions).statistic) and metrics["pearson"] > 0.8
    assert metrics["spearman"] == pytest.approx(spearmanr(labels, predictions).statistic)
    assert metrics["rmse"] < 0.7 * metrics["baseline_rmse"]
    low, high = metrics["pearson_interval"]
    assert low < metrics["pearson"] < high
    assert summary["eval"]["pearson"] == pytest.approx(metrics["pearson"], abs=1e-4)
    model = espalier.load(tmp_path / "run")
    assert model.config.problem_type == "regression" and model.config.labels == ("number",)
    scores = [result["score"] for result in model.classify([row["text"] for row in found])]
    np.testing.assert_allclose(scores, predictions, atol=1e-5)
    again = CLASSIFICATION.evaluate(model, ClassifyData(validation=there.validation, text=("text",), label="number"))
    assert again.metrics["spearman"] == pytest.approx(metrics["spearman"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Pearson, 95 % between" in page and "squared error over the steps" in page and "nats per" not in page
    card = model_card(tmp_path / "run")
    assert f"| Pearson correlation | {metrics['pearson']:.4g} (95 %: {low:.4g} to {high:.4g}) |" in card
    assert "loss (squared error)" in card


def test_several_labels_a_text_are_learnt_and_measured(there, tmp_path, capsys):
    summary = main(config_for(there, tmp_path / "run", label="labels"))
    said = capsys.readouterr().out
    assert said.startswith("labels: column 'labels' holds lists; several of 5 labels may be right")
    found = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    names = sorted(COLOURS + SIZES)
    labels, predictions = (
        np.array([[name in row[key] for name in names] for row in found]) for key in ("labels", "predictions")
    )
    metrics = summary["metrics"]
    for key, average in (("f1", "micro"), ("macro_f1", "macro")):
        assert metrics[key] == pytest.approx(f1_score(labels, predictions, average=average))
    assert metrics["accuracy"] == pytest.approx((labels == predictions).all(1).mean())
    assert metrics["f1"] > metrics["majority_f1"] + 0.1 and metrics["accuracy"] > metrics["majority"]
    assert summary["eval"]["f1"] == pytest.approx(metrics["f1"], abs=1e-6)
    model = espalier.load(tmp_path / "run")
    results = model.classify([row["text"] for row in found])
    assert [result["labels"] for result in results] == [row["predictions"] for row in found]
    # What the text says is more probable than what it does not, label by label.
    said = np.array([[name in row["text"].split() for name in names] for row in found])
    chances = np.array([[result["probabilities"][name] for name in names] for result in results])
    assert all(chances[said[:, at], at].mean() > chances[~said[:, at], at].mean() for at in range(len(names)))


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_those_of_pytorch(problem, weighted):
    if weighted and problem == "regression":
        return
    labels = ("score",) if problem == "regression" else ("a", "b", "c")
    model = dataclasses.replace(MODEL, labels=labels, problem_type=problem)
    params = init_params(model, jax.random.key(0), heads=("sequence_classification",))
    random = np.random.default_rng(0)
    params["head"]["sequence_classification"]["out"]["kernel"] = random.normal(size=(32, len(labels))).astype("f4")
    targets = {
        None: random.integers(0, 3, 6).astype(np.int32),
        "multi_label_classification": random.integers(0, 2, (6, 3)).astype(np.int32),
        "regression": random.normal(size=6).astype(np.float32),
    }[problem]
    batch = {
        "input_ids": random.integers(0, 300, (6, 8)).astype(np.int32),
        "segment_ids": np.ones((6, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (6, 1)),
        "labels": targets,
        "example_weights": np.ones(6, np.float32),
    }
    weights = np.array([0.5, 1, 3], np.float32) if weighted else None
    objective = classification_objective(model, execution=Execution(), weights=weights)
    prepared, norms = objective.prepare(batch, jax.random.key(0), 0, True)
    still = dataclasses.replace(model, hidden_dropout=0.0, attention_dropout=0.0)
    objective = classification_objective(still, execution=Execution(), weights=weights)
    loss, _ = jax.jit(lambda: objective.loss(params, prepared, jax.random.key(0), norms, True))()
    logits = torch.tensor(np.array(class_logits(still, params, batch, Execution())[0]))
    theirs = torch.tensor(targets)
    weight = None if weights is None else torch.tensor(weights)
    expected = {
        None: lambda: torch.nn.functional.cross_entropy(logits, theirs.long(), weight=weight),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(
            logits, theirs.float(), pos_weight=weight
        ),
        "regression": lambda: torch.nn.functional.mse_loss(logits[:, 0], theirs),
    }[problem]()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_rare_classes_weigh_more():
    def weights(kind, labels, names):
        examples = SimpleNamespace(kind=kind, train=SimpleNamespace(labels=labels), names=names)
        return class_weights(examples).tolist()

    # As scikit-learn: N / (C × its examples).
    assert weights("classes", [0, 0, 0, 1], "ab") == pytest.approx([4 / 6, 2.0])
    assert weights("lists", [[1, 0], [1, 0], [1, 1]], "ab") == pytest.approx([1 / 3, 2.0])


def test_counts_of_an_evaluation_give_the_correlation():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 50))
    moments = np.array([50, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
    assert finalized({"moments": moments}) == {"pearson": pytest.approx(pearsonr(x, y).statistic)}
    assert finalized({"hits": np.array([3.0, 8.0])}) == {"f1": 0.75} and finalized({"loss": 1.0}) == {}
    tied = np.array([1.0, 2.0, 2.0, 3.0, 3.0, 3.0])
    assert figures.spearman(tied, x[:6]) == pytest.approx(spearmanr(tied, x[:6]).statistic)
    assert figures.pearson(np.ones(3), tied[:3]) == 0.0


def test_numbers_far_from_zero_have_a_correlation_during_the_training():
    """Of years, or prices: the squares of float32 do not hold what they vary by."""
    model = dataclasses.replace(MODEL, labels=("year",), problem_type="regression")
    params = init_params(model, jax.random.key(0), heads=("sequence_classification",))
    random = np.random.default_rng(0)
    out = params["head"]["sequence_classification"]["out"]
    out["kernel"] = 30 * random.normal(size=(32, 1)).astype("f4")
    out["bias"] = np.full(1, 1e5, "f4")
    batch = {
        "input_ids": random.integers(0, 300, (16, 8)).astype(np.int32),
        "segment_ids": np.ones((16, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (16, 1)),
        "example_weights": np.ones(16, np.float32),
    }
    said = np.array(class_logits(model, params, batch, Execution())[0][:, 0], np.float64)
    batch["labels"] = (said + random.normal(0, said.std(), 16)).astype(np.float32)
    objective = classification_objective(model, execution=Execution(), middle=float(batch["labels"].mean()))
    prepared, norms = objective.prepare(batch, jax.random.key(0), 0, False)
    _, sums = jax.jit(lambda: objective.loss(params, prepared, jax.random.key(0), norms, False))()
    expected = pearsonr(said, batch["labels"].astype(np.float64)).statistic
    found = finalized({"moments": np.asarray(sums["moments"][0], np.float64)})
    assert 0.3 < expected < 0.95 and found["pearson"] == pytest.approx(expected, abs=1e-3)


def test_intervals_hold_the_true_value_as_often_as_they_say():
    """Of 200 samples of a coin of 0.7 about 95 in 100 have it; the metrics' intervals are those of slow draws."""
    random = np.random.default_rng(0)
    samples = (random.random((200, 120)) < 0.7).astype(float)
    tossed = [mean_interval(sample, samples=200, seed=number) for number, sample in enumerate(samples)]
    assert 0.90 <= np.mean([low <= 0.7 <= high for low, high in tossed]) <= 0.98
    labels, said = random.integers(0, 3, 150), random.integers(0, 3, 150)
    found = figures.metric_intervals(labels, said, 3, samples=40)
    for name in ("accuracy", "macro_f1", "matthews"):
        slow = bootstrap(lambda drawn, name=name: figures.metrics(labels[drawn], said[drawn], 3)[name], 150, samples=40)
        assert found[f"{name}_interval"] == pytest.approx(list(slow))


def test_calibration_error_is_the_distance_of_confidence_and_accuracy():
    confidence = np.array([0.95] * 10 + [0.55] * 10)
    assert calibration_error(confidence, np.array([1] * 9 + [0] + [1] * 5 + [0] * 5)) == pytest.approx(0.05)
    assert calibration_error(confidence, np.zeros(20)) == pytest.approx(0.75)


def test_what_is_calibrated_on_has_every_label_as_often_as_the_file():
    """Within one, for rare ones too, and one of each is left to learn from; the same in every run of a seed."""
    labels = [0] * 130 + [1] * 60 + [2] * 8 + [3] * 1 + [4] * 1
    for seed in range(5):
        apart = drawn_alike(labels, 50, seed)
        assert len({*apart.tolist()}) == 50 and np.array_equal(apart, drawn_alike(labels, 50, seed))
        counts = np.bincount([labels[at] for at in apart], minlength=5)
        np.testing.assert_allclose(counts, [32.5, 15, 2, 0, 0], atol=1)
        assert counts[3:].sum() == 0
    assert not np.array_equal(drawn_alike(labels, 50, 0), drawn_alike(labels, 50, 1))
    sets = [[at % 2, int(at < 40)] for at in range(160)]
    counts = Counter(tuple(sets[at]) for at in drawn_alike(sets, 40, 0))
    assert sorted(counts) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(abs(number - (5 if early else 15)) <= 1 for (_, early), number in counts.items())
    # Sets of which each is there once: as many as are asked for.
    assert len(drawn_alike([[at] for at in range(40)], 20, 0)) == 20


def test_a_temperature_undoes_what_was_too_sure():
    """Labels are drawn by the scores; those times 3 have the temperature 3, which is PyTorch's best too."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(4000, 3))
    labels = (scores + random.gumbel(size=scores.shape)).argmax(1)
    found = fitted_temperature(3 * scores, labels)
    assert found == pytest.approx(3, rel=0.1)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50)

    def nats():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(torch.tensor(3 * scores) / log_temperature.exp(), torch.tensor(labels))
        loss.backward()
        return loss

    optimizer.step(nats)
    assert found == pytest.approx(log_temperature.exp().item(), rel=1e-3)
    before, after = (softmax(3 * scores / temperature) for temperature in (1.0, found))
    errors = [calibration_error(chances.max(1), chances.argmax(1) == labels) for chances in (before, after)]
    assert errors[1] < 0.03 < errors[0]
    # Each label is given from where half of those that have it begin.
    chances = np.array([[0.9, 0.2], [0.8, 0.3], [0.7, 0.1], [0.6, 0.35]])
    assert best_threshold(chances, np.array([[1, 0], [1, 1], [1, 0], [1, 1]])) == 0.3


def test_runs_of_lists_are_the_same_on_a_mesh_and_after_a_break(there, tmp_path):
    """With class weights and a part that is calibrated on; in transformers the export gives the same scores."""
    model = dataclasses.replace(MODEL, classifier_pooling="cls")  # which transformers has
    encoder = str(write_run(tmp_path / "encoder", model, [row["text"] for row in rows(300, 1)]))
    given = dict(label="labels", class_weights="balanced", calibration_part=0.25)
    whole = dataclasses.replace(config_for(there, tmp_path / "whole", **given), init_from=encoder)
    short = dict(steps=8, eval_every=8, dropout=0.0, mesh=MeshConfig(1, 1, 1), export=str(tmp_path / "exported"))
    summary = main(dataclasses.replace(whole, **short))
    short |= dict(run_dir=str(tmp_path / "parts"), mesh=MeshConfig(2, 2, 2), export=None)
    parts = dataclasses.replace(whole, **short)
    main(dataclasses.replace(parts, stop_at=4))
    again = main(parts)

    def rows_of(name):
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    ours, theirs = rows_of("whole"), rows_of("parts")
    chances = [[list(row["probabilities"].values()) for row in found] for found in (ours, theirs)]
    np.testing.assert_allclose(*chances, atol=2e-4)
    tuned, tuned_again = (json.loads((tmp_path / name / "tuned.json").read_text()) for name in ("whole", "parts"))
    assert tuned == pytest.approx(tuned_again, rel=0.02) and tuned["threshold"] == summary["metrics"]["threshold"]
    assert summary["eval"]["loss"] == pytest.approx(again["eval"]["loss"], abs=1e-4)
    assert "calibration_error_before" in summary["metrics"]
    # A run of an earlier version kept other examples apart.
    saved = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert saved.pop("apart") == "by label"
    shutil.copytree(tmp_path / "parts", tmp_path / "older")
    (tmp_path / "older" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="holds a run with other settings: apart"):
        main(dataclasses.replace(parts, run_dir=str(tmp_path / "older"), steps=9))
    assert "Calibration" in (tmp_path / "whole" / "report.html").read_text()

    texts = [row["text"] for row in ours]
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert model.config.problem_type == "multi_label_classification"
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()
    expected = 1 / (1 + np.exp(-logits / tuned["temperature"]))
    np.testing.assert_allclose(chances[0], expected, atol=1e-4)
    for source in (tmp_path / "whole", f"hf:{tmp_path}/exported"):
        loaded = espalier.load(source)
        assert [result["labels"] for result in loaded.classify(texts)] == [row["predictions"] for row in ours]
    few = loaded.classify(texts, threshold=0.9)
    assert [row["labels"] for row in few] == [
        [name for name, chance in row["probabilities"].items() if chance >= 0.9] for row in ours
    ]
    with pytest.raises(UserError, match="of the 160 examples .* are 8; there must be 20"):
        main(config_for(there, tmp_path / "run", label="labels", calibration_part=0.05))
    with pytest.raises(UserError, match="numbers have no probabilities"):
        main(config_for(there, tmp_path / "run", label="number", calibration_part=0.2))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_is_refused(there, tmp_path):
    with pytest.raises(UserError, match="numbers have no classes; leave it out"):
        main(config_for(there, tmp_path / "run", label="number", class_weights="balanced"))
    assert not (tmp_path / "run").exists()
