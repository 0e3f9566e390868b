"""launch.sh: which environment, which JAX, what is installed when, and what it runs.

The copy of launch.sh under test meets a stand-in for Python that writes down what it is asked, so that no test
installs anything; questions about versions (`-c`, `-`) are answered by the real interpreter.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from espalier.__main__ import commands

ROOT = pathlib.Path(__file__).resolve().parent.parent

PYTHON = f"""#!/usr/bin/env bash
# A stand-in for python: logs its arguments, makes copies of itself as virtual environments.
if [[ $1 == -c && $2 == *version_info* && -n ${{FAKE_VERSION:-}} ]]; then
  [[ $2 != *print* ]] || echo "$FAKE_VERSION"
  [[ $2 == *print* ]] || exit "${{FAKE_TOO_OLD:-0}}"
  exit 0
fi
case "$1 ${{2:-}} ${{3:-}}" in
  "--version "*) echo "Python 3.11.0"; exit ;;
  "-m venv"*)
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    [[ " $* " == *" --without-pip "* ]] || touch "$folder/pip"
    exit ;;
  "-m pip --version") [[ -e $(dirname "$0")/../pip ]]; exit ;;
  "-m pip --python") touch "$(dirname "$4")/../pip"; exit ;;
  "-m pip install")
    touch "$FAKE_LOG.installing"
    for _ in $(seq "${{FAKE_SECONDS:-0}}"0); do sleep 0.1; done
    echo "Requirement already satisfied: noise"
    echo "Downloading something"
    [[ $5 != --constraint ]] || cp "$6" "$FAKE_LOG.constraints"
    echo "$*" >>"$FAKE_LOG"
    exit "${{FAKE_PIP_EXIT:-0}}" ;;
  "-c import sys; print(sys.prefix)"*) echo "$FAKE_PREFIX"; exit ;;
  "-c import ensurepip"*) exit "${{FAKE_NO_ENSUREPIP:-0}}" ;;
  "-c"* | "- "*) exec {sys.executable} -S "$@" ;;
esac
echo "$0 PYTHONPATH=$PYTHONPATH cwd=$PWD: $*" >>"$FAKE_LOG"
[[ $1 != -P ]] || echo "ran ${{*:3}}"
"""


class Place:
    """A checkout with launch.sh, a stand-in for Python and a log of what Python was asked to do."""

    def __init__(self, folder: pathlib.Path):
        self.root, self.log, self.bin = folder / "checkout", folder / "log", folder / "bin"
        self.root.mkdir()
        self.bin.mkdir()
        (self.root / "espalier/commands").mkdir(parents=True)
        for name in ("launch.sh", "requirements.txt", "requirements-test.txt", "espalier/commands/table.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.tool("python3", PYTHON)
        # Only what launch.sh may expect everywhere: nvidia-smi of this machine stays out of sight.
        for tool in "bash cat cksum cp dirname env flock grep head mkdir mv rm seq sleep touch uname".split():
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"{tool} is not installed"))

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def gpu(self, *lines: str) -> None:
        """An nvidia-smi that answers a query with `driver, compute capability` lines."""
        self.tool("nvidia-smi", "#!/usr/bin/env bash\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")

    def start(self, *arguments: str, cwd: pathlib.Path | None = None, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "launch.sh"), *arguments],
            cwd=cwd or self.root,
            env={"PATH": str(self.bin), "FAKE_LOG": str(self.log), "HOME": str(self.root)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, *arguments: str, code: int = 0, **options) -> tuple[str, str]:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        return out, err

    def asked(self) -> list[str]:
        """The lines of the log since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def installed(self, name: str, version: str) -> str:
        """PYTHONPATH of an environment that holds a distribution."""
        folder = self.root.parent / "site"
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        needs = "Requires-Dist: libtpu==0.0.41.*; extra == 'tpu'\n" if name == "jax" else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        return str(folder)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_first_launch_installs_and_second_only_runs(place):
    out, err = place.launch()
    pip, run = place.asked()
    assert pip.startswith("-m pip install ") and f"--requirement {place.root}/requirements.txt" in pip
    where = f"PYTHONPATH={place.root} cwd={place.root}"
    assert run == f"{place.root}/.venv/bin/python {where}: -P -m espalier demo"
    assert out == "ran espalier demo\n"
    assert "Downloading something" in err and "already satisfied" not in err

    start = time.monotonic()
    out, err = place.launch()
    assert time.monotonic() - start < 3
    assert (out, err) == ("ran espalier demo\n", "")
    assert len(place.asked()) == 1


