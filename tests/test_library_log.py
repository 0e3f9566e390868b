"""What reaches a terminal while a command runs, and what goes to the log of libraries instead."""

import dataclasses
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import toy
from quick import xla_flags

from espalier import cli, library_log


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A command without settings."""


ROOT = pathlib.Path(library_log.__file__).parents[1]

LIBRARY = """
import logging, sys, threading, warnings

def say(how):
    if how == "print":
        print("said by a library")
    elif how == "stderr":
        print("said by a library", file=sys.stderr)
    elif how == "logging":
        logging.getLogger("library").warning("said by a library")
    elif how == "own handler":
        logger = logging.getLogger("handled")
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
        logger.error("said by a library")
    elif how == "warning":
        warnings.warn("said by a library", stacklevel=2)
    elif how == "bar":
        from tqdm import tqdm
        list(tqdm([1], desc="said by a library"))
    elif how == "thread":
        threading.Thread(target=lambda: print("said by a library", file=sys.stderr)).start()
    elif how == "lost thread":
        thread = threading.Thread(target=int, args=("said by a library",))
        thread.start()
        thread.join()
    elif how == "unraisable":
        class Loud:
            def __del__(self):
                raise ValueError("said by a library")
        Loud()
"""
LIBRARY_WAYS = "print, stderr, logging, own handler, warning, bar, thread, lost thread, unraisable".split(", ")


@pytest.fixture
def program(tmp_path):
    """program(lines, …): a command whose `main` is these lines, as a running process; `library` is installed for it."""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "library.py").write_text(LIBRARY)
    (tmp_path / "cache").mkdir()
    started = []

    def start(main: str, *, before: str = "", closed: str = "", **options) -> subprocess.Popen[str]:
        number = len(started)
        (tmp_path / f"command_{number}.py").write_text(
            f"import dataclasses, os, sys\n{before}\nimport library\nfrom espalier import cli, library_log\n"
            "from espalier.errors import UserError\n"
            f"def main(config):\n{textwrap.indent(textwrap.dedent(main), '    ')}\n    pass\n"
            "@dataclasses.dataclass(frozen=True)\nclass Config:\n    steps: int = 1\n"
            "cli.run_config(main, Config, 'command')\n"
        )
        places = (tmp_path, tmp_path / "site-packages", ROOT, ROOT / "tests")
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places)), "ESPALIER_CACHE": str(tmp_path / "cache")}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
        command = ["bash", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-m", f"command_{number}"]
        started.append(subprocess.Popen(command, text=True, env=env | options.pop("env", {}), cwd=tmp_path, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def logs(tmp_path) -> list[str]:
    return [path.read_text() for path in sorted(tmp_path.glob("cache/logs/*.log"))]


NATIVE = """
import ctypes
libc = ctypes.CDLL(None)
libc.write(2, b"E0000 cpu_aot_loader.cc\\n", 24)
os.write(1, b"[Gloo] Rank 0\\n")
libc.puts(b"buffered")
libc.fflush(None)
"""


def test_native_lines_go_to_the_log_and_those_of_python_to_the_terminal(program, tmp_path):
    process = program(NATIVE + "print('out')\nprint('err', file=sys.stderr)")
    assert ended(process) == ("out\n", "err\n")
    assert logs(tmp_path) == ["E0000 cpu_aot_loader.cc\n[Gloo] Rank 0\nbuffered\n"]


QUICK = {"XLA_FLAGS": xla_flags(2), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def test_in_a_run_they_lie_in_its_directory(program, tmp_path):
    """With what was said before there was one."""
    run = f"""
    from pathlib import Path
    import toy
    os.write(2, b"before\\n")
    def batches_from(step):
        for batch in toy.batches_from(step):
            os.write(2, b"at step %d\\n" % step)
            step += 1
            yield batch
    toy.run(toy.config(Path({str(tmp_path / "run")!r}), steps=2), batches_from=batches_from)
    os.write(1, b"after\\n")
    """
    out, err = ended(program(run, env=QUICK))
    assert err == "" and "evaluation at step 2" in out and "at step 0\n" not in out
    assert toy.metrics_of(tmp_path / "run")
    said = (tmp_path / "run" / "log.txt").read_text()
    # Libraries may have said something too, for instance of this processor.
    assert [line for line in said.splitlines() if re.match("before|at step|after", line)] == [
        *("before", "at step 0", "at step 1", "after")
    ]
    assert logs(tmp_path) == []


def test_a_disk_that_is_full_at_a_save_is_one_line(program, tmp_path):
    """Here a limit to the size of files, which takes effect once the programs are compiled."""
    run = f"""
    import resource
    from pathlib import Path
    import toy
    def batches_from(step):
        for batch in toy.batches_from(step):
            if step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            step += 1
            yield batch
    toy.run(toy.config(Path({str(tmp_path / "run")!r}), steps=2), batches_from=batches_from)
    """
    _, err = ended(program(run, env=QUICK), 1)
    assert re.fullmatch(r"error: .*checkpoint 2 could not be written: .*\n", err), err


@pytest.mark.parametrize("how", LIBRARY_WAYS)
def test_what_a_library_says_when_our_code_calls_it(program, tmp_path, how):
    ours = f"exec(compile({f'import library; library.say({how!r})'!r}, {str(ROOT / 'mlm' / 'x.py')!r}, 'exec'), {{}})"
    out, err = ended(program(f"{ours}\nprint('own')"))
    assert (out, err) == ("own\n", "")
    assert "said by a library" in "".join(logs(tmp_path))


def test_reports_of_the_standard_library_are_a_librarys(program, tmp_path):
    tasks = """
    import asyncio, gc
    async def fail():
        raise OSError("No space left on device")
    async def work():
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0.01)
        del task
        gc.collect()
    asyncio.run(work())
    """
    assert ended(program(tasks)) == ("", "")
    (log,) = logs(tmp_path)
    assert "Task exception was never retrieved" in log and "No space left on device" in log


USERS = """
import logging, pprint, traceback, warnings
pprint.pprint("pretty")
logging.warning("own logging")
late = logging.getLogger("late")
late.addHandler(logging.StreamHandler())
late.propagate = False
late.error("own handler")
warnings.warn("own warning")
library.say("stderr")
try:
    raise ValueError("own traceback")
