"""--print-config and --from-config, and presets of a user's own file or module."""

import dataclasses
import importlib
import json
import sys

import pytest

import mlm.config
import mlm.presets
from espalier import cli, user_code
from mlm.config import PretrainConfig

ENTRIES = {
    "mlm": "mlm.presets",
    "clm": "clm.presets",
    "finetune": "finetune.presets",
    "plan": "espalier.commands.plan.settings",
}


def called(prog, *argv):
    """(configuration, call) that a command line arrives at."""
    seen = []
    presets = importlib.import_module(ENTRIES[prog]).PRESETS
    cli.run(lambda config, call: seen.append((config, call)), presets, prog, "", argv)
    return seen[0]


def printed(capsys, prog, *argv):
    """The JSON that --print-config prints; nothing is run."""
    presets = importlib.import_module(ENTRIES[prog]).PRESETS
    cli.run(lambda config, call: pytest.fail("main was called"), presets, prog, "", [*argv, "--print-config"])
    return json.loads(capsys.readouterr().out)


def refused(capsys, prog, *argv):
    with pytest.raises(SystemExit) as exit:
        called(prog, *argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def saved(folder, values, name="saved.json"):
    (folder / name).write_text(json.dumps(values))
    return str(folder / name)


@pytest.mark.parametrize("prog", ENTRIES)
def test_what_is_printed_is_read_again(prog, capsys, tmp_path):
    """Every preset: print → from → the same configuration, and no word about it. Of plan's, one of each kind."""
    names = list(importlib.import_module(ENTRIES[prog]).PRESETS)
    for name in (names[0], names[-1]) if prog == "plan" else names:
        config, _ = called(prog, name)
        file = saved(tmp_path, printed(capsys, prog, name), f"{name}.json")
        again, call = called(prog, "--from-config", file)
        assert again == dataclasses.replace(config, run_dir=f"runs/{prog}-{name}") and type(again) is type(config)
        assert call.given == frozenset() and capsys.readouterr().out == ""


def test_flags_change_a_saved_configuration_and_what_was_asked_for_is_kept(capsys, tmp_path):
    flags = ["--steps", "7", "--optimizer.learning-rate", "3e-3", "--model.hidden-dropout", "0.25", "--stop-at", "3"]
    values = printed(capsys, "mlm", "debug", *flags, "--run-dir", "elsewhere")
    assert values["steps"] == 7 and values["optimizer"]["learning_rate"] == 3e-3 and values["run_dir"] == "elsewhere"
    assert values["command"].startswith("./launch.sh mlm debug --steps 7") and "print-config" not in values["command"]
    file = saved(tmp_path, values)
    config, call = called("mlm", f"--from-config={file}", "--optimizer.name", "muon", "--steps=9")
    assert (config.steps, config.optimizer.name, config.optimizer.learning_rate) == (9, "muon", 3e-3)
    # Where and until when that call went are not taken over.
    assert config.run_dir == "runs/mlm-saved" and config.stop_at is None
    # With --init-from, the architecture is that of the weights but for what was asked for: then as now.
    assert call.settings_of("model") == {"hidden_dropout"} and "optimizer.name" in call.given
    again = saved(tmp_path, printed(capsys, "mlm", "--from-config", file, "--seed", "1"), "again.json")
    assert called("mlm", "--from-config", again)[1].settings_of("model") == {"hidden_dropout"}


def test_a_run_is_begun_again_from_its_own_configuration(capsys, tmp_path):
    """A run directory as training.run.settings writes it, with facts that are no settings and a fitted model."""
    (tmp_path / "walk").mkdir()
    facts = {"task": "masked_lm", "fingerprints": {"train": "0"}, "words": {}, "labels": [], "published": {}}
    config = mlm.presets.debug()
    model = dataclasses.replace(config.model, vocab_size=77)
    saved(tmp_path / "walk", dataclasses.asdict(dataclasses.replace(config, model=model)) | facts, "config.json")
    for given in (tmp_path / "walk", tmp_path / "walk" / "config.json"):
        again, _ = called("mlm", "--from-config", str(given))
        assert again == dataclasses.replace(config, model=model, run_dir="runs/walk-again")
    assert called("mlm", "--from-config", str(tmp_path / "walk"), "--run-dir", "runs/walk")[0].run_dir == "runs/walk"
    assert capsys.readouterr().out == ""
    # A task may record what nobody knows here; in a run of another task it would be a setting that is lost.
    saved(tmp_path, dataclasses.asdict(config) | facts | {"mine": 3})
    assert called("mlm", "--from-config", str(tmp_path / "saved.json"))[0].steps == config.steps
    assert "saved.json: mine not taken over; mlm has no such setting\n" in capsys.readouterr().out
    assert "mine, which mlm does not know" in refused(
        capsys,
        "mlm",
        "--from-config",
        saved(tmp_path, dataclasses.asdict(config) | facts | {"mine": 3, "task": "other"}),
    )


def test_a_setting_that_is_younger_than_the_file_has_its_default(capsys, tmp_path):
    values = printed(capsys, "mlm", "demo")
    del values["data"]["mixture"], values["eval_rows"], values["optimizer"]["b2"]
    config, _ = called("mlm", "--from-config", saved(tmp_path, values))
    assert config.eval_rows == PretrainConfig().eval_rows and config.optimizer.b2 == 0.98
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "does not have optimizer.b2, data.mixture, eval_rows: left at the default" in out


def test_steps_given_now_win_over_epochs_of_the_file(capsys, tmp_path):
    values = printed(capsys, "finetune", "classify", "--epochs", "3") | {"steps": 600}
    file = saved(tmp_path, values)
    assert called("finetune", "--from-config", file)[0].epochs == 3
    config, _ = called("finetune", "--from-config", file, "--steps", "10")
    assert (config.steps, config.epochs) == (10, None)
    config, _ = called("finetune", "--from-config", file, "--epochs", "1")
    assert (config.steps, config.epochs) == (600, 1)


def test_steps_and_epochs_given_now_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        called("finetune", "classify", "--steps", "20", "--epochs", "1")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "--steps and --epochs say how long the schedule is in two ways" in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stpes": 3}, ["stpes", "did you mean steps?", "./launch.sh mlm debug"]),
        ({"optimizer": {"learnin_rate": 1.0}}, ["optimizer.learnin_rate", "did you mean learning_rate or"]),
        ({"steps": "many"}, ["steps='many' must be a whole number"]),
        ({"steps": True}, ["steps=True must be a whole number"]),
        ({"optimizer": 3}, ["optimizer=3 must be an object"]),
        ({"optimizer": {"name": "sgd"}}, ["optimizer.name='sgd' must be one of 'adamw', 'muon'"]),
        ({"data": {"files": "a.txt"}}, ["data.files='a.txt' must be a list, each a string"]),
        ({"optimizer": {"rate_scales": [["a"]]}}, ["optimizer.rate_scales=[['a']] must be a list"]),
        ({"steps": 0}, ["steps=0 must be at least 1"]),
    ],
)
def test_a_file_with_a_mistake_is_refused_in_one_line(capsys, tmp_path, change, expected):
    values = printed(capsys, "mlm", "debug")
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    line = refused(capsys, "mlm", "--from-config", saved(tmp_path, values))
    for part in expected:
        assert part in line