def test_commands_run_where_the_user_is(place, tmp_path):
    here = tmp_path / "my texts"
    here.mkdir()
    out, _ = place.launch("mlm", "preset", "--files", "a b", cwd=here, PYTHONPATH="/else")
    assert out == "ran espalier mlm preset --files a b\n"
    assert f"PYTHONPATH={place.root}:/else cwd={here}: -P -m espalier mlm" in place.asked()[-1]
    listed, _ = place.launch("--help")
    for command in commands():
        assert re.search(rf"^  ./launch.sh {command.name} .* {re.escape(command.meaning)}$", listed, re.M)
        assert place.launch(command.name)[0] == f"ran espalier {command.name}\n"


def test_an_environment_whose_interpreter_has_gone_is_made_again(place):
    place.launch("mlm")
    (place.root / ".venv/bin/python").unlink()
    place.asked()
    out, err = place.launch("mlm")
    assert out == "ran espalier mlm\n" and "making" in err
    assert [line for line in place.asked() if "pip install" in line]


def test_test_adds_what_tests_need_and_runs_in_the_checkout(place, tmp_path):
    jax = place.installed("jax", "0.10.1")
    place.launch("test", "-k", "a b", cwd=tmp_path, PYTHONPATH=jax)
    needs, tests, compiler, run = place.asked()
    assert compiler.endswith(f"--target {place.root}/.venv/.espalier/libtpu libtpu==0.0.41.*")
    assert "requirements-test" not in needs and f"--requirement {place.root}/requirements-test.txt" in tests
    assert f"cwd={place.root}: -m pytest " in run and run.endswith(" -k a b")
    place.launch("test", PYTHONPATH=jax)
    place.launch("mlm")
    assert not [line for line in place.asked() if "pip install" in line]


def test_plan_for_a_topology_brings_the_compiler_once(place):
    jax = place.installed("jax", "0.10.1")
    place.launch("plan", "gpt2", "--chip", "h100", PYTHONPATH=jax)
    assert not [line for line in place.asked() if "libtpu" in line]
    place.launch("plan", "gpt2", "--topology", "v5e:4x4", PYTHONPATH=jax)
    compiler, run = place.asked()
    assert "libtpu==0.0.41.*" in compiler and run.endswith("-P -m espalier plan gpt2 --topology v5e:4x4")
    place.launch("plan", "gpt2", "--topology=v5e:4x4", PYTHONPATH=jax)
    assert len(place.asked()) == 1
    (place.root / ".venv/.espalier/libtpu/version").unlink()
    _, err = place.launch("plan", "bert-base", "--topology", "v5e:4x4", code=2, PYTHONPATH=jax, FAKE_PIP_EXIT="1")
    assert "the same command tries again" in err


def test_python_is_that_of_the_environment(place):
    place.launch("setup")
    place.asked()
    place.launch("python", "-m", "ruff", "check")
    where = f"PYTHONPATH={place.root} cwd={place.root}"
    assert place.asked() == [f"{place.root}/.venv/bin/python {where}: -P -m espalier python -m ruff check"]


def test_changed_requirements_are_installed(place):
    place.launch("setup")
    place.asked()
    with open(place.root / "requirements.txt", "a") as file:
        file.write("another>=1\n")
    place.launch("setup")
    assert len(place.asked()) == 1
    place.launch("setup")
    assert place.asked() == []


