"""What a run says of itself, against what was counted otherwise; its end and the command that comes next."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from espalier.data.config import DataConfig
from espalier.data.description import describe_epochs, describe_text
from espalier.data.loader import Batches, Rows
from espalier.data.packing import pack_split
from espalier.data.prepare import prepare
from espalier.data.token_tables import token_bytes
from espalier.data.tokenizer import special_ids
from espalier.models.config import Execution
from espalier.models.description import describe
from espalier.models.families.bert import BERT_BASE
from espalier.progress import amount
from espalier.training.config import TrainConfig
from espalier.training.introduction import conclude, interval_words, result_words, without_stop
from espalier.training.run import RunDirectory
from sharding.mesh import MeshConfig, build_mesh

SUMMARY = {
    "eval": {"accuracy": 0.2413, "loss": 4.8123, "perplexity": 123.01},
    "seconds": 243.4,
    "tokens_per_second": 9870.4,
    "finished": True,
    "stopped_by": None,
}


def test_the_text_is_that_of_the_files(tmp_path):
    """Documents and tokens counted by hand; a batch of 4 rows in each step."""
    words = "a little tale of two cities and of one river".split()
    names = ("故事", "诗", "信", "书")
    for number, name in enumerate(names):
        texts = [" ".join(np.roll(words, line)[: 3 + (line + number) % 7]) for line in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in names[:3])
    held = str(tmp_path / "书.jsonl")
    config = DataConfig(
        files=files, validation_files=(held,), tokenizer_kind="bpe", sequence_length=16, cache=str(tmp_path)
    )
    prepared = prepare(config, 300, for_masked_lm=False)

    def counted(paths):
        read = [json.loads(line)["text"] for path in paths for line in Path(path).read_text().splitlines()]
        return len(read), sum(len(prepared.tokenizer.encode(text, add_special_tokens=False)) for text in read)

    rows, held_out = (
        {
            name: Rows(store, pack_split(store.offsets, 16), 16, special_ids(prepared.tokenizer), "shifted", table)
            for name, store in stores.items()
        }
        for table in [token_bytes(prepared.tokenizer)]
        for stores in (prepared.train, prepared.validation)
    )
    words = describe_text(config, prepared, rows, held_out, eval_rows=5)
    (documents, tokens), (few, fewer) = counted(files), counted([held])
    assert documents == 120 and few == 40
    text, _, end = words["text"].rpartition(" in ")
    number = int(end.removesuffix(" rows"))
    assert text == f"{', '.join(files)}: {documents} documents, {amount(tokens)} tokens"
    assert words["held out"].startswith(f"{held}: {few} documents, {amount(fewer)} tokens in ")
    assert words["held out"].endswith(" rows, 5 of them evaluated")
    # Every token but the last of a document is an input, and so is the beginning of each.
    assert number >= (tokens + documents) / 16
    batches = Batches(rows, 4)
    assert describe_epochs(batches, number) == "4 epochs"
    assert describe_epochs(batches, 1) == f"{4 / number:.3g} epochs"


def test_bert_base_is_described_as_published():
    """110M parameters (Devlin et al. 2019): 109.5M without the head, whose dense layer, norm and bias are 0.62M."""
    rows = describe(BERT_BASE, "masked_lm", Execution(), 512, build_mesh(MeshConfig(1, 1, 1)))
    assert rows == {
        "model": "bert for masked LM: 12 layers × 768 wide, 30,522 tokens in the vocabulary, 110 M parameters",
        "precision": "float32",
    }
    small = dataclasses.replace(BERT_BASE, labels=("a", "b"))
    asked = describe(
        small, "sequence_classification", Execution("xla", dtype="bfloat16"), 512, build_mesh(MeshConfig())
    )
    assert asked["precision"] == "bfloat16, parameters in float32" and asked["attention"] == "xla: as asked"
    assert " for classification: " in asked["model"]


def test_the_result_is_in_words():
    assert result_words(SUMMARY) == "held-out loss 4.812, perplexity 123, accuracy 24.1 %"
    measured = {"accuracy": 0.815, "f1": 0.8234, "macro_f1": 0.8, "matthews": 0.632, "majority": 0.5092}
    assert result_words({"metrics": measured, "eval": {"loss": 1.0}}) == (
        "accuracy 81.5 % (majority class 50.9 %), F1 82.3 %, Matthews correlation 0.632"
    )
    assert result_words({"metrics": {}, "eval": {}}) == ""
    several = {"accuracy": 0.5, "f1": 0.8, "majority": 0.1, "majority_f1": 0.2}
    assert result_words({"metrics": several}) == (
        "accuracy 50.0 % (most frequent set 10.0 %), F1 80.0 % (most frequent set 20.0 %)"
    )
    numbers = {"pearson": 0.9, "rmse": 0.352, "baseline_rmse": 1.169, "pearson_interval": [0.875, 0.9251]}
    assert result_words({"metrics": numbers}) == "Pearson 0.900, error 0.352 (of the mean 1.169)"
    assert interval_words({"metrics": numbers}) == "Pearson 0.875 to 0.925"
    assert interval_words({"metrics": measured | {"f1_interval": [0.8, 0.84]}}) == "F1 80.0 to 84.0 %"
    assert interval_words({"metrics": measured}) == ""


@pytest.mark.parametrize(
    ("command", "following"),
    [
        ("./launch.sh mlm demo --stop-at 20 --seed 3", "./launch.sh mlm demo --seed 3"),
        ("./launch.sh mlm demo --stop_at=20", "./launch.sh mlm demo"),
        ("./launch.sh mlm demo --data.files 'a b.txt' --stop-at 5", "./launch.sh mlm demo --data.files 'a b.txt'"),
    ],
)
def test_a_paused_run_goes_on_by_its_own_command(tmp_path, capsys, command, following):
    summary = SUMMARY | {"finished": False}
    conclude(summary, RunDirectory(tmp_path), TrainConfig(run_dir="runs/a"), command, ["export"])
    assert capsys.readouterr().out.splitlines()[-1] == f"  next    {following}"
    assert without_stop(command)[:2] == ["./launch.sh", "mlm"]


def test_the_end_of_a_run(tmp_path, capsys):
    run, config = RunDirectory(tmp_path), TrainConfig(run_dir="运行/一")
    run.report.touch()
    following = ["./launch.sh", "generate", "--run-dir", "运行/一", "--prompt", "Once upon a time"]
    conclude(SUMMARY, run, config, "./launch.sh clm demo", following)
    rows = [
        "  result  held-out loss 4.812, perplexity 123, accuracy 24.1 %",
        "  time    4:03, 9,870 tokens/s",
        "  report  运行/一/report.html",
        "  next    ./launch.sh generate --run-dir 运行/一 --prompt 'Once upon a time'",
    ]
    printed = capsys.readouterr().out.splitlines()
    assert [line.replace("'运行/一'", "运行/一") for line in printed] == rows
    # From Python there is no command line, and after a signal no report.
    conclude(SUMMARY, run, config, None, following)
    assert capsys.readouterr().out.splitlines() == rows[:3]
    conclude(SUMMARY | {"stopped_by": 15, "finished": False}, run, config, "./launch.sh clm demo", following)
    assert capsys.readouterr().out.splitlines() == [*rows[:2], "  next    ./launch.sh clm demo"]
    assert jax.process_index() == 0
