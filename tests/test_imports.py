"""Who may import whom (DESIGN, "The house"), and that command lines start without the heavy libraries."""

import ast
import pathlib
import subprocess
import sys
import textwrap
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

ENTRY = {
    "models",
    "data",
    "training",
    "report",
    "sharding",
    "task",
    "pretraining",
    "assembly",
    "predict",
    "sweeps",
    "loading",
}
MAY_IMPORT = {
    "mlm": ENTRY,
    "clm": ENTRY | {"loading"},
    "finetune": ENTRY,
    "models": {"sharding"},
    "task": {"models", "training", "report", "sharding", "predict"},
    "pretraining": {"models", "data", "training", "sharding", "task", "predict"},
    "features": ENTRY | {"mlm", "clm"},
    "assembly": {"models", "data", "training", "report", "sharding", "task", "trackers"},
    "training": {"sharding", "trackers"},
    "trackers": set(),
    "report": {"task"},
    "runs": {"report", "serve"},
    "data": set(),
    "sharding": set(),
    "commands": ENTRY | {"mlm", "clm", "features", "finetune", "loading", "look", "runs", "serve"},
    "look": {"models", "data", "predict", "report"},
    "cluster": {"data"},
    "predict": {"models", "data", "sharding"},
    "serve": {"predict"},
    "loading": {"models", "data", "training", "predict"},
    "sweeps": {"assembly", "models", "sharding", "task", "training"},
    "front": {"assembly", "commands", "sharding", "sweeps", "training"},
    "__init__": {"front", "loading", "look", "predict", "report"},
}
"""Besides itself and the LEAVES. No entry point imports another, nothing imports `commands` but `front`, which with
`loading` is what `import espalier` (`__init__`) offers on demand."""

TOP = ("mlm", "clm", "finetune", "sharding", "cluster", "espalier")
"""Packages at the top; the rooms of the library are within `espalier`."""

MODELS_MAY_TAKE = {"constrain", "mesh_capability", "mesh_platform", "BATCH_AXES"}
"""What `models` takes from `sharding`: how activations lie, and on what."""

LAYING_OUT = ("espalier/models/hub.py", "espalier/models/memory.py", "espalier/models/layout.py")
"""These place weights by the rules or choose a mesh, and may take more; the first also reads tokenizers."""

KNOWN_ONLY_IN = {
    "flax": "espalier/models/",
    "orbax": ("espalier/training/checkpoint.py", "espalier/training/restore.py"),
    "tyro": "espalier/flags.py",
    "tensorboardX": "espalier/trackers/tensorboard.py",
    "wandb": "espalier/trackers/wandb.py",
    "mlflow": "espalier/trackers/mlflow.py",
    "torch": "nowhere",
    "tensorflow": "nowhere",
}
"""Libraries behind one place; the last two are never needed at run time."""

LEAVES = set(
    "__main__ cli contracts errors exits files flags goodput intervals library_log neighbours page_policy progress "
    "redaction saved_config short_help signals speakers user_code".split()
)
"""Which every module may import."""

HEAVY = "jax flax numpy transformers tokenizers datasets optax orbax matplotlib sklearn".split()


def sources() -> list[pathlib.Path]:
    return [path for name in TOP for path in sorted((ROOT / name).rglob("*.py"))]


def room(module: str) -> str:
    """`data` of `espalier.data.loader`, `mlm` of `mlm.loss`; what is not ours keeps the name of its package."""
    return module.removeprefix("espalier.").split(".")[0]


def imports(source: str) -> list[tuple[str, str]]:
    """(module, name or "") of every import in a file, also in functions, under TYPE_CHECKING or by import_module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: the table is read from absolute ones"
            within = [f"espalier.{alias.name}" if node.module == "espalier" else node.module for alias in node.names]
            found += [(module or "", alias.name) for module, alias in zip(within, node.names, strict=True)]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append((str(node.args[0].value), ""))
    return found


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the repository) imports and must not."""
    own = room(path.removesuffix(".py").replace("/", "."))
    bad = []
    for module, name in imports(source):
        top = room(module)
        may = MAY_IMPORT.get(own, set())
        allowed = may | {own, "__version__"} | LEAVES | ({"data"} if path == "espalier/models/hub.py" else set())
        if module.split(".")[0] in TOP and top not in allowed:
            bad.append(f"{path} imports {module}: {own} may import {sorted(may) or 'only the leaves'}")
        if own == "models" and top == "sharding" and path not in LAYING_OUT and name not in MODELS_MAY_TAKE:
            bad.append(f"{path} takes {name or module} from sharding; only {sorted(MODELS_MAY_TAKE)}")
        if top in KNOWN_ONLY_IN and not path.startswith(KNOWN_ONLY_IN[top]):
            bad.append(f"{path} imports {module}, which is known only in {KNOWN_ONLY_IN[top]}")
    return bad


