"""A run that goes on with other settings, data, code or files is refused before its first step, and told why.

Each mutation changes one thing of a run that is there. Nothing is compiled: the runs have done their steps by hand.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from labelled_words import ENCODER, TEXTS, write_jsonl
from tiny_runs import write_run

import clm.presets
import clm.pretrain
import finetune.train
import mlm.presets
import mlm.pretrain
from espalier import assembly
from espalier.data.tokenizer import save_tokenizer
from espalier.exits import one_line_errors
from espalier.files import write_json
from espalier.training import loop
from espalier.training.checkpoint import Checkpoints
from espalier.training.frozen import save_frozen
from espalier.training.manifest import _seal
from espalier.training.state import new_state
from finetune.config import LoraConfig
from finetune.presets import PRESETS
from sharding.mesh import MeshConfig

DONE = 4
WORDS = ("old young grey tall".split(), "cat dog bird fish".split(), "tree river house".split(), "sun rain".split())
MAIN = {"mlm": mlm.pretrain.main, "clm": clm.pretrain.main, "own": mlm.pretrain.main}
OWN = """
def objective(setup):
    from mlm.record import MASKED_LM
    return MASKED_LM.build(setup)
"""


def text_config(kind: str, folder: pathlib.Path, **changes: Any) -> Any:
    preset = {"mlm": mlm.presets, "own": mlm.presets, "clm": clm.presets}[kind].debug()
    model = dataclasses.replace(preset.model, vocab_size=300, num_hidden_layers=1, hidden_size=32)
    files = dict(files=(str(folder / "text.txt"),), builtin=None, cache=str(folder / "cache"))
    common: dict[str, Any] = dict(
        steps=8, batch_size=8, eval_rows=8, mesh=MeshConfig(1, 1, 1), run_dir=str(folder / kind)
    )
    if kind == "own":
        common["objective"] = f"{folder / 'own.py'}:objective"
    data = dataclasses.replace(preset.data, **files)
    return dataclasses.replace(preset, model=model, data=data, **common | changes)


def labelled_config(folder: pathlib.Path, name: str = "classify", **changes: Any) -> Any:
    preset = PRESETS[name]()
    rows = str(folder / "rows.jsonl")
    data = dataclasses.replace(preset.data, train=rows, validation=rows, max_length=12)
    optimizer = dataclasses.replace(preset.optimizer, learning_rate=1e-2)
    common = dict(steps=8, batch_size=8, mesh=MeshConfig(1, 1, 1), run_dir=str(folder / "classify"))
    common |= dict(init_from=str(folder / "encoder"), lora=LoraConfig(rank=2), data=data, optimizer=optimizer)
    return dataclasses.replace(preset, **common | changes)


def begin(config: Any) -> None:
    """What a run of this configuration leaves after DONE steps, its parameters zeros."""
    record, task, run, mesh, origin = assembly.opened(config)
    settings, _ = assembly.recorded_settings(record, task, origin, "./launch.sh debug")
    learnt, _ = assembly.learnable(record, task, mesh, origin)

    def zeros(make):
        shapes = jax.eval_shape(make, jax.random.key(0))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    with run.writing(settings), jax.set_mesh(mesh):
        save_tokenizer(task.tokenizer, run.tokenizer)
        optimizer, _, _ = loop.optimization(task.config, learnt)
        state = jax.eval_shape(
            lambda: new_state(
                learnt.init_params(jax.random.key(0)), optimizer.init, config.optimizer, jax.random.key(0)
            )
        )
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        state = dataclasses.replace(state, step=jnp.int32(DONE))
        kept = {"frozen": save_frozen(run.frozen, zeros(task.frozen.init), "encoder")} if task.frozen else {}
        checkpoints = Checkpoints(run.checkpoints, announce=lambda line: None)
        checkpoints.save(state, settings, kept | {"step": DONE})
        checkpoints.close()
    run.metrics.write_text(json.dumps({"step": DONE, "loss": 1.0}) + "\n")


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> pathlib.Path:
    """A folder with texts and three runs that have begun: mlm, own (mlm with an objective of a file), classify."""
    folder = tmp_path_factory.mktemp("there")
    lines = [f"the {a} {b} a {c} in the {d}.\n" for a, b, c, d in itertools.product(*WORDS)]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "own.py").write_text(OWN)
    write_jsonl(folder / "rows.jsonl", [{"text": f"we saw the {a}", "label": a} for a in ("crow", "pear") * 12])
    small = dataclasses.replace(ENCODER, hidden_size=16, intermediate_size=16)
    write_run(folder / "encoder", small, TEXTS)
    begin(text_config("mlm", folder))
    begin(text_config("own", folder))
    begin(labelled_config(folder))
    return folder


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    def reached(*arguments):
        raise AssertionError("step 1 was reached")

    monkeypatch.setattr(loop, "jit_train_step", reached)


class Mutation(NamedTuple):
    """What is changed of a copy of the folder, and words of the refusal."""

    run: str
    change: Callable[[Any, pathlib.Path], Any]
    """(configuration, folder) → that with which the run is to go on; files are changed there."""
    words: str


def setting(path: str, value: Any) -> Callable[[Any, pathlib.Path], Any]:
    """Another value of a setting, a.b.c."""

    def changed(config: Any, names: list[str]) -> Any:
        name, *inner = names
        return dataclasses.replace(config, **{name: changed(getattr(config, name), inner) if inner else value})

    return lambda config, folder: changed(config, path.split("."))


def file(name: str, old: str, new: str) -> Callable[[Any, pathlib.Path], Any]:
    """Other words in a file."""

    def change(config: Any, folder: pathlib.Path) -> Any:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return config

    return change


def other_task(config: Any, folder: pathlib.Path) -> Any:
    return text_config("clm", folder, run_dir=config.run_dir)


def other_tokenizer(config: Any, folder: pathlib.Path) -> Any:
    shutil.copytree(folder / "encoder/tokenizer", folder / "mlm/tokenizer", dirs_exist_ok=True)
    return config


def other_base(config: Any, folder: pathlib.Path) -> Any:
    """The frozen parameters of the run are those of another one, whole and sound."""
    save_frozen(folder / "classify/frozen", {"embeddings": {"token": {"embedding": jnp.ones((3, 4))}}}, "another")
    return config


def newer_format(config: Any, folder: pathlib.Path) -> Any:
    path = folder / f"mlm/checkpoints/{DONE}/manifest.json"
    held = json.loads(path.read_text()) | {"format_version": 2}
    held.pop("seal")
    write_json(path, held | {"seal": _seal(held)})
    return config


MUTATIONS = {
    "width of the model": Mutation("mlm", setting("model.hidden_size", 64), "model.hidden_size was 32, now 64"),
    "layers": Mutation("mlm", setting("model.num_hidden_layers", 2), "model.num_hidden_layers was 1, now 2"),
    "vocabulary": Mutation("mlm", setting("model.vocab_size", 400), "model.vocab_size was 300, now 400"),
    "tokenizer that is named": Mutation(
        "mlm",
        lambda config, folder: setting("data.tokenizer", str(folder / "encoder/tokenizer"))(config, folder),
        "is not the tokenizer that the weights were trained with",
    ),
    "tokenizer in the run": Mutation("mlm", other_tokenizer, "put back the tokenizer of that run"),
    "text": Mutation("mlm", file("text.txt", "the old cat", "the new cat"), "fingerprints.train was"),
    "sequence length": Mutation("mlm", setting("data.sequence_length", 32), "data.sequence_length was"),
    "seed": Mutation("mlm", setting("seed", 7), "seed was 0, now 7"),
    "batch size": Mutation("mlm", setting("batch_size", 16), "batch_size was 8, now 16"),
    "length of the schedule": Mutation("mlm", setting("steps", 16), "steps was 8, now 16"),
    "form of the schedule": Mutation("mlm", setting("optimizer.schedule", "cosine"), "optimizer.schedule was"),
    "warm-up": Mutation("mlm", setting("optimizer.warmup", 0.5), "optimizer.warmup was"),
    "learning rate": Mutation("mlm", setting("optimizer.learning_rate", 0.5), "optimizer.learning_rate was"),
    "optimizer": Mutation("mlm", setting("optimizer.name", "muon"), "optimizer.name was adamw, now muon"),
    "decay of weights": Mutation("mlm", setting("optimizer.weight_decay", 0.5), "optimizer.weight_decay was"),
    "sparsity": Mutation("mlm", setting("optimizer.sparsity.density", 0.5), "sparsity.density was 1.0, now 0.5"),
    "rate of masking": Mutation("mlm", setting("masking.rate", 0.4), "masking.rate was"),
    "masking of whole words": Mutation("mlm", setting("masking.whole_words", True), "masking.whole_words was False"),
    "another task": Mutation("mlm", other_task, "task was masked_lm, now causal_lm"),
    "weights to start from": Mutation(
        "mlm",
        lambda config, folder: dataclasses.replace(config, init_from=str(folder / "own")),
        "init_from was None, now",
    ),
    "an objective of one's own": Mutation(
        "mlm",
        lambda config, folder: dataclasses.replace(config, objective=f"{folder / 'own.py'}:objective"),
        "another objective: it began with none of yours, now it is objective of",
    ),
    "no objective of one's own": Mutation("own", setting("objective", None), "now it is none of yours"),
    "code of one's own": Mutation("own", file("own.py", "def", "# Not as it was.\ndef"), "own.py has changed since"),
    "version of the format": Mutation("mlm", newer_format, "has format version 2 and this code reads 1"),
    "labels": Mutation("classify", file("rows.jsonl", '"label": "crow"', '"label": "rook"'), "labels"),
    "rows that are learnt from": Mutation("classify", file("rows.jsonl", "we saw", "they saw"), "fingerprints.train"),
    "longest row": Mutation("classify", setting("data.max_length", 14), "data.max_length was 12, now 14"),
    "rank of adapters": Mutation("classify", setting("lora.rank", 4), "lora.rank was 2, now 4"),
    "no adapters": Mutation("classify", setting("lora", LoraConfig()), "lora.rank was 2, now None"),
    "frozen layers": Mutation(
        "classify",
        lambda config, folder: dataclasses.replace(config, lora=LoraConfig(), freeze=("embeddings",)),
        "freeze was [], now ['embeddings']",
    ),
    "frozen base": Mutation("classify", other_base, "does not hold the frozen parameters of this run"),
    "dropout": Mutation("classify", setting("dropout", 0.3), "dropout was"),
    "another fine-tuning": Mutation(
        "classify",
        lambda config, folder: labelled_config(folder, "embed", run_dir=config.run_dir, lora=LoraConfig(rank=2)),
        "task was sequence_classification, now sentence_embedding",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_refused_before_the_first_step(there, tmp_path, capsys, monkeypatch, name):
    folder = tmp_path / "there"
    shutil.copytree(there, folder)
    run, change, words = MUTATIONS[name]
    config = change(goes_on(there, folder, run), folder)
    if name == "another fine-tuning":
        pairs = [{"query": a, "positive": f"we saw {a} {n}"} for n, a in enumerate(("crow", "pear") * 8)]
        write_jsonl(folder / "rows.jsonl", pairs)
    before = files_of(folder / run)
    with pytest.raises(SystemExit) as end, one_line_errors(debug=False):
        main = finetune.train.main if run == "classify" else clm.pretrain.main if name == "another task" else MAIN[run]
        main(config)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and words in err and err.count("\n") == 1, err
    assert files_of(folder / run) == before


def goes_on(there: pathlib.Path, folder: pathlib.Path, run: str) -> Any:
    """The configuration of a run, of a copy of the folder that is there."""
    if run == "classify":
        return labelled_config(folder, init_from=str(there / "encoder"))
    return text_config(run, folder)


@pytest.mark.parametrize("run", ["mlm", "own", "classify"])
def test_without_a_mutation_it_goes_on(there, tmp_path, run):
    shutil.copytree(there, tmp_path / "there")
    with pytest.raises(AssertionError, match="step 1 was reached"):
        config = goes_on(there, tmp_path / "there", run)
        (finetune.train.main if run == "classify" else MAIN[run])(config)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """All but what looking at a run may leave."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_are_more_than_twenty():
    assert len(MUTATIONS) >= 20
