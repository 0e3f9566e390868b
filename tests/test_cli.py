"""The command line: presets, flags, and mistakes that are told in one line."""

import dataclasses
import importlib
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from espalier import cli
from espalier.errors import UserError
from espalier.flags import flags_of
from espalier.short_help import often, settings


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "muon"] = "adamw"
    """Which one."""
    learning_rate: float = 1e-4
    """How fast it learns."""
    scales: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if self.learning_rate < 0:
            raise UserError(f"learning_rate={self.learning_rate} must not be negative; try 1e-4")


@dataclass(frozen=True)
class Config:
    """A run."""

    steps: int = 10
    """How many steps\n    it takes."""
    files: tuple[str, ...] = ()
    run_dir: str | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    json: bool = False
    debug: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")


def small() -> Config:
    """A small run: `./launch.sh mlm small`.

    It takes a second.
    """
    return Config(steps=3, optimizer=Optimizer(name="muon"))


def bert_base() -> Config:
    """BERT-base."""
    return Config(steps=1000)


PRESETS = {"small": small, "bert-base": bert_base}


def configured(*argv: str) -> Config:
    """The configuration that a command line arrives at."""
    seen = []
    cli.run(lambda config, call: seen.append(config), PRESETS, "mlm", "Masked-LM pretraining.", argv)
    return seen[0]


def refused(capsys, *argv: str, code: int = 2) -> str:
    """The one line on stderr with which a command line is refused."""
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda config, call: pytest.fail("main was called"), PRESETS, "mlm", "", argv)
    out, err = capsys.readouterr()
    assert exit.value.code == code and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def test_a_preset_without_flags_is_the_preset():
    assert configured("small") == dataclasses.replace(small(), run_dir="runs/mlm-small")


def test_flags_change_the_preset_and_nothing_else():
    config = configured(
        *"small --steps=5 --optimizer.learning-rate 3e-4 --optimizer.scales a 0.5 b 2 --files x y --json".split()
    )
    scales = (("a", 0.5), ("b", 2.0))
    assert config == Config(
        steps=5, files=("x", "y"), run_dir="runs/mlm-small", optimizer=Optimizer("muon", 3e-4, scales), json=True
    )


def test_underscores_and_switched_off_booleans_are_understood():
    config = configured("small", "--run_dir", "here", "--json", "--no-json")
    assert config.run_dir == "here" and config.json is False


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("", ["no preset given", "small, bert-base"]),
        ("--steps 3", ["no preset given", "small, bert-base"]),
        ("bert-bas", ["'bert-bas'", "did you mean bert-base?", "small, bert-base"]),
        ("small --optimzer.learning-rate 1", ["--optimzer.learning-rate", "did you mean --optimizer.learning-rate?"]),
        ("small --learning-rate 1", ["--learning-rate", "did you mean --optimizer.learning-rate?"]),
        ("small --lr 1", ["--lr", "did you mean --optimizer.learning-rate?"]),
        ("small --qqq", ["--qqq", "`mlm small --help`"]),
        ("small --steps many", ["--steps", "'many' is not a whole number"]),
        ("small --steps 1e6", ["--steps", "'1e6' is not a whole number"]),
        ("small --optimizer.learning-rate fast", ["--optimizer.learning-rate", "'fast' is not a number"]),
        ("small --optimizer.name sgd", ["--optimizer.name", "'sgd'", "'adamw', 'muon'"]),
        ("small --optimizer.scales a b", ["--optimizer.scales", "a", "b"]),
        ("small --steps", ["--steps", "needs a value"]),
        ("small --json=True", ["--json=True", "--json or --no-json"]),
        ("small steps=3", ["unexpected steps=3"]),
        ("small -x", ["unexpected -x"]),
        ("small --steps 0", ["steps=0 must be at least 1"]),
        ("small --optimizer.learning-rate -1", ["learning_rate=-1.0 must not be negative; try 1e-4"]),
    ],
)
def test_what_the_user_mistook_is_said_in_one_line(capsys, argv, expected):
    line = refused(capsys, *argv.split())
    for part in expected:
        assert part in line
    assert not re.search("[│╭─]", line)


def test_the_nearest_flags_are_flags_of_this_preset(capsys):
    line = refused(capsys, "small", "--optimizer.nmae", "x")
    suggested = re.findall(r"--[\w.-]+", line.split("did you mean")[1].split("?")[0])
    assert "--optimizer.name" in suggested
    assert set(suggested) <= {"--optimizer.name", "--optimizer.scales", "--optimizer.learning-rate"}


def test_help_lists_the_presets(capsys):
    cli.run(pytest.fail, PRESETS, "mlm", "Masked-LM pretraining.", ["--help"])
    out = capsys.readouterr().out
    assert "Masked-LM pretraining." in out
    assert re.search(r"^  small +A small run: `./launch.sh mlm small`\.$", out, re.M)
    assert re.search(r"^  bert-base +BERT-base\.$", out, re.M)
    assert "It takes a second." not in out


def test_help_of_a_preset_lists_every_flag_with_its_meaning_and_value(capsys):
    with pytest.raises(SystemExit) as exit:
        configured("small", "--help")
    assert not exit.value.code
    out = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "It takes a second." in out
    for part in ["--steps INT How many steps it takes. (default: 3)", "--optimizer.name {adamw,muon} Which one."]:
        assert part in out
    for flag in ["--files", "--run-dir", "--optimizer.learning-rate", "--optimizer.scales", "--json", "--no-json"]:
        assert flag in out