def test_a_failed_installation_is_said_and_tried_again(place):
    _, err = place.launch("mlm", code=2, FAKE_PIP_EXIT="1")
    assert err.endswith("error: the installation did not end well (see above); the same command tries again\n")
    assert len(place.asked()) == 1
    place.launch("mlm")
    assert len(place.asked()) == 2


def wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def kill_while_installing(place: Place) -> None:
    installing = pathlib.Path(f"{place.log}.installing")
    installing.unlink(missing_ok=True)
    process = place.start("setup", FAKE_SECONDS="60")
    wait_for(installing)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert place.asked() == []


def test_a_killed_installation_is_not_taken_for_complete(place):
    kill_while_installing(place)
    place.launch("setup")
    assert len(place.asked()) == 1


def test_a_killed_change_is_not_taken_for_what_was_there_before(place):
    """New requirements, killed halfway, old requirements again: nobody knows what is installed."""
    place.launch("setup")
    place.asked()
    requirements = place.root / "requirements.txt"
    before = requirements.read_text()
    requirements.write_text(before + "another>=1\n")
    kill_while_installing(place)
    requirements.write_text(before)
    place.launch("setup")
    assert len(place.asked()) == 1


def test_a_virtualenv_without_pip_is_made_again(place):
    (place.root / ".venv" / "bin").mkdir(parents=True)
    (place.root / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    out, _ = place.launch()
    assert out == "ran espalier demo\n"


def test_a_python_without_ensurepip_serves_too(place):
    out, _ = place.launch(FAKE_NO_ENSUREPIP="1")
    assert out == "ran espalier demo\n" and (place.root / ".venv" / "pip").exists()


def test_a_second_launch_waits_for_the_first(place):
    first = place.start("mlm", "first", FAKE_SECONDS="2")
    wait_for(pathlib.Path(f"{place.log}.installing"))
    out, err = place.launch("mlm", "second")
    assert first.communicate(timeout=60)[0] == "ran espalier mlm first\n"
    assert out == "ran espalier mlm second\n"
    assert err == "espalier: another launch is installing; waiting for it\n"
    assert sum("pip install" in line for line in place.asked()) == 1


def test_an_active_virtualenv_is_used(place, tmp_path):
    subprocess.run([place.bin / "python3", "-m", "venv", tmp_path / "mine"], env={"PATH": str(place.bin)}, check=True)
    place.launch(VIRTUAL_ENV=str(tmp_path / "mine"))
    assert all(f"{tmp_path}/mine/bin/python " in line for line in place.asked()[1:])
    assert not (place.root / ".venv").exists()


@pytest.mark.parametrize("name, used", [("work", True), ("base", False)])
def test_an_active_conda_environment_is_used_unless_it_is_base(place, tmp_path, name, used):
    subprocess.run([place.bin / "python3", "-m", "venv", tmp_path / "conda"], env={"PATH": str(place.bin)}, check=True)
    place.launch(CONDA_PREFIX=str(tmp_path / "conda"), CONDA_DEFAULT_ENV=name)
    assert (place.root / ".venv").exists() is not used


def test_colab_uses_its_own_python(place, tmp_path):
    place.launch(COLAB_RELEASE_TAG="release-colab_20261101", FAKE_PREFIX=str(tmp_path / "colab"))
    assert place.asked()[1].startswith(f"{place.bin}/python3 ")
    assert (tmp_path / "colab" / ".espalier" / "cpu-run").exists() and not (place.root / ".venv").exists()


def test_python_chooses_the_interpreter(place, tmp_path):
    (place.bin / "python3").rename(place.bin / "python9")
    _, err = place.launch(code=2)
    assert "python3 not found; Python 3.11 or newer is needed" in err and err.count("\n") == 1
    out, _ = place.launch(PYTHON="python9")
    assert out == "ran espalier demo\n"


def test_an_old_python_is_refused_in_one_line(place):
    _, err = place.launch(code=2, FAKE_VERSION="3.10", FAKE_TOO_OLD="1")
    assert err.startswith("error: python3 is Python 3.10; 3.11 or newer is needed: PYTHON=") and err.count("\n") == 1
    assert place.asked() == []


@pytest.mark.parametrize(
    "lines, extra",
    [
        (["580.65.06, 9.0"], "jax[cuda13]"),
        (["595.10, 12.0", "595.10, 12.0"], "jax[cuda13]"),
        (["550.54.15, 9.0"], "jax[cuda12]"),
        (["580.65.06, 7.5"], "jax[cuda13]"),
        (["580.65.06, 7.2"], "jax[cuda12]"),
        (["580.65.06, 9.0", "580.65.06, 6.1"], "jax[cuda12]"),
        (["580.65.06, 6.1", "580.65.06, 9.0"], "jax[cuda12]"),
        (["470.10, 7.5"], None),
        (["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."], None),
    ],
)
def test_the_cuda_build_fits_driver_and_cards(place, lines, extra):
    place.gpu(*lines)
    _, err = place.launch("setup")
    (pip,) = place.asked()
    assert ("jax[" in pip) == (extra is not None) and (extra or "") in pip
    assert ("no GPU that JAX can use" in err) == (extra is None)


def test_a_tpu_gets_its_build(place):
    place.launch("setup", TPU_WORKER_ID="0")
    assert "jax[tpu]" in place.asked()[0]


def test_hardware_that_appears_later_is_installed_for(place):
    """A login node without a GPU makes the environment, a compute node uses it."""
    place.launch("setup")
    place.asked()
    place.gpu("580.65.06, 9.0")
    place.launch("setup")
    assert "jax[cuda13]" in place.asked()[0]
    place.launch("setup")
    assert place.asked() == []


def test_an_installed_jax_is_a_constraint(place):
    site = place.installed("jax", "0.7.2") and place.installed("jaxlib", "0.7.2")
    place.launch("setup", PYTHONPATH=site)
    assert pathlib.Path(f"{place.log}.constraints").read_text().split("\n")[:2] == ["jax==0.7.2", "jaxlib==0.7.2"]


def test_an_installed_cuda_plugin_is_left_alone(place):
    place.gpu("580.65.06, 9.0")
    site = place.installed("jax", "0.7.2") and place.installed("jax-cuda12-plugin", "0.7.2")
    place.launch("setup", PYTHONPATH=site)
    assert "jax[" not in place.asked()[0]


@pytest.mark.parametrize("version", ["0.10.2", "0.11.1", "0.6.2", "0.13.0"])
def test_an_installed_jax_that_is_excluded_is_refused(place, version):
    _, err = place.launch("mlm", code=2, PYTHONPATH=place.installed("jax", version))
    line = err.splitlines()[-1]
    assert line.startswith(f"error: JAX {version} is installed in ") and "!=0.10.2" in line
    assert line.endswith(f"delete {place.root}/.venv")
    assert place.asked() == []


@pytest.mark.parametrize("version", ["0.7.2", "0.10.1", "0.11.0", "0.11.2", "0.12.0.1"])
def test_an_installed_jax_that_is_tested_is_accepted(place, version):
    place.launch("setup", PYTHONPATH=place.installed("jax", version))


def test_an_unknown_command_names_the_nearest_and_installs_nothing(place):
    out, err = place.launch("finetun", code=2)
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: unknown command 'finetun'; did you mean finetune?")
    assert not (place.root / ".venv").exists()


def test_help_installs_nothing(place):
    out, err = place.launch("--help")
    assert "./launch.sh mlm PRESET" in out and err == ""
    assert not (place.root / ".venv").exists()


def test_the_demo_takes_signals_itself(place):
    """exec: a SIGTERM to launch.sh is a SIGTERM to the run, which saves before it leaves."""
    script = place.bin / "python3"
    script.write_text(script.read_text() + "[[ $1 != -P ]] || { echo pid $$; exec sleep 60; }\n")
    process = place.start()
    assert process.stdout.readline() == "ran espalier demo\n"
    assert process.stdout.readline() == f"pid {process.pid}\n"
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