def test_imports_follow_the_table():
    bad = [line for path in sources() for line in violations(str(path.relative_to(ROOT)), path.read_text())]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "path, source",
    [
        ("clm/pretrain.py", "def main():\n    from mlm.masking import choose"),
        ("espalier/training/loop.py", "import importlib\nimportlib.import_module('espalier.models.transformer')"),
        ("espalier/data/loader.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sharding.mesh"),
        ("espalier/models/layers.py", "from sharding.rules import param_spec"),
        ("finetune/train.py", "import espalier.commands.report as r"),
        ("espalier/cli.py", "import espalier.data"),
        ("espalier/training/step.py", "import flax.linen as nn"),
        ("finetune/train.py", "import orbax.checkpoint"),
        ("espalier/models/hub.py", "import torch"),
    ],
)
def test_a_forbidden_import_is_found(path, source):
    assert len(violations(path, source)) == 1


def test_models_import_in_one_direction():
    """No circles, be they under TYPE_CHECKING or within functions; but the registry of families loads them by name."""
    known = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in sources()}
    graph = {}
    for module, path in known.items():
        if module.startswith("espalier.models."):
            found = imports(path.read_text())
            graph[module] = {full for name, part in found for full in (name, f"{name}.{part}") if full in known}
    # As long as something imports nothing that is left, take it away; a circle stays.
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, graph


def test_every_package_is_in_the_table():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"} == set(TOP)
    assert not list(ROOT.glob("*.py"))
    rooms = {path.stem for path in ROOT.glob("espalier/*.py")}
    rooms |= {path.parent.name for path in ROOT.glob("espalier/*/*.py")}
    assert rooms == MAY_IMPORT.keys() - set(TOP) | LEAVES


def test_every_package_is_installed():
    """The list in pyproject.toml, without what only a checkout needs."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in sources()}
    there = {".".join(folder.parts) for folder in folders if folder.parts[0] != "cluster"}
    assert listed == sorted(there), "write the folders of packages into pyproject.toml"


@pytest.mark.parametrize("name", ["datasets", "tokenizers", "evaluate"])
def test_no_folder_hides_a_library(name):
    assert not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()


@pytest.mark.parametrize(
    "module",
    ["espalier", "espalier.cli", "espalier.progress", "espalier.short_help", "sharding.mesh"]
    + ["espalier.report.render, espalier.report.card, espalier.report.tables"]
    + ["mlm.record, clm.record, finetune.tasks.classify.record"]
    + sorted(f"{path.parent.name}.presets" for path in ROOT.glob("*/presets.py"))
    + sorted(f"espalier.{path.parent.name}.config" for path in ROOT.glob("espalier/*/config.py"))
    + sorted(f"espalier.models.families.{path.stem}" for path in ROOT.glob("espalier/models/families/[a-z]*.py")),
)
def test_configurations_import_nothing_heavy(module):
    code = f"import {module}, sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [], f"{module} imports {result.stdout}: `--help` would take seconds"


def test_the_demo_says_what_it_does_before_anything_heavy():
    """The first line within 3 s, without a clock: whatever is imported by then is light."""
    code = textwrap.dedent(f"""
        import builtins, sys
        from espalier.commands.demo import DemoConfig, main
        builtins.print = lambda *a, **k: sys.exit(" ".join(n for n in {HEAVY!r} if n in sys.modules) or 0)
        main(DemoConfig())
        sys.exit("nothing was printed")
    """)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command, flag",
    [
        ("mlm.pretrain debug", "--help"),
        ("mlm.pretrain debug", "--help-all"),
        ("mlm.pretrain debug", "--print-config"),
        ("clm.pretrain debug", "--help-all"),
        ("finetune.train", "--help"),
        ("finetune.train classify", "--print-config"),
        ("clm.generate", "--help"),
        ("espalier.data.prepare", "--help"),
        ("espalier.commands.predict", "--help"),
        ("espalier.commands.evaluate", "--help"),
        ("espalier.commands.serve", "--help"),
        ("espalier.commands.report", "--help"),
    ],
)
def test_help_imports_nothing_heavy(command, flag):
    """The time of `--help`, without a clock: on an idle machine what is left takes a third of a second."""
    code = textwrap.dedent(f"""
        import runpy, sys
        sys.argv = {command.split()!r} + [{flag!r}]
        try:
            runpy.run_module({command.split()[0]!r}, run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            assert not exit.code, exit.code
        print("heavy:", *(name for name in {HEAVY!r} if name in sys.modules))
    """)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy:"
    assert ('"steps": ' if flag == "--print-config" else "usage:") in result.stdout
