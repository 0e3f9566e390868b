"""The command line: presets, flags, and errors that fit on one line."""

import dataclasses
import errno
import importlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
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


def test_an_error_of_the_user_inside_main_is_one_line(capsys):
    def main(config, call):
        raise UserError("text/*.jsonl matches nothing;\ntry another glob")

    with pytest.raises(SystemExit) as exit:
        cli.run(main, PRESETS, "mlm", "", ["small"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: text/*.jsonl matches nothing; try another glob\n"


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


def test_debug_adds_the_traceback(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(print, PRESETS, "mlm", "", ["small", "--steps", "0", "--debug"])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" in err and "__post_init__" in err
    assert err.endswith("error: steps=0 must be at least 1\n")


def test_a_full_disk_is_one_line_and_a_bug_is_a_traceback(capsys):
    def full(config, call):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x")

    def bug(config, call):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "shard")

    with pytest.raises(SystemExit) as exit:
        cli.run(full, PRESETS, "mlm", "", ["small"])
    assert exit.value.code == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'runs/x'\n"
    with pytest.raises(FileNotFoundError):
        cli.run(bug, PRESETS, "mlm", "", ["small"])
    with pytest.raises(ValueError, match="a bug"):
        cli.run(
            lambda config, call: (_ for _ in ()).throw(ValueError("a bug")).__next__(), PRESETS, "mlm", "", ["small"]
        )


def test_too_little_memory_is_one_line_that_says_what_to_try(capsys):
    def main(config):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes\na page of details")

    with pytest.raises(SystemExit) as exit:
        cli.run_config(main, Options, "options", [])
    err = capsys.readouterr().err
    assert exit.value.code == 1 and err.count("\n") == 1
    assert "allocating 99 bytes" in err and "--accumulation 2" in err and "details" not in err


def test_a_run_that_a_signal_ended_early_does_not_look_finished(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run_config(lambda config: {"step": 3, "stopped_by": 15}, Options, "options", ["--json"])
    assert exit.value.code == 143 and json.loads(capsys.readouterr().out) == {"step": 3, "stopped_by": 15}


def test_a_list_without_a_value_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run_config(lambda config: None, Options, "options", ["--files", "--json"])
    assert exit.value.code == 2 and "--files needs a value" in capsys.readouterr().err


@dataclass(frozen=True)
class Options:
    """A command whose fields all have values."""

    files: tuple[str, ...] = ()
    json: bool = False


def test_json_is_the_last_line_and_valid(capsys):
    run_dir = pathlib.Path("runs/x")
    result = {"loss": np.float32(0.5), "ppl": math.inf, "steps": np.int64(3), "dir": run_dir, "a": (1, None)}
    cli.run(lambda config, call: print("progress") or result, PRESETS, "mlm", "", ["small", "--json"])
    last = capsys.readouterr().out.splitlines()[-1]
    parsed = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed == {"loss": 0.5, "ppl": None, "steps": 3, "dir": "runs/x", "a": [1, None]}


def test_json_is_not_escaped(capsys):
    texts = ["机器学习", "é😀", "one\u2028line\x85of\nJSON"]
    cli.run_config(lambda config: {"texts": texts}, Options, "options", ["--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"texts": texts} and '"机器学习", "é😀", "one' in line


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "\\u4e2d\\u6587 \\U0001f600"),
        ({"PYTHONIOENCODING": "gb18030"}, "中文 😀"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "\\u4e2d\\u6587 \\U0001f600"),
        ({"LC_ALL": "C"}, "中文 😀"),
    ],
)
def test_a_terminal_without_the_characters_is_no_error(tmp_path, environment, shown):
    """Text is escaped there; JSON stays JSON, also with characters beyond U+FFFF."""
    (tmp_path / "script.py").write_text(
        "import dataclasses\nfrom espalier import cli\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class C:\n    json: bool = True\n"
        "def main(config):\n    print('中文 😀')\n    return {'text': '中文 😀'}\n"
        "cli.run_config(main, C, 'script')\n",
        encoding="utf-8",
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    path = {"PYTHONPATH": str(pathlib.Path(cli.__file__).parents[1])}
    command = [sys.executable, tmp_path / "script.py"]
    done = subprocess.run(command, env=clean | path | environment, capture_output=True, check=True)
    assert done.stderr == b""
    text, line = done.stdout.decode(environment.get("PYTHONIOENCODING", "utf-8")).splitlines()
    assert text == shown and json.loads(line) == {"text": "中文 😀"}


def test_without_json_nothing_is_printed(capsys):
    cli.run(lambda config, call: {"loss": 1.0}, PRESETS, "mlm", "", ["small"])
    assert capsys.readouterr().out == ""


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


def run_script(start_cli, folder, main: str, **env):
    """Start `main`'s lines as a command whose configuration is `steps: int = 1`."""
    (folder / "script.py").write_text(
        "import dataclasses, sys, time\nfrom espalier import cli\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class C:\n    steps: int = 1\n"
        f"def main(config):\n    {main}\n"
        "cli.run_config(main, C, 'script')\n"
    )
    path = os.pathsep.join([str(folder), str(pathlib.Path(cli.__file__).parents[1])])
    return lambda *argv: start_cli("script", *argv, env={"PYTHONPATH": path, **env})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_line_is_the_same_whatever_the_terminal_can_show(tmp_path, start_cli, encoding):
    start = run_script(start_cli, tmp_path, "pass", PYTHONIOENCODING=encoding)
    for argv, message in [
        (["--steps"], "--steps needs a value"),
        (["--steps", "x" * 40], f"--steps: '{'x' * 40}' is not a whole number"),
        (["more"], "unexpected more"),
    ]:
        out, err = start(*argv).communicate(timeout=60)
        assert (out, err) == ("", f"error: {message}; `script --help` says what is accepted\n")


def test_a_reader_that_leaves_early_is_no_error(tmp_path, start_cli):
    """`./launch.sh plan … | head -1`, whether the program still prints or has it all in its buffer."""
    for flush in (True, False):
        lines = f"[print(i, flush={flush} or not i) or time.sleep(0.1) for i in range(20)]"
        process = run_script(start_cli, tmp_path, lines)()
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.wait(timeout=20) == 128 + signal.SIGPIPE and process.stderr.read() == ""


def test_ctrl_c_leaves_with_130_and_one_line(tmp_path, start_cli):
    process = run_script(start_cli, tmp_path, "print('started', flush=True); time.sleep(60)")()
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "interrupted\n")
    assert process.returncode == 130
