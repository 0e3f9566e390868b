"""One assembly for every task: a third objective from one file, a user's own code, and no copies in entry points."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import pytest

import clm.pretrain
import espalier
import mlm.pretrain
from clm.loss import causal_lm_objective
from clm.presets import PretrainConfig, debug
from espalier import assembly, cli, task, user_code
from espalier.commands.convert import ExportConfig, export_model
from espalier.commands.plan.objectives import objective_of
from espalier.errors import UserError
from espalier.models.transformer import init_params, matrix_axes
from espalier.pretraining.objective import Setup, TextObjective
from espalier.report.card import model_card
from espalier.report.page import Section
from espalier.report.task import TaskReport
from espalier.training.frozen import Frozen
from espalier.training.restore import restore_params
from espalier.training.step import Objective
from tests.toy import quick_compilation  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parent.parent

# --- a third objective, all of it: loss, record, presets ---


def prefix_lm(setup: Setup) -> Objective:
    """Causal LM of the second half of each row: what comes before is given (loss alone, for the test's sake)."""
    whole = causal_lm_objective(setup.model, execution=setup.execution)

    def prepare(batch, key, step, train):
        late = jnp.arange(batch["labels"].shape[1]) >= batch["labels"].shape[1] // 2
        return whole.prepare(batch | {"loss_weights": batch["loss_weights"] * late}, key, step, train)

    return Objective(prepare, whole.loss)


@dataclasses.dataclass(frozen=True)
class PrefixConfig(PretrainConfig):
    """A prefix-LM run."""

    task = "prefix_lm"


def tiny_prefix() -> PrefixConfig:
    """A toy."""
    return PrefixConfig(**{field.name: getattr(debug(), field.name) for field in dataclasses.fields(PrefixConfig)})


PREFIX = TextObjective(
    name="prefix_lm",
    head="causal_lm",
    report=TaskReport(
        title=lambda config: "Prefix language model",
        unit="token after the prefix",
        words="pretrained to continue prefixes",
        pipeline="text-generation",
        sections=lambda run: [Section("What a prefix is", "<p>half a row</p>")],
    ),
    command="prefix",
    causal=True,
    layout="shifted",
    build=prefix_lm,
    predicted=lambda config: 0.5,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    lines = (f"the {a} {b} a {c} in the {d}.\n" for a, b, c, d in itertools.product(*WORDS))
    (folder / "text.txt").write_text("".join(lines))
    return folder


WORDS = ("old young grey tall".split(), "cat dog bird fish".split(), "tree river house".split(), "sun rain".split())


def small(config, text, run_dir, **changes):
    """Two steps of a preset, on the small text and with a small vocabulary."""
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        steps=2,
        eval_rows=8,
        eval_every=2,
        model=dataclasses.replace(config.model, vocab_size=300, num_hidden_layers=1, hidden_size=32),
        data=dataclasses.replace(
            config.data,
            **{"files": (str(text / "text.txt"),), "builtin": None, "cache": str(text / "cache")}
            | changes.pop("data", {}),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """The summary of the causal LM that the others are compared with."""
    return clm.pretrain.main(small(debug(), text, tmp_path_factory.mktemp("plain") / "run"))


def test_a_third_objective_is_one_file(plain, text, tmp_path, monkeypatch):
    monkeypatch.setitem(task.TASKS, "prefix_lm", f"{__name__}:PREFIX")
    config = small(tiny_prefix(), text, tmp_path / "run")
    summary = assembly.train(config)
    assert summary["finished"] and summary["eval"]["perplexity"] > 1
    assert plain["eval"]["loss"] != summary["eval"]["loss"]  # another loss, of the same model and text

    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["task"] == "prefix_lm"
    page = (tmp_path / "run/report.html").read_text()
    assert "Prefix language model" in page and "What a prefix is" in page and "token after the prefix" in page
    card = model_card(tmp_path / "run")
    assert "pretrained to continue prefixes" in card and "nats per token after the prefix" in card

    planned = objective_of(config)
    assert (planned.command, planned.head, planned.causal, planned.predicted(config)) == (
        *("prefix", "causal_lm", True),
        0.5,
    )
    batch = {name: jnp.ones((2, 8), kind) for name, kind in planned.arrays(config).items()}
    prepared, norms = planned.build(Setup(config, config.model, None)).prepare(batch, jax.random.key(0), 0, True)
    assert norms == 8 and prepared["loss_weights"][0].tolist() == [0] * 4 + [1] * 4


def test_a_record_that_no_table_names_keeps_its_words(text, tmp_path):
    """Trained from Python: later, without the record, report and card still know what they must say."""
    config = small(debug(), text, tmp_path / "run")
    assembly.train(config, objective=PREFIX)
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert (saved["task"], saved["head"], saved["report"]["title"]) == (
        "prefix_lm",
        "causal_lm",
        "Prefix language model",
    )
    assert saved["user_code"]["objective"] == user_code.recorded(prefix_lm)
    assert "pretrained to continue prefixes" in model_card(tmp_path / "run")


# --- code of the user's own ---

OWN = """
import jax.numpy as jnp
from clm.loss import causal_lm_objective
from espalier.training.step import Objective

SCALE = 1.0

def scaled(setup):
    whole = causal_lm_objective(setup.model, execution=setup.execution)
    def loss(params, batch, key, norms, train):
        value, metrics = whole.loss(params, batch, key, norms, train)
        return SCALE * value, metrics
    return Objective(whole.prepare, loss)

def broken(setup):
    def loss(params, batch, key, norms, train):
        return batch["nope"]
    return Objective(lambda batch, key, step, train: (batch, 1.0), loss)

def wrong(model, config):
    return None

def nothing(setup):
    return 3

def texts():
    for number in range(400):
        yield f"the {number % 7} cats sat on {number % 11} mats and saw {number} dogs."
"""
CALL = cli.Call("./launch.sh clm debug")


def test_a_users_objective_goes_on_until_its_source_changes(plain, text, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    config = small(debug(), text, tmp_path / "run", objective=f"{file}:scaled")
    first = clm.pretrain.main(dataclasses.replace(config, stop_at=1), CALL)
    saved = json.loads((tmp_path / "run/config.json").read_text())
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    assert saved["user_code"]["objective"] == {"file": str(file), "name": "scaled", "sha256": sha}
    assert first["step"] == 1

    # Moved, it is the same code.
    moved = tmp_path / "moved.py"
    moved.write_text(OWN)
    second = clm.pretrain.main(dataclasses.replace(config, objective=f"{moved}:scaled"), CALL)
    assert second["finished"] and second["eval"] == plain["eval"]
    assert "by the objective scaled of moved.py" in (tmp_path / "run/report.html").read_text()

    changed = tmp_path / "changed.py"
    changed.write_text(OWN.replace("SCALE = 1.0", "SCALE = 2.0"))
    new = hashlib.sha256(changed.read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        clm.pretrain.main(dataclasses.replace(config, objective=f"{changed}:scaled"), CALL)
    assert all(part in str(error.value) for part in (str(changed), sha[:12], new[:12], "--run-dir"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="another objective: it began with scaled of .*, now it is none of yours"):
        clm.pretrain.main(dataclasses.replace(config, objective=None), CALL)


@pytest.mark.parametrize(
    "name, message",
    [
        ("broken", r"KeyError in line 17 of .*mine\.py: 'nope'"),
        ("wrong", r"takes \(model, config\); accepted is a function objective\(setup\)"),
        ("nothing", "returns a int; accepted is a function"),
        ("missing", "has no missing"),
        ("SCALE", "is a float; accepted is a function"),
    ],
)
def test_mistakes_in_a_users_objective_are_one_line(text, tmp_path, name, message):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    with pytest.raises(UserError, match=message) as error:
        clm.pretrain.main(small(debug(), text, tmp_path / "run", objective=f"{file}:{name}"), CALL)
    assert "\n" not in str(error.value)
    # Only what fails inside the compiled step fails after the run directory is there.
    assert name == "broken" or not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "objective, code", [("clm", {"objective": "z_loss"}), ("mlm", {"masking": "span_mask", "text texts": "texts"})]
)
def test_the_documented_examples_run(text, tmp_path, monkeypatch, objective, code):
    page = (ROOT / "docs/own-objective.md").read_text()
    for name, source in re.findall(r"`(\w+\.py)`:.*?```python\n(.*?)```", page, re.S):
        (tmp_path / name).write_text(source)
    monkeypatch.chdir(tmp_path)
    (flags,) = re.findall(rf"^\./launch\.sh {objective} debug (.*)$", page, re.M)
    if "--data.files" not in flags:
        flags += f" --data.files {text / 'text.txt'}"
    flags += " --steps 2 --eval-rows 8 --eval-every 2 --run-dir run --data.cache cache"
    flags += " --model.vocab-size 300 --model.hidden-size 32 --model.num-hidden-layers 1"
    entry = {"clm": clm.pretrain, "mlm": mlm.pretrain}[objective]
    cli.run(entry.main, entry.PRESETS, prog=objective, description="", argv=["debug", *flags.split()])
    saved = json.loads(pathlib.Path("run/config.json").read_text())["user_code"]
    assert {what: entry["name"] for what, entry in saved.items()} == code


def test_no_block_of_code_stands_in_two_entry_points():
    """On normalised lines: at most 10 in a row may be the same."""
    files = ["mlm/pretrain.py", "clm/pretrain.py", "finetune/train.py"]
    lines = {name: [line.strip() for line in (ROOT / name).read_text().splitlines() if line.strip()] for name in files}
    for one, other in itertools.combinations(files, 2):
        blocks = [{tuple(lines[name][i : i + 11]) for i in range(len(lines[name]) - 10)} for name in (one, other)]
        shared = blocks[0] & blocks[1]
        assert not shared, f"{one} and {other} share:\n" + textwrap.indent("\n".join(min(shared)), "    ")


# --- more than one model, and parameters that are not trained ---


def two_models(setup: Setup) -> Objective:
    """Both learn the same, the second with half the weight."""
    one = causal_lm_objective(setup.model, execution=setup.execution)

    def loss(params, batch, key, norms, train):
        first, metrics = one.loss(params["discriminator"], batch, key, norms, train)
        return first + 0.5 * one.loss(params["generator"], batch, key, norms, train)[0], metrics

    return Objective(one.prepare, loss)


def fresh(setup, key):
    return init_params(setup.model, key, heads=("causal_lm",))


TWO = TextObjective(
    name="two",
    head="causal_lm",
    command="two",
    causal=True,
    layout="shifted",
    build=two_models,
    init_params=lambda setup, key: {"generator": fresh(setup, key), "discriminator": fresh(setup, jax.random.key(9))},
    matrix_axes=lambda params: {name: matrix_axes(part) for name, part in params.items()},
    part="discriminator",
)


def adapted(setup: Setup) -> Objective:
    one = causal_lm_objective(setup.model, execution=setup.execution)

    def loss(params, batch, key, norms, train):
        table, low = params["embeddings"]["token"]["embedding"], params["adapters"]
        token = {"embedding": table + low["a"]["kernel"] @ low["b"]["kernel"]}
        return one.loss(params | {"embeddings": params["embeddings"] | {"token": token}}, batch, key, norms, train)

    return Objective(one.prepare, loss)


def low_rank(setup, key):
    shape = jax.eval_shape(lambda: fresh(setup, key))["embeddings"]["token"]["embedding"].shape
    a = jax.random.normal(key, (shape[0], 2))
    return {"adapters": {"a": {"kernel": a}, "b": {"kernel": jnp.zeros((2, shape[1]))}}}


ADAPTED = dataclasses.replace(
    TWO,
    name="adapted",
    build=adapted,
    init_params=low_rank,
    frozen=lambda setup: Frozen(lambda key: fresh(setup, key)),
    matrix_axes=lambda params: jax.tree.map(lambda _: None, params),
    part="",
)


def test_a_record_of_two_models_exports_the_one_that_it_names(text, tmp_path):
    config = small(debug(), text, tmp_path / "run", export=str(tmp_path / "out"))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon"))
    summary = assembly.train(config, objective=TWO)
    trained = restore_params(tmp_path / "run")
    assert sorted(trained) == ["discriminator", "generator"]
    loaded = espalier.load(tmp_path / "run").params
    assert_equal(loaded, trained["discriminator"])
    exported = espalier.load(f"hf:{tmp_path / 'out'}").params
    for params in (loaded, exported):  # but for the padding of the vocabulary
        token = params["embeddings"]["token"]
        token["embedding"] = token["embedding"][:300]
    assert_equal(exported, loaded)
    counted = sum(leaf.size for leaf in jax.tree.leaves(loaded))
    assert summary["parameters"] == counted
    # Another objective goes on from that one, this one from both.
    for name, objective in (("one", None), ("both", TWO)):
        again = small(debug(), text, tmp_path / name, init_from=str(tmp_path / "run"))
        again = dataclasses.replace(again, optimizer=dataclasses.replace(again.optimizer, learning_rate=0.0))
        assembly.train(again, objective=objective)
    assert_equal(restore_params(tmp_path / "one"), trained["discriminator"])
    assert_equal(restore_params(tmp_path / "both"), trained)


def test_a_record_of_adapters_trains_over_the_frozen_weights_it_starts_from(plain, text, tmp_path):
    config = small(debug(), text, tmp_path / "run", init_from=plain["run_dir"])
    before = restore_params(plain["run_dir"])
    summary = assembly.train(config, objective=ADAPTED)
    assert summary["finished"] and sorted(restore_params(tmp_path / "run")) == ["adapters"]
    after = espalier.load(tmp_path / "run").params
    assert float(abs(after.pop("adapters")["b"]["kernel"]).max()) > 0
    assert_equal(after, before)
    # Who wants the model in another format must merge them: said by the command, and before a training begins.
    with pytest.raises(UserError, match="no place for adapters/a/kernel, adapters/b/kernel"):
        export_model(ExportConfig(str(tmp_path / "run"), str(tmp_path / "out")))
    asked = small(debug(), text, tmp_path / "new", init_from=plain["run_dir"], export=str(tmp_path / "out"))
    with pytest.raises(UserError, match="no place for adapters/a/kernel"):
        assembly.train(asked, objective=ADAPTED)
    assert not (tmp_path / "out").exists() and not (tmp_path / "new" / "config.json").exists()


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other)))
