"""GLUE: its files as they are published, a grid that goes on, the table, and what is submitted."""

import dataclasses
import json
import pathlib
import shutil
import warnings
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from tiny_runs import write_run

from espalier import cli
from espalier.errors import UserError
from espalier.models.config import ModelConfig
from finetune.config import FinetuneOptimizer, LoraConfig
from finetune.glue.files import write_files
from finetune.glue.grid import Run, best
from finetune.glue.protocols import PROTOCOLS
from finetune.glue.record import GlueConfig, GlueData
from finetune.glue.report import markdown
from finetune.glue.tasks import BY_KEY, GLUE
from finetune.train import main

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, type_vocab_size=2,
    max_position_embeddings=32, hidden_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
WORDS = "the cat sat on a mat and read no book about red or blue birds".split()
HEADS = {
    "SST-2": ("sentence", "label"),
    "MRPC": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "STS-B": ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2",
              "score"),
    "QQP": ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    "MNLI": ("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
             "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"),
    "QNLI": ("index", "question", "sentence", "label"),
    "RTE": ("index", "sentence1", "sentence2", "label"),
    "WNLI": ("index", "sentence1", "sentence2", "label"),
}  # fmt: skip
"""The first lines of GLUE's files for training; CoLA's have none."""
LABELS = {"MNLI": ("neutral", "entailment", "contradiction", "-"), "QNLI": ("entailment", "not_entailment"),
          "RTE": ("not_entailment", "entailment"), "STS-B": ("5.000", "0.250", "3.800")}  # fmt: skip


def words(number: int, count: int = 5) -> str:
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS, count)) + ' , he said " so'


def write_split(path: pathlib.Path, name: str, rows: int, labels: bool = True) -> None:
    """As GLUE publishes it: tabs, quotation marks that mean nothing."""
    lines = []
    if name == "CoLA":
        lines = [f"gj04\t{number % 2}\t{'*' if number % 3 else ''}\t{words(number)}" for number in range(rows)]
        if not labels:
            lines = ["index\tsentence", *(f"{number}\t{words(number)}" for number in range(rows))]
    else:
        columns = HEADS[name] if labels else tuple(column for column in HEADS[name] if column != BY_NAME[name].label)
        values = LABELS.get(name, ("0", "1"))
        lines = ["\t".join(columns)]
        for number in range(rows):
            cells = {column: f"{number}" for column in columns}
            cells |= {column: words(number * 3 + at) for at, column in enumerate(BY_NAME[name].text)}
            if labels:
                cells[BY_NAME[name].label] = values[number % len(values)]
            lines.append("\t".join(cells[column] for column in columns))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


BY_NAME = {task.name: task for task in GLUE}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    glue = root / "GLUE"
    for task in GLUE:
        folder = glue / task.folder
        folder.mkdir(parents=True)
        for split, rows, labels in (("train", 24, True), (task.dev, 12, True), (task.test, 5, False)):
            write_split(folder / f"{split}.tsv", task.name, rows, labels)
    write_split(glue / "MNLI" / "dev_mismatched.tsv", "MNLI", 8)
    write_split(glue / "MNLI" / "test_mismatched.tsv", "MNLI", 4, labels=False)
    (glue / "MNLI" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\tthe cat sat\ta cat sat\n")
    encoder = write_run(root / "encoder", MODEL, [words(number, 9) for number in range(200)])
    return SimpleNamespace(root=root, glue=str(glue), encoder=str(encoder))


def config_for(there, run_dir, **changes) -> GlueConfig:
    data = dict(folder=there.glue, max_length=32) | changes.pop("data", {})
    defaults = dict(
        init_from=there.encoder,
        run_dir=str(run_dir),
        learning_rates=(1e-3,),
        epoch_counts=(1,),
        seeds=(0,),
        batch_sizes=8,
        optimizer=FinetuneOptimizer(),
        data=GlueData(**data),
    )
    return GlueConfig(**defaults | changes)


@pytest.mark.parametrize("task", GLUE, ids=lambda task: task.name)
def test_the_files_of_every_task_are_read_as_they_are_published(there, tmp_path, task):
    files = write_files(there.glue, task, tmp_path, None, tests=True)
    rows = [json.loads(line) for line in files.train.read_text(encoding="utf-8").splitlines()]
    values = LABELS.get(task.name, ("0", "1"))
    wanted = [values[number % len(values)] for number in range(24)]
    assert rows[0]["text"] == words(0) and rows[0].get("text_b", words(1)) == words(1)
    assert [row["label"] for row in rows] == [label for label in wanted if label != "-"]
    assert ("text_b" in rows[0]) == (len(task.text) == 2)
    test = [json.loads(line) for line in files.more[task.test].read_text(encoding="utf-8").splitlines()]
    assert len(test) == 5 and all("label" not in row for row in test)


CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
    "ax": ("entailment", "neutral", "contradiction"),
}
"""Names of the labels of `nyu-mll/glue` and of TFDS's `glue`, by number."""


