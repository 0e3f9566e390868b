"""The notebooks' cell that installs: all have the same, and JAX stays as a notebook service built it."""

import ast
import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def install_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def installing(path):
    """What is done where Espalier is missing, without comments, and without the extras that a notebook adds."""
    tree = ast.parse(install_cell(path).replace("espalier[words] @", "espalier @"))
    return next(ast.unparse(node) for node in tree.body if isinstance(node, ast.If))


def wheel(folder, name, version, *needs):
    """A package without modules."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    needed = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(path, "w") as file:
        info = f"{name}-{version}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def test_every_notebook_installs_alike():
    assert len({installing(path) for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize("wanted", ["jax>=0.7.2", "jax>=999"], ids=["fits", "wants-a-newer-one"])
def test_installing_never_replaces_jax(wanted, tmp_path, monkeypatch, capsys):
    """The real pip, which installs nothing here: a newer JAX is at hand, and is refused where it is asked for."""
    wheel(tmp_path, "jax", "1000.0")
    espalier = wheel(tmp_path, "espalier", "9.9", wanted)
    cell = install_cell(NOTEBOOKS[0]).replace("git+https://github.com/OWNER/espalier", espalier.as_uri())
    assert espalier.as_uri() in cell
    run, find_spec, said = subprocess.run, importlib.util.find_spec, []

    def tried(command, **settings):
        if "install" in command:
            command = [*command, "--dry-run", "--no-index", "--find-links", str(tmp_path), "--upgrade", "--verbose"]
            said.append(run(command, capture_output=True, text=True, check=False))
            said[-1].check_returncode()
            return said[-1]
        return run(command, **settings)

    monkeypatch.setattr(subprocess, "run", tried)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "espalier" else find_spec(name, *a)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    here = f"jax=={importlib.metadata.version('jax')}"
    if wanted == "jax>=999":
        with pytest.raises(subprocess.CalledProcessError):
            exec(compile(cell, "cell", "exec"), {})
        assert "conflict" in said[-1].stderr.lower() + said[-1].stdout.lower(), said[-1]
    else:
        exec(compile(cell, "cell", "exec"), {})
        assert capsys.readouterr().out.startswith("JAX ")
        assert "Would install espalier-9.9" in said[-1].stdout and "jax-1000" not in said[-1].stdout, said[-1]
    kept = pathlib.Path("kept.txt").read_text().splitlines()
    assert {here, f"jaxlib=={importlib.metadata.version('jaxlib')}"} <= set(kept)
    assert all(line.split("==")[0].startswith(("jax", "flax", "libtpu", "numpy")) for line in kept)
    assert sys.executable == said[-1].args[0]