def test_what_cannot_be_the_base_is_refused_in_one_line(capsys, tmp_path):
    other = saved(tmp_path, printed(capsys, "mlm", "debug"))
    for argv, parts in [
        (["--from-config"], ["--from-config needs a run directory"]),
        (["--from-config", "--steps", "3"], ["--from-config needs a run directory"]),
        (["--from-config", str(tmp_path)], [f"there is no {tmp_path}/config.json", "a run directory"]),
        (["debug", "--from-config", other], ["debug and --from-config", "give one of them"]),
        (["--from-config", other], ["masking, which clm does not know", "made by `./launch.sh mlm debug`"]),
        (["--from-config", __file__], ["is not JSON"]),
        (["debug", "--print-confg"], ["did you mean --print-config or"]),
    ]:
        line = refused(capsys, "clm", *argv)
        assert all(part in line for part in parts), line


def test_a_group_that_is_chosen_automatically_may_be_given_by_hand_again(capsys, tmp_path):
    file = saved(tmp_path, printed(capsys, "mlm", "debug", "--mesh", "auto"))
    assert called("mlm", "--from-config", file)[0].mesh.auto
    assert "--mesh auto chooses --mesh.fsdp too" in refused(capsys, "mlm", "--from-config", file, "--mesh.fsdp", "2")
    config, _ = called("mlm", "--from-config", file, "--mesh.no-auto", "--mesh.fsdp", "2")
    assert config.mesh.fsdp == 2 and not config.mesh.auto


