"""How a command ends: one line for an error, one JSON object, an exit code."""

import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest

from espalier import cli
from espalier.errors import UserError


def test_an_error_of_the_user_inside_main_is_one_line(capsys):
    def main(config, call):
        raise UserError("text/*.jsonl matches nothing;\ntry another glob")

    with pytest.raises(SystemExit) as exit:
        cli.run(main, PRESETS, "mlm", "", ["small"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: text/*.jsonl matches nothing; try another glob\n"


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


@dataclass(frozen=True)
class Options:
    """A command whose fields all have values."""

    steps: int = 10
    json: bool = False
    debug: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")


PRESETS = {"small": Options}


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