except ValueError:
    traceback.print_exc()
from tqdm import tqdm
list(tqdm([1], desc="own bar"))
import threading
thread = threading.Thread(target=lambda: int("own thread"))
thread.start()
thread.join()
"""


def test_what_the_user_says_passes(program, tmp_path):
    """Of a library that the user's code calls, what is printed was asked for; its logging was not."""
    before = "import logging\nlogging.basicConfig(level='INFO', format='early %(message)s')"
    out, err = ended(program(USERS + "library.say('logging')\n", before=before))
    assert out == "'pretty'\n"
    for part in ("early own logging", "own handler", "own warning", "ValueError: own traceback", "own bar: 100%"):
        assert part in err
    assert "'own thread'" in err and err.count("said by a library") == 1
    assert logs(tmp_path) == ["early said by a library\n"]


def test_what_jax_prints_for_the_user_passes(program, tmp_path):
    main = """
    import jax
    jax.jit(lambda x: jax.debug.print("value {x}", x=x))(3.0)
    jax.effects_barrier()
    """
    assert ended(program(main))[0] == "value 3.0\n"


def test_a_debugger_has_the_terminal_with_line_editing(program, tmp_path):
    main = """
    os.write(2, b"native before\\n")
    word = "xyzzy"
    breakpoint()
    os.write(2, b"native in between\\n")
    print("own")
    os.write(2, b"native after\\n")
    """
    ours, theirs = pty.openpty()
    process = program(main, stdin=theirs, stdout=theirs, stderr=theirs, env={"TERM": "xterm"})
    os.close(theirs)
    shown = ""

    def until(text: str) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(ours, 4096).decode()

    until("(Pdb) ")
    # The left arrow: without line editing the name would be `wor\x1b[Dd`, a syntax error.
    os.write(ours, b"p wod\x1b[Dr\n")
    until("'xyzzy'")
    os.write(ours, b"c\n")
    until("own\r\n")
    assert process.wait(timeout=20) == 0
    os.close(ours)
    assert "native before" not in shown and "native after" not in shown
    (log,) = logs(tmp_path)
    assert "native before" in log and "native after" in log


SAID = "os.write(2, b''.join(b'said %d\\n' % i for i in range(30)))\n"


ALARM = "os.write(2, b'E1 cpu_aot_loader.cc:195] Target machine feature +prefer-no-gather is not supported\\n')\n"


