"""The README is true: every command in it really runs, shortened, in the order of the page; every path exists."""

import dataclasses
import gzip
import importlib
import itertools
import json
import pathlib
import re
import shlex
import socket

import jax
import pytest

from espalier import cli
from espalier.__main__ import commands
from espalier.data.builtin import demo_task
from espalier.data.config import DataConfig
from espalier.data.sources import open_sources
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.flags import flags_of
from espalier.models.families.bert import BERT_BASE
from espalier.models.families.roberta import ROBERTA_BASE
from espalier.models.hub import save_pretrained
from espalier.models.transformer import init_params

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
AGENTS = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
MODULES = {command.name: command.module for command in commands()} | {
    "look": "espalier.commands.look.text",
    "plan": "espalier.commands.plan.__main__",
    "prepare": "espalier.data.prepare.__main__",
    "budget": "espalier.commands.plan.budget.__main__",
}
BLOCKS = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE) if not kind]
COMMANDS = [
    shlex.split(line)[1:]
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("./launch.sh")
]
FEW_ROWS = "--stop-at 2 --batch-size 8 --log-every 1"
TINY = (
    "--model.vocab-size 1024 --model.hidden-size 64 --model.num-hidden-layers 2 --model.num-attention-heads 4 "
    "--model.intermediate-size 128"
)
SHORTENED = {
    "demo": "--steps 4 --finetune-steps 2 --labels 16",
    "mlm": f"{FEW_ROWS} --eval-rows 8 {TINY}",
    "clm": f"{FEW_ROWS} --eval-rows 8 {TINY} --model.num-key-value-heads 2",
    "finetune": FEW_ROWS,
    "generate": "--sampling.max-new-tokens 4",
    "predict": "",
    "evaluate": "",
    "look": "",
    "prepare": "",
    "plan": f"{TINY} --model.num-key-value-heads 2 --batch-size 64 --data.sequence-length 128",
    "budget": "",
    "report": "",
    "runs": "",
    "checkpoint": "",
    "import": "",
    "export": "",
}
"""Flags after those of the page, which make each command small enough to run here."""
REPLACED = {"$BOOKS": "books", "$SST2": ".", "2000": "100"}
"""Of the page's own words: folders, and how many tokens are read one by one."""
LONG = ("bert-large", "llama-1b")
"""Presets with rows longer than are needed here."""