@dataclass(frozen=True)
class Inner:
    """A group."""

    rate: float = often(0.5)
    """How much; unset = none at all, which is never said. It has a reason (e.g. this one)."""
    seldom: int = 3
    """Nobody sets it."""


@dataclass(frozen=True)
class Long(Config):
    """A run with a short help."""

    steps: int = often(10)
    """Steps, e.g. ten. More on steps."""
    names: tuple[str, ...] = often(())
    """What it is called; and so on."""
    inner: Inner = field(default_factory=Inner)


def test_the_short_help_shows_what_is_declared_to_be_set_often(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    presets = {"long": lambda: Long(steps=2000)}
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as exit:
            cli.run(pytest.fail, presets, "mlm", "", ["long", "--steps", "3", flag])
        assert not exit.value.code
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "usage: mlm long [flags]" and lines[-1].startswith("`mlm long --help-all` lists")
        assert [line for line in lines if line.startswith("  ")] == [
            "  --steps INT         Steps, e.g. ten (default: 2,000)",
            "  --names STR …       What it is called",
            "  --inner.rate FLOAT  How much; unset = none at all, which is never said",
            "                      (default: 0.5)",
        ]
    with pytest.raises(SystemExit) as exit:
        cli.run(pytest.fail, presets, "mlm", "", ["long", "--help-all"])
    assert not exit.value.code
    out = capsys.readouterr().out
    assert "--inner.seldom INT" in out and "--optimizer.scales" in out and "More on steps" in out
    for argv in (["--qqq"], ["--steps", "x"]):
        with pytest.raises(SystemExit):
            cli.run(pytest.fail, presets, "mlm", "", ["long", *argv])
        assert "`mlm long --help-all`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", ["mlm.presets", "clm.presets", "finetune.presets", "espalier.commands.plan.settings"]
)
def test_the_short_help_of_every_preset_fits_on_a_screen(module, capsys, monkeypatch):
    """45 lines of 80 columns, each setting with its meaning, the files first; every flag it names is one."""
    monkeypatch.setenv("COLUMNS", "80")
    presets = importlib.import_module(module).PRESETS
    for name, preset in presets.items():
        with pytest.raises(SystemExit) as exit:
            cli.run(pytest.fail, presets, "entry", "", [name, "--help"])
        assert not exit.value.code
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 45 and max(map(len, lines)) <= 80, (name, len(lines))
        shown = list(settings(preset()))
        assert 12 <= len(shown) <= 22 and all(setting.meaning for setting in shown)
        flags = re.findall(r"^  (--\S+)", "\n".join(lines), re.M)
        assert flags[0].startswith("--data.") and len(flags) == len(shown)
        assert set(flags) <= flags_of(type(preset())).keys()


def test_an_entry_point_learns_what_was_asked_for():
    calls = []
    argv = ["small", "--optimizer.learning_rate=0.1", "--no-json", "--files", "a b.txt", "--", "--steps"][:5]
    cli.run(lambda config, call: calls.append(call), PRESETS, "mlm", "", argv)
    assert calls[0].given == {"optimizer.learning_rate", "json", "files"}
    assert calls[0].settings_of("optimizer") == {"learning_rate"}
    assert calls[0].command == "./launch.sh mlm small --optimizer.learning_rate=0.1 --no-json --files 'a b.txt'"


@dataclass(frozen=True)
class Move:
    """Move."""

    source: str
    target: str
    json: bool = False
    debug: bool = False


@pytest.mark.parametrize(
    "argv", [["a", "b"], ["a", "--target", "b"], ["--source", "a", "--target", "b"], ["a", "b", "--no-json"]]
)
def test_required_values_may_stand_first(argv):
    moves = []
    cli.run_config(moves.append, Move, "move", argv)
    assert moves == [Move("a", "b")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["a"], "target"), ([], "source"), (["a", "b", "c"], "c"), (["a", "--targets", "b"], "--target")],
)
def test_required_values_that_are_missing_or_too_many_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run_config(lambda config: pytest.fail("main was called"), Move, "move", argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and message in err and err.count("\n") == 1, err


def test_a_list_without_a_value_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run_config(lambda config: None, Options, "options", ["--files", "--json"])
    assert exit.value.code == 2 and "--files needs a value" in capsys.readouterr().err


@dataclass(frozen=True)
class Options:
    """A command whose fields all have values."""

    files: tuple[str, ...] = ()
    json: bool = False


@dataclass(frozen=True)
class Command:
    """A command without presets."""

    run_dir: str
    """Which run."""
    prompt: tuple[str, ...] = ("",)


def test_a_command_without_presets_takes_flags_and_names_what_is_missing(capsys):
    seen = []
    cli.run_config(seen.append, Command, "generate", ["--run-dir", "runs/x", "--prompt", "Once upon", "a time"])
    assert seen == [Command("runs/x", ("Once upon", "a time"))]
    with pytest.raises(SystemExit) as exit:
        cli.run_config(seen.append, Command, "generate", [])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and "--run-dir" in err