@pytest.mark.parametrize(
    "end, code",
    [
        ("os.abort()", -signal.SIGABRT),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("os._exit(3)", 3),
        ("raise AssertionError('a bug')", 1),
    ],
    ids=["abort", "crash", "kill", "exit", "bug"],
)
def test_an_abnormal_end_shows_the_last_lines(program, tmp_path, end, code):
    out, err = ended(program(f"print('own', flush=True)\n{SAID}{ALARM}{end}"), code)
    (path,) = tmp_path.glob("cache/logs/*.log")
    head, *lines = err.splitlines()
    assert out == "own\n" and head.endswith(str(path))
    assert "said 29" in lines and "said 0" not in lines
    if code == 1:
        assert lines[:20] == [f"said {i}" for i in range(10, 30)]
        assert lines[20].startswith("Traceback") and lines[-1] == "AssertionError: a bug"
    elif code in (3, -9):
        assert lines == [f"said {i}" for i in range(10, 30)]
    else:
        assert len(lines) == 20 and any("Fatal Python error" in line for line in lines)
        assert any("in main" in line for line in lines)


@pytest.mark.parametrize(
    "end, code, line",
    [
        ("pass", 0, ""),
        ("from espalier.errors import UserError; raise UserError('not so')", 2, "error: not so\n"),
        ("library_log.ended(); os._exit(1)", 1, ""),
        ("os.kill(os.getpid(), 15)", 128 + signal.SIGTERM, "interrupted by SIGTERM\n"),
        ("os.kill(os.getpid(), 1)", 128 + signal.SIGHUP, "interrupted by SIGHUP\n"),
        ("os.kill(os.getpid(), 2)", 130, "interrupted\n"),
        ("os.fork() or os._exit(1); os.wait()", 0, ""),
    ],
    ids=["end", "refusal", "told", "SIGTERM", "SIGHUP", "Ctrl-C", "child"],
)
def test_an_end_that_was_told_or_asked_for_shows_nothing(program, end, code, line):
    began = time.monotonic()
    assert ended(program(SAID + end), code) == ("", line)
    assert time.monotonic() - began < 20


def test_sigterm_ends_soon_also_in_native_code(program):
    process = program("import ctypes\nsleep = ctypes.CDLL(None).sleep\nprint('waiting', flush=True)\nsleep(60)")
    assert process.stdout.readline() == "waiting\n"
    process.terminate()
    assert ended(process, 128 + signal.SIGTERM) == ("", "interrupted by SIGTERM\n")


def test_a_log_without_a_word_is_removed_and_old_ones_are_few(program, tmp_path):
    folder = tmp_path / "cache" / "logs"
    folder.mkdir()
    for number in range(70):
        path = folder / f"2020{number:04}-000000-host-1.log"
        path.write_text("old")
        os.utime(path, (1e9, 1e9))
    ended(program(""))
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == library_log.KEPT - 1 and names[-1] == "20200069-000000-host-1.log"


def test_without_a_place_to_write_there_is_a_temporary_log(program, tmp_path):
    (tmp_path / "file").write_text("")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = program(NATIVE, env={"ESPALIER_CACHE": str(tmp_path / "file"), "TMPDIR": str(temporary)})
    assert ended(process) == ("", "")
    (log,) = temporary.iterdir()
    assert "cpu_aot_loader" in log.read_text()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_harm(program, tmp_path, closed):
    process = program(NATIVE + "print('out')\nprint('err', file=sys.stderr)", closed=closed)
    assert ended(process) == ("out\n" * (closed == "2>&-"), "err\n" * (closed == ">&-"))
    assert "cpu_aot_loader" in "".join(logs(tmp_path))


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_what_listens_for_signals_is_on_no_standard_stream(program, tmp_path, closed):
    """Else the log, which takes that number, is what a slow thread listens to, and closes."""
    main = (
        "from espalier import signals\nopen('numbers', 'w').write(' '.join(str(end.fileno()) for end in signals._pipe))"
    )
    process = program(main, closed=closed)
    assert ended(process) == ("", "")
    assert min(map(int, (tmp_path / "numbers").read_text().split())) > 2


def test_where_python_calls_nothing_is_taken(tmp_path, capfd):
    """Here pytest has the streams, as a notebook has; and a command that a module calls is not the program."""
    library_log.begin()
    cli.run_config(lambda config: os.write(2, b"native\n"), Nothing, "command", [])
    library_log.move_to(tmp_path / "log.txt")
    assert capfd.readouterr().err == "native\n" and library_log.terminal(2) == 2
    assert list(tmp_path.iterdir()) == []