def rows_of(table: str, count: int, fields: tuple[str, ...], first: int = 0) -> list[dict]:
    """Examples as the data sets have them; those of the test set have the label -1."""
    found = []
    for number in range(count):
        label = (number * 1.25) % 5 if table == "stsb" else number % len(CLASSES[table])
        texts = {field: words(first + number * 3 + at) for at, field in enumerate(fields)}
        found.append(texts | {"label": -1 if first else label, "idx": number})
    return found


def saved_by_datasets(folder: pathlib.Path, splits: dict[tuple[str, str], list[dict]]) -> str:
    """A repository as nyu-mll/glue is one: a folder of Parquet files for each task, named in its card."""
    configs: dict[str, list[str]] = {}
    for (table, split), rows in splits.items():
        names = CLASSES.get(table)
        label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
        kinds = {field: datasets.Value("string") for field in rows[0] if field not in ("label", "idx")}
        features = datasets.Features(kinds | {"label": label, "idx": datasets.Value("int32")})
        (folder / table).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features).to_parquet(folder / table / f"{split}-00000-of-00001.parquet")
        configs.setdefault(table, []).append(f"  - split: {split}\n    path: {table}/{split}-*\n")
    card = "".join(f"- config_name: {table}\n  data_files:\n{''.join(files)}" for table, files in configs.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    return f"hf:{folder}"


def saved_by_tfds(folder: pathlib.Path, splits: dict[tuple[str, str], list[dict]]) -> str:
    """Each task prepared by tensorflow-datasets, which shuffles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        for table in dict.fromkeys(table for table, _ in splits):
            names = CLASSES.get(table)
            label = tfds.features.ClassLabel(names=list(names)) if names else np.float32
            parts = {split: rows for (name, split), rows in splits.items() if name == table}
            fields = [field for field in next(iter(parts.values()))[0] if field not in ("label", "idx")]
            kinds = {field: tfds.features.Text() for field in fields} | {"label": label, "idx": np.int32}

            class Builder(tfds.core.GeneratorBasedBuilder):
                name = f"glue_{table}"
                VERSION = tfds.core.Version("1.0.0")
                KINDS, PARTS = kinds, parts

                def _info(self):
                    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.KINDS))

                def _split_generators(self, dl_manager):
                    return {split: enumerate(rows) for split, rows in self.PARTS.items()}

                def _generate_examples(self):
                    raise NotImplementedError

            builder = Builder(data_dir=str(folder / "prepared"), file_format="array_record")
            builder.download_and_prepare()
            shutil.copytree(builder.data_dir, folder / "glue" / table)
    return f"tfds:{folder}/glue"


@pytest.mark.parametrize("saved", [saved_by_datasets, saved_by_tfds])
def test_data_sets_of_libraries_hold_what_the_files_hold(tmp_path, saved):
    """Every task; labels are named otherwise there, and TFDS has another order, by which no submission may go."""
    splits = {}
    for task in GLUE:
        for split, count, first in (("train", 9, 0), (task.dev, 6, 0), (task.test, 5, 1000)):
            name = split.replace("dev", "validation")
            splits[task.key, name] = rows_of(task.key, count, task.fields, first)
    splits["mnli", "validation_mismatched"] = rows_of("mnli", 4, BY_KEY["mnli"].fields)
    splits["ax", "test"] = rows_of("ax", 3, BY_KEY["mnli"].fields, 1000)
    source = saved(tmp_path / "source", splits)
    for task in GLUE:
        files = write_files(source, task, tmp_path / task.key, None, tests=True)
        rows = [json.loads(line) for line in files.train.read_text(encoding="utf-8").splitlines()]
        given = splits[task.key, "train"]
        assert [row["text"] for row in rows] == [row[task.fields[0]] for row in given]
        if task.key == "stsb":
            assert [float(row["label"]) for row in rows] == [row["label"] for row in given]
        else:
            assert [row["label"] for row in rows] == [task.labels[row["label"]] for row in given]
        test = [json.loads(line) for line in files.more[task.test].read_text(encoding="utf-8").splitlines()]
        wanted = splits[task.key, task.test]
        assert [row["text"] for row in test] == [row[task.fields[0]] for row in wanted]
        assert all("label" not in row for row in test)
        more = {"dev_mismatched", "diagnostic"} if task.key == "mnli" else set()
        assert more <= files.more.keys()


def test_real_files_are_read(shared_data, tmp_path):
    counts = {}
    for key in ("sst2", "mrpc", "rte"):
        files = write_files(str(shared_data / "glue"), BY_KEY[key], tmp_path / key, 100, tests=False)
        counts[key] = [len(path.read_text(encoding="utf-8").splitlines()) for path in (files.train, files.dev)]
    assert counts == {"sst2": [100, 872], "mrpc": [100, 408], "rte": [100, 277]}


def test_a_grid_goes_on_and_the_table_says_what_was_done(there, tmp_path, capsys):
    """Two tasks of one run, one from the MNLI checkpoint; ended runs are not trained again."""
    config = config_for(
        there, tmp_path / "run", data=dict(tasks=("rte", "mnli")), learning_rates=(1e-3, 1e-4), from_mnli="yes"
    )
    found = main(config)
    capsys.readouterr()
    again = main(dataclasses.replace(config, seeds=(0, 1)))
    said = capsys.readouterr().out
    # The points of seed 0 have ended; those of seed 1 are new.
    assert said.count(", seed 1") == 4 and ", seed 0\n" not in said
    assert list(found["tasks"]) == ["MNLI", "RTE"] and found["missing"] == {}
    mnli, rte = again["tasks"]["MNLI"], again["tasks"]["RTE"]
    assert mnli["metrics"] == ["accuracy", "accuracy_mismatched"] and mnli["seeds"] == [0, 1]
    assert rte["init_from"].startswith(str(tmp_path / "run" / "mnli" / "rate-"))
    assert len(rte["runs"]) == 4 and rte["min"] <= rte["median"] <= rte["max"]
    for row in again["tasks"].values():
        chosen = [run["score"] for run in row["runs"] if run["learning_rate"] == row["learning_rate"]]
        assert row["median"] == pytest.approx(np.median(chosen)) and row["max"] == max(chosen)
    assert again["average"] == pytest.approx((mnli["median"] + rte["median"]) / 2)
    # Weights are kept of the chosen rate alone.
    kept = {path.parent.name for path in (tmp_path / "run" / "rte").glob("*/checkpoints")}
    assert kept == {f"rate-{rte['learning_rate']:g}-epochs-1-seed-{seed}" for seed in (0, 1)}
    submission = tmp_path / "run" / "submission"
    assert {path.name for path in submission.iterdir()} == {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv", "RTE.tsv"}
    lines = (submission / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == list("01234")
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    page, table = ((tmp_path / "run" / name).read_text(encoding="utf-8") for name in ("report.html", "glue.md"))
    assert page.count("<circle") == 8 and "MNLI run" in table and table == markdown(again)
    assert "chosen" not in table and "also what is reported" in table

    other = dataclasses.replace(config, init_from=str(tmp_path / "run" / "mnli"))
    with pytest.raises(UserError, match="holds a GLUE run with init_from="):
        main(other)


def test_every_run_has_the_settings_that_were_given_and_a_grid_goes_on_with_the_same(there, tmp_path, monkeypatch):
    """Adapters, what is frozen, the best checkpoint; an optimizer of one's own in place of the protocol's."""
    trained = []

    def grid(config, folder, learning_rates, epochs, seeds, **_):
        trained.append(config)
        for seed in seeds:
            yield Run(learning_rates[0], epochs[0], seed, {"accuracy": 0.5}, folder / str(seed))

    monkeypatch.setattr("finetune.glue.run.grid", grid)
    settings = dict(data=dict(tasks=("rte",)), protocol="mosaicbert", submission=False)
    settings |= dict(lora=LoraConfig(rank=2), keep_best="accuracy", eval_every=7)
    settings |= dict(optimizer=FinetuneOptimizer(clip_norm=0.5, eps=1e-3))
    config = config_for(there, tmp_path / "run", **settings)
    main(config, cli.Call(given=frozenset({"optimizer.warmup"})))
    (one,) = trained
    assert one.lora.rank == 2 and one.keep_best == "accuracy" and one.eval_every == 7
    optimizer = one.optimizer
    # Given by a flag, other than the default, and the protocol's.
    assert (optimizer.warmup, optimizer.eps, optimizer.clip_norm) == (0.1, 1e-3, 0.5)
    assert (optimizer.b2, optimizer.weight_decay) == (0.98, 1.0)

    same = cli.Call(given=frozenset({"optimizer.warmup"}))
    main(dataclasses.replace(config, seeds=(0, 3), log_every=3), same)
    for change, words in (
        (dict(batch_sizes=16), "batch_sizes=8, and this one has 16"),
        (dict(lora=LoraConfig(rank=4)), "lora.rank=2, and this one has 4"),
        (dict(dropout=0.0), "dropout=0.1, and this one has 0.0"),
        (dict(scratch=True, lora=LoraConfig()), "scratch=False|lora.rank=2"),
        (dict(data=dataclasses.replace(config.data, max_length=16)), "data.max_length=32, and this one has 16"),
        (dict(optimizer=FinetuneOptimizer(clip_norm=0.5)), "optimizer.eps=0.001, and this one has None"),
    ):
        with pytest.raises(UserError, match=words):
            main(dataclasses.replace(config, **change), same)
    # As earlier versions wrote it.
    held = {"init_from": there.encoder, "folder": there.glue, "examples": None, "protocol": "mosaicbert"}
    (tmp_path / "run" / "glue-settings.json").write_text(json.dumps(held))
    main(config, same)
    (tmp_path / "run" / "glue-settings.json").write_text(json.dumps(held | {"examples": 5}))
    with pytest.raises(UserError, match="data.examples=5, and this one has None"):
        main(config, same)


def test_a_grid_that_goes_on_starts_from_the_run_of_mnli_that_it_began_with(there, tmp_path, monkeypatch):
    """Also where another one is better by then; its weights stay."""
    origins, best_rate = [], 1e-3

    def grid(config, folder, learning_rates, epochs, seeds, **_):
        origins.append((folder.name, config.init_from))
        for rate in learning_rates:
            (folder / f"{rate}" / "checkpoints").mkdir(parents=True, exist_ok=True)
            yield Run(rate, epochs[0], seeds[0], {"accuracy": 0.6 if rate == best_rate else 0.5}, folder / f"{rate}")

    monkeypatch.setattr("finetune.glue.run.grid", grid)
    config = config_for(there, tmp_path / "run", data=dict(tasks=("mnli", "rte")), from_mnli="yes", submission=False)
    main(config)
    best_rate = 5e-4
    found = main(dataclasses.replace(config, learning_rates=(1e-3, 5e-4)))
    first = tmp_path / "run" / "mnli" / "0.001"
    assert [origin for name, origin in origins if name == "rte"] == [str(first)] * 2
    assert found["tasks"]["MNLI"]["learning_rate"] == 5e-4 and found["tasks"]["RTE"]["init_from"] == str(first)
    assert (first / "checkpoints").is_dir() and not (tmp_path / "run" / "rte" / "0.001" / "checkpoints").exists()


def test_all_at_once_is_what_single_runs_are(there, tmp_path, capsys):
    """Every loss within 1e-5 of that of the single run, with dropout and the order of its own seed; the same labels."""
    settings = dict(seeds=(0, 1), learning_rates=(1e-3,), epoch_counts=(2,), log_every=1)
    # A small eps would let Adam blow rounding up where a gradient is nearly zero.
    settings |= dict(data=dict(tasks=("mrpc",)), optimizer=FinetuneOptimizer(eps=1e-3), submission=False)
    alone = main(config_for(there, tmp_path / "alone", protocol="electra", **settings))
    once = main(config_for(there, tmp_path / "once", protocol="electra", at_once=True, **settings))
    for one, many in zip(alone["tasks"]["MRPC"]["runs"], once["tasks"]["MRPC"]["runs"], strict=True):
        assert one["metrics"].keys() == many["metrics"].keys()
        for name, value in one["metrics"].items():
            np.testing.assert_allclose(many["metrics"][name], value, rtol=1e-6, atol=1e-6, err_msg=name)
        records = map(json.loads, (pathlib.Path(one["folder"]) / "metrics.jsonl").read_text().splitlines())
        losses = [record["loss"] for record in records if "learning_rate" in record]
        swept = json.loads((pathlib.Path(many["folder"]) / "grid.json").read_text())["loss"]
        np.testing.assert_allclose(swept, losses, rtol=1e-5)
    assert not list((tmp_path / "once").rglob("checkpoints"))


def test_what_is_missing_is_named_and_what_is_wrong_refused(there, tmp_path, capsys):
    config = config_for(there, tmp_path / "run")
    for change, words in (
        (dict(data=GlueData()), "no --data.folder given"),
        (dict(data=GlueData(folder=str(tmp_path / "none"))), "no such folder; accepted is one with GLUE's folders"),
        (dict(init_from=None), "no --init-from given"),
    ):
        with pytest.raises(UserError, match=words):
            main(dataclasses.replace(config, **change))
    for change, words in (
        (dict(data=dict(tasks=("snli",))), "there is no 'snli' in GLUE; accepted are cola, "),
        (dict(data=dict(train="F")), "GLUE has files of many tasks"),
        (dict(learning_rates=(0.0,)), "must be above 0"),
        (dict(steps=3), "steps=3: a grid has lengths of its own"),
        (dict(batch_size=8), "batch_size=8 is of one run, and a grid has many: give --batch-sizes"),
        (dict(seed=1), "give --seeds"),
        (dict(export="F"), "export=F is of one run"),
        (dict(optimizer=FinetuneOptimizer(learning_rate=1e-3)), "give --learning-rates"),
        (dict(data=dict(encoding="gb18030")), "GLUE's files are UTF-8"),
    ):
        with pytest.raises(UserError, match=words):
            config_for(there, tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()
    empty = tmp_path / "GLUE"
    (empty / "RTE").mkdir(parents=True)
    with pytest.raises(UserError, match="has the files of none of the tasks"):
        main(dataclasses.replace(config, data=GlueData(folder=str(empty))))
    assert "RTE: not run, no train.tsv in" in capsys.readouterr().out


def test_a_test_file_that_cannot_be_read_is_no_file_that_is_missing(there, tmp_path):
    shutil.copytree(f"{there.glue}/RTE", tmp_path / "RTE")
    (tmp_path / "RTE" / "test.tsv").write_bytes(b"index\tsentence1\tsentence2\n0\tcaf\xe9\tb\n")
    with pytest.raises(UserError, match=r"test.tsv:2: byte 0xe9 is not valid UTF-8"):
        write_files(str(tmp_path), BY_KEY["rte"], tmp_path / "data", None, tests=True)
    (tmp_path / "RTE" / "test.tsv").unlink()
    assert write_files(str(tmp_path), BY_KEY["rte"], tmp_path / "data", None, tests=True).more == {}


def test_the_chosen_point_has_the_highest_median():
    def run(rate, seed, value):
        return Run(rate, 3, seed, {"accuracy": value}, pathlib.Path())

    runs = [run(1e-5, seed, value) for seed, value in enumerate((0.9, 0.1, 0.2))]
    runs += [run(2e-5, seed, value) for seed, value in enumerate((0.3, 0.4, 0.3))]
    assert [one.learning_rate for one in best(runs, lambda run: run.metrics["accuracy"])] == [2e-5] * 3


def test_published_grids():
    """MosaicBERT's rates and decays stand in the ratio of its sources: 5e-6 to 5e-5."""
    mosaic = PROTOCOLS["mosaicbert"]
    assert [mosaic.of(key).batch_size for key in ("mnli", "qqp", "rte", "cola")] == [48, 16, 16, 32]
    assert {mosaic.of(key).weight_decay for key in ("mnli", "qqp", "sst2", "stsb", "mrpc", "qnli", "cola")} == {0.1}
    assert PROTOCOLS["electra"].of("rte").epochs == (10,) and PROTOCOLS["electra"].of("mnli").epochs == (3,)
    assert PROTOCOLS["modernbert"].of("sst2").epochs == (1, 2, 3) and PROTOCOLS["modernbert"].of("cola").epochs == (
        2,
        5,
        10,
    )
