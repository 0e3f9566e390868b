"""The package: what a wheel holds and needs, the `espalier` command, and files of the user's with names of ours."""

import email
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
from setuptools import build_meta

from espalier import __main__ as command_line
from espalier import signals
from espalier.__main__ import KEPT_MEMORY, commands, compiled_programs, keeps_memory

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("clm", "espalier", "finetune", "mlm", "sharding")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, for building leaves folders beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "copy")
        return zipfile.ZipFile(folder / build_meta.build_wheel(str(folder)))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> pathlib.Path:
    """Where the wheel is installed, apart from the checkout."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def test_a_wheel_holds_every_file_of_the_packages(wheel):
    on_disk = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == on_disk, "pyproject.toml lists the packages and the endings of the files in them"


def test_a_wheel_needs_what_requirements_say(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    needs = {line.split(";")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    lines = (ROOT / "requirements.txt").read_text().splitlines()

    def parts(line: str) -> tuple[str, frozenset[str]]:
        name, bounds = re.fullmatch(r"([\w.-]+)(.*)", line.replace(" ", "")).groups()
        return name.replace("_", "-").lower(), frozenset(bounds.split(","))

    assert {parts(need) for need in needs} == {parts(line) for line in lines if line and not line.startswith("#")}
    assert not [need for need in needs if need.startswith(("pytest", "torch", "tensorflow>", "tensorflow="))]
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"


@pytest.fixture
def called(monkeypatch):
    """called("espalier", "--help") is what the command line does in this process, whose signals it gives back."""

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", list(arguments))
        command_line.main()

    yield call
    signals.end()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.NUMBERS)


def test_help_lists_every_command_and_imports_nothing_heavy(capsys, called):
    called("espalier", "--help")
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  espalier ")] == [
        command.name for command in commands()
    ]
    for command in commands():
        assert re.search(r"^if __name__ == .__main__.:$", source_of(command.module), re.M), command


def source_of(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def test_an_unknown_command_names_the_nearest(capsys, called):
    with pytest.raises(SystemExit) as left:
        called("espalier", "finetun")
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: unknown command 'finetun'; did you mean finetune?") and err.count("\n") == 1


class Begun(Exception):
    """What stands for a process that begins anew."""


@pytest.mark.parametrize(
    "command, device, given, arenas",
    [
        ("mlm", False, {}, "1"),
        ("demo", False, {"MALLOC_ARENA_MAX": "3"}, "3"),
        ("prepare", False, {}, None),
        ("clm", True, {}, None),
        ("clm", False, {"TPU_WORKER_ID": "0"}, None),
        ("clm", False, KEPT_MEMORY, None),
    ],
)
def test_training_on_cpus_keeps_its_memory(monkeypatch, tmp_path, called, command, device, given, arenas):
    """Memory is kept by a process that begins anew, once, with the arguments as they were."""
    begun, ran = [], []

    def execve(program, arguments, environment):
        begun.append((arguments, environment))
        raise Begun

    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(command_line, "ACCELERATORS", (str(tmp_path / ("nvidia*" if device else "accel*")),))
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(command_line.runpy, "run_module", lambda module, **_: ran.append(module))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-P", "-m", "espalier", command, "a b"])
    environment = {"HOME": str(tmp_path)} | given
    monkeypatch.setattr(os, "environ", dict(environment))
    if arenas is None:
        called("espalier", command, "a b")
        assert not begun and len(ran) == 1 and sys.argv[-1] == "a b"
    else:
        with pytest.raises(Begun):
            called("espalier", command, "a b")
        ((arguments, then),) = begun
        assert arguments == [sys.executable, "-P", "-m", "espalier", command, "a b"]
        assert then["MALLOC_ARENA_MAX"] == arenas and not keeps_memory(then) and not ran
        assert then["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / ".cache/espalier/compiled"))


def test_compiled_programs_are_kept_by_processor_and_version(tmp_path, monkeypatch):
    """A home that many kinds of processors share: none meets what was compiled for another."""

    def folder(flags: str = "fpu avx2 avx512f", mhz: str = "2000") -> str:
        cpuinfo.write_text(
            f"processor\t: 0\nmodel name\t: Xeon\ncpu MHz\t: {mhz}\nflags\t: {flags}\n\nprocessor\t: 1\n"
        )
        return compiled_programs(str(cpuinfo))

    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ESPALIER_CACHE", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    here = folder()
    assert pathlib.Path(here).parent == tmp_path / ".cache/espalier/compiled"
    assert folder(mhz="3100") == here != folder(flags="fpu avx2")
    (tmp_path / "jaxlib-0.10.1.dist-info").mkdir()
    assert "/jaxlib-0.10.1-cpu-" in folder() and folder() != here
    monkeypatch.setenv("ESPALIER_CACHE", "/cache")
    assert folder().startswith("/cache/compiled/jaxlib-0.10.1-cpu-")
    assert compiled_programs(str(tmp_path / "none"))


@pytest.fixture
def beside(tmp_path) -> pathlib.Path:
    """A user's folder whose files have the names of ours; each ends the process that imports it."""
    folder = tmp_path / "user"
    folder.mkdir()
    for name in ("data", "models", "cli", "training", "commands", *PACKAGES[:1], *PACKAGES[2:]):
        (folder / f"{name}.py").write_text(f'import os\nprint("{name}.py of the user", flush=True)\nos._exit(9)\n')
    return folder


def ran(*arguments: str, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("start", [("-m", "espalier"), ("-P", "-m", "espalier"), ("-P", "-m", "mlm.pretrain")])
def test_the_command_does_not_mind_files_with_its_names(beside, site, start):
    """Installed from a wheel; also where Python looks for modules in the user's folder first (no -P)."""
    arguments = ("mlm", "debug") if start[-1] == "espalier" else ("debug",)
    result = ran(*start, *arguments, "--steps", "0", cwd=beside, PYTHONPATH=str(site))
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: steps=0"), "the run begins and refuses its own settings"


def test_a_script_does_not_mind_files_with_our_names(beside, site):
    """A script beside them takes ours by `import espalier`; what it has taken before is named."""
    (beside / "script.py").write_text(
        "import espalier.models.transformer, mlm.loss, clm.generate, finetune.tasks, sharding.mesh\n"
        "print(espalier.__file__, sharding.__file__)\n"
    )
    (beside / "other.py").write_text("import sharding\nimport espalier\n")
    result = ran("script.py", cwd=beside, PYTHONPATH=str(site))
    assert result.stdout.split() == [str(site / name / "__init__.py") for name in ("espalier", "sharding")]
    (beside / "sharding.py").write_text("")
    result = ran("other.py", cwd=beside, PYTHONPATH=str(site))
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and f"{beside}/sharding.py was imported under that name; rename" in last