PRESETS = """
from dataclasses import replace
from data import STEPS
from mlm.presets import debug

def tiny():
    \"\"\"Mine, and small.\"\"\"
    return replace(debug(), steps=STEPS)

def other():
    from finetune.tasks.classify.record import classify
    return classify()

def broken():
    return replace(debug(), steps=1 / 0)

def zero():
    return replace(debug(), steps=0)

value = tiny()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with presets, among names that the library and others have too."""
    (tmp_path / "models.py").write_text(PRESETS)
    (tmp_path / "data.py").write_text("STEPS = 7\n")
    (tmp_path / "torn.py").write_text("def tiny(:\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "presets.py").write_text("from mlm.presets import demo as small\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name in ("data", "mine", "mine.presets") or "espalier_user" in name]:
        del sys.modules[name]


def test_a_preset_of_a_users_own(own, capsys):
    for given in ("models.py:tiny", "./models.py:tiny", f"{own}/models.py:tiny"):
        config, call = called("mlm", given, "--seed", "3")
        assert config == dataclasses.replace(mlm.presets.debug(), steps=7, seed=3, run_dir="runs/mlm-tiny")
        assert call.command == f"./launch.sh mlm {given} --seed 3" and call.given == {"seed"}
    assert user_code.load("models.py:tiny") is user_code.load(f"{own}/models.py:tiny") and sys.path[-1] == str(own)
    assert called("mlm", "mine.presets:small")[0].run_dir == "runs/mlm-small"
    plan, _ = called("plan", "models.py:tiny", "--chip", "h100")
    assert (plan.steps, plan.chip, plan.run_dir) == (7, "h100", "runs/plan-tiny")
    assert printed(capsys, "mlm", "models.py:tiny")["steps"] == 7
    with pytest.raises(SystemExit):
        called("mlm", "models.py:tiny", "--help")
    assert "usage: mlm models.py:tiny [flags]\n\nMine, and small.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("nowhere.py:tiny", "there is no file"),
        ("nowhere.presets:tiny", "no module nowhere, neither here nor installed; accepted is FILE.py:NAME or"),
        ("mine.nothing:tiny", "no module mine.nothing"),
        ("models.py:tny", "has no tny; did you mean tiny?; it defines tiny, other, broken, zero"),
        ("models.py:", "names nothing in a file; accepted is FILE.py:NAME"),
        ("models.py:value", "is a mlm.config.PretrainConfig; accepted is a function without arguments"),
        (
            "models.py:other",
            "returns a finetune.tasks.classify.record.ClassifyConfig; accepted is mlm.config.PretrainConfig",
        ),
        ("models.py:broken", "ZeroDivisionError in line 15 of"),
        ("models.py:zero", "steps=0 must be at least 1"),
        ("torn.py:tiny", "SyntaxError in line 1 of"),
    ],
)
def test_a_preset_that_cannot_be_had_is_refused_in_one_line(own, capsys, given, expected):
    assert expected in refused(capsys, "mlm", given)
