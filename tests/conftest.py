"""Eight CPU devices, no network, a cache of its own, and helpers for data and command lines."""

import gc
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import corner
from quick import xla_flags

assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could ask for eight CPU devices"
# The processes of pytest-xdist inherit all this from the first one.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Some hundred processes are started: each would compile the sources anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Many tests start the same small program in a process of its own: it is compiled once a session.
    COMPILED = tempfile.TemporaryDirectory(prefix="espalier-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

# Tests send these; under nohup or in the background of a script they would be ignored, here and in what tests start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

pytest_plugins = ["cpu_seconds"]

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

# The same cases on every run: a failure in CI is the failure on the desk.
settings.register_profile("espalier", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("espalier")


def pytest_collection_modifyitems(items):
    corner.mark(items, ROOT / "tests")


def pytest_collection_finish(session):
    """What was imported stays: no later collection, of which every run makes some, need go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_gone_through_again():
    """Nor what a file of tests imported and compiled: after a thousand tests, a collection took longer than the
    training that asked for it."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Iterator[pathlib.Path]:
    """ESPALIER_CACHE for the whole session, so that no test sees or leaves anything in the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def signals_stay() -> Iterator[None]:
    """A test that leaves a handler behind fails itself; else a later one, which sends a signal, ends this process."""
    before = handlers()
    yield
    after = handlers()
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before, "the handlers of signals that this test met are not those that it leaves"


@pytest.fixture(autouse=True)
def import_path_stays(monkeypatch):
    """A user's file that a test loads puts its folder on the path: what lies there is not found by later tests."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """A report that a test makes in this process has dots for its curves: drawing them takes longer than training.

    Left as they are where the page itself is looked at; so are those of commands in processes of their own.
    """
    if request.node.path.name != "test_report.py":
        from espalier.report import figures

        dot = b"\x89PNG\r\n\x1a\n"
        monkeypatch.setattr(figures, "_png", lambda *arguments: dot)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder with the real texts and labelled sets: `../shared/data`."""
    if not (SHARED_DATA / "SHA256SUMS").is_file():
        pytest.fail(f"{SHARED_DATA} is not there; this test reads real data: put shared/data beside the checkout")
    return SHARED_DATA


@pytest.fixture
def ask(capsys):
    """ask(*arguments) → (the exit code, standard output, standard error) of `evaluate`."""

    from espalier.commands import evaluate

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            evaluate.command([str(one) for one in arguments])
        except SystemExit as exit:
            code = exit.code  # type: ignore[assignment]
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def start_cli(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start_cli("mlm.pretrain", "debug", "--steps", 3, devices=8): a running process with text pipes.

    It sees `devices` CPU devices and works in `cwd` (unset = tmp_path). What still runs when the test ends is killed.
    """
    started = []

    def start(module: str, *arguments: object, devices: int = 1, cwd=None, env: dict[str, str] | None = None):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, arguments)],
            cwd=cwd or tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices)} | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_cli(start_cli) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `start_cli`, but waits: a CompletedProcess. Any exit code but `code` (None = all allowed) fails the test."""

    def run(module: str, *arguments: object, code: int | None = 0, timeout: float = 240, **options):
        process = start_cli(module, *arguments, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"{module} {arguments} still ran after {timeout} s\n{out[-3000:]}\n{err[-3000:]}")
        if code is not None and process.returncode != code:
            pytest.fail(f"{module} {arguments}: exit {process.returncode}, not {code}\n{out[-3000:]}\n{err[-6000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(autouse=True)
def signals_are_given_back():
    """A command that was run in this process took them over; a second signal would end the process."""
    yield
    if "espalier.signals" in sys.modules:
        sys.modules["espalier.signals"].end()


@pytest.fixture
def call_cli(tmp_path, monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `run_cli` for a command with presets, but in this process, with its eight devices: without its start."""

    def call(module: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        from espalier import cli

        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        command, ended = importlib.import_module(module), 0
        argv = [str(argument) for argument in arguments]
        try:
            cli.run(command.main, command.PRESETS, prog=module.split(".")[0], description="", argv=argv)
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            ended = exit.code
        out, err = capsys.readouterr()
        assert ended == code, f"{module} {arguments}: {ended}, not {code}\n{out[-3000:]}\n{err[-6000:]}"
        return subprocess.CompletedProcess([module, *argv], ended, out, err)

    return call


@pytest.fixture
def bert(tmp_path):
    """A masked-LM BERT in a folder, with its parameters."""
    from tiny_models import BERT, random_params

    from espalier.models.hub import save_pretrained

    params = random_params(BERT, ("masked_lm",))
    save_pretrained(tmp_path / "bert", BERT, params)
    return tmp_path / "bert", params