@pytest.fixture
def user(tmp_path, monkeypatch, shared_data):
    """A folder with the files that the page speaks of, small."""
    monkeypatch.chdir(tmp_path)
    scenes = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:120_000].split("\n\n")
    for folder in ("books", "books/train", "books/validation", "text", "corpus"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            part = [scene for scene in scenes[number::2] if scene]
            (tmp_path / folder / f"{number}.txt").write_text(f"{folder}\n\n" + "\n\n".join(part))
            with gzip.open(tmp_path / folder / f"{number}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps({"text": f"{folder} {scene}"}) + "\n" for scene in part)
    for name in ("train", "dev"):
        with (shared_data / "glue" / "SST-2" / f"{name}.tsv").open() as file:
            (tmp_path / f"{name}.tsv").write_text("".join(itertools.islice(file, 40)))
    for name, value in (("BOOKS", "books"), ("SST2", ".")):
        monkeypatch.setenv(name, value)
    # A folder where the command runs goes before a repository of the same name.
    words = train_tokenizer(["\n".join(scenes)], "bpe", 400)
    words.pad_token = words.backend_tokenizer.id_to_token(1)
    for name, shape in (("bert-base-uncased", BERT_BASE), ("roberta-base", ROBERTA_BASE)):
        small = dict(vocab_size=vocabulary_size(words) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        model = dataclasses.replace(shape, **small, num_attention_heads=2)
        save_pretrained(tmp_path / name, model, init_params(model, jax.random.key(0)), words)
    return tmp_path


def test_the_page_shows_each_command():
    assert [] in COMMANDS, "./launch.sh alone is the first thing that a user runs"
    assert {command[0] for command in COMMANDS if command} >= {"mlm", "clm", "finetune", "generate", "prepare"}


PRETRAINING = {"step", "loss", "eval", "tokens", "tokens_per_second", "first_step_seconds", "run_dir"}
KEYS = {
    "demo": PRETRAINING | {"pretrained_accuracy", "scratch_accuracy", "tfidf_accuracy", "majority_accuracy", "report"},
    "mlm": PRETRAINING,
    "clm": PRETRAINING,
    "finetune": PRETRAINING | {"metrics"},
    "generate": {"prompts", "completions"},
    "prepare": {"vocab_size", "train", "validation"},
    "report": {"report"},
    "runs": {"folder", "runs", "problems"},
    "checkpoint": {"run_dir", "checkpoints", "damaged"},
    "predict": {"use", "rows", "bad"},
    "evaluate": {"task", "metrics"},
    "look": {"answer", "probability", "words", "attribution"},
    "plan": {"fits", "peak_bytes_per_chip", "basis"},
    "budget": {"parameters", "tokens", "batch_size"},
    "import": {"run_dir", "head"},
    "export": {"path", "head"},
}
"""What the last line of standard output holds under --json."""


@pytest.mark.timeout(900)
def test_every_command_runs(user, capsys, monkeypatch):
    """As written, with SHORTENED after it and without a network; each may use what those above it left in runs/."""

    def refuse(*address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for command in COMMANDS:
        name, *arguments = command[1:] if command[:2] == ["plan", "budget"] else command or ["demo"]
        for word, other in REPLACED.items():
            arguments = [argument.replace(word, other) for argument in arguments]
        shortened = SHORTENED[name]
        if name in ("mlm", "clm") and arguments[0] in LONG:
            shortened += " --data.sequence-length 64"
        if any(argument.startswith("hf:") for argument in arguments):
            shortened = shortened.replace(TINY, "")  # the architecture is that of the weights
        arguments += [*shortened.split(), "--json"]
        module = importlib.import_module(MODULES[name])
        try:
            if hasattr(module, "PRESETS"):
                cli.run(module.main, module.PRESETS, prog=name, description="", argv=arguments)
            elif hasattr(module, "command"):
                module.command(arguments)
            else:
                # Where there are no presets the module has one configuration of the command's name.
                (config,) = (value for key, value in vars(module).items() if key.lower() == f"{name}config")
                main = getattr(module, f"{name}_model", None) or module.main
                cli.run_config(main, config, prog=name, argv=arguments)
        except SystemExit as exit:
            pytest.fail(f"{shlex.join(command)} left with {exit.code}: {capsys.readouterr().err}")
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert printed.keys() >= KEYS[name], command
        if name == "demo":
            check_demo(user / "runs" / "demo", printed)
            with pytest.raises(SystemExit, match="2"):
                cli.run_config(main, config, prog=name, argv=[*arguments, "--labels", "64"])
            assert "demo with other labelled sentences" in capsys.readouterr().err
    runs = {path.name for path in (user / "runs").iterdir()}
    assert {"demo", "books"} <= runs


def check_demo(run: pathlib.Path, printed: dict) -> None:
    """What the demo promises is there."""
    for name in ("pretrained_accuracy", "scratch_accuracy", "tfidf_accuracy", "majority_accuracy"):
        assert 0 <= printed[name] <= 1, name
    assert printed["step"] == 4
    report = (run / "report.html").read_text()
    assert "What is the pretraining worth?" in report and "Masked words" in report and "data:image/png" in report
    assert "TF-IDF" in report and "src=http" not in report

    held_out = set(json.loads((run / "config.json").read_text())["data"]["builtin_exclude"])
    assert held_out, "the files of the task's validation part must be left out of the pretraining text"
    assert held_out == demo_task(0, 16).validation_files
    # The recorded hash of the corpus is that of the text without them.
    recorded = json.loads((run / "config.json").read_text())["fingerprints"]["train"]
    without, with_them = (
        open_sources(DataConfig(builtin="pydoc", builtin_exclude=tuple(sorted(files)))).train["text"].fingerprint()
        for files in (held_out, ())
    )
    assert recorded == without != with_them

    for name in ("pretrained", "scratch"):
        predictions = [json.loads(line) for line in (run / name / "predictions.jsonl").read_text().splitlines()]
        validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        assert [p["label"] for p in predictions] == [v["label"] for v in validation]
        metrics = json.loads((run / name / "summary.json").read_text())["metrics"]
        right = sum(p["label"] == p["prediction"] for p in predictions)
        assert metrics["accuracy"] == right / len(predictions)


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z][\w.-]*)", README))))
def test_every_flag_in_the_text_exists(flag):
    accepted = set()
    for name in ("mlm", "clm", "finetune", "plan"):
        module = importlib.import_module(MODULES[name])
        for preset in module.PRESETS.values():
            accepted |= flags_of(type(preset())).keys()
    groups = {given.removesuffix(".auto") for given in accepted if given.endswith(".auto")}
    assert flag in accepted | groups | {"--help", "--help-all", "--from-config", "--print-config"}


@pytest.mark.parametrize("text", [README, AGENTS], ids=["README", "AGENTS"])
def test_every_path_in_the_text_exists(text):
    for path in re.findall(r"[`(\"]((?:mlm|clm|finetune|espalier|sharding|cluster|tests|docs)/[\w/.-]*)[`)\"]", text):
        assert (ROOT / path).exists(), path
