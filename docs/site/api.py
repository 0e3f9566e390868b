"""The page of what `import espalier` offers, from its docstrings: prose, shapes, and examples that the tests run."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from typing import Any

import espalier

OTHERS = {
    "Looked": "espalier.look.looked",
    "SamplingConfig": "espalier.predict.sampling",
    "PlanSettings": "espalier.commands.plan.settings",
    "Plan": "espalier.commands.plan.plan",
    "Sweep": "espalier.training.sweep",
    "UserError": "espalier.errors",
}
"""What the functions take, return and raise."""


def api_page() -> str:
    """The page in markdown: each public name, LoadedModel with its methods, then what they return."""
    lines = [
        "# The Python API",
        "",
        "What `import espalier` offers, from its docstrings. [In Python](python.md) shows it at work. Letters in names "
        "are shapes: B batch, T sequence, D hidden, V vocabulary, C classes, N texts.",
    ]
    names = sorted(espalier.__all__, key=lambda name: (name != "load", inspect.isclass(_public(name)), name.lower()))
    for name in names:
        lines += _described(name, _public(name))
    lines += ["", "## What they take and return"]
    for name, module in OTHERS.items():
        lines += _described(name, getattr(importlib.import_module(module), name), level="###")
    return "\n".join(lines) + "\n"


def _public(name: str) -> Any:
    found = getattr(espalier, name)
    # `espalier.look` is a package that can be called.
    return getattr(importlib.import_module("espalier.look.looked"), name) if inspect.ismodule(found) else found


def _described(name: str, thing: Any, level: str = "##") -> list[str]:
    lines = ["", f"{level} {name}", ""]
    if not inspect.isclass(thing):
        return [*lines, _signature(f"espalier.{name}", thing), "", _prose(thing)]
    lines += [_prose(thing)]
    fields = _fields(thing)
    if fields:
        lines += ["", "| field | type | |", "|---|---|---|"]
        lines += [f"| `{field}` | `{_cell(kind)}` | {_cell(meaning)} |" for field, kind, meaning in fields]
    for method, found in vars(thing).items():
        if method.startswith("_") or not inspect.getdoc(found):
            continue
        if isinstance(found, property | functools.cached_property):
            lines += ["", f"{level}# {name}.{method}", "", _prose(found)]
        elif inspect.isfunction(found):
            lines += ["", f"{level}# {name}.{method}", "", _signature(method, found), "", _prose(found)]
    return lines


def _signature(name: str, function: Any) -> str:
    """As code; a line for each argument where one line is too long."""
    arguments, starred = [], False
    for argument in inspect.signature(function).parameters.values():
        if argument.name == "self":
            continue
        if argument.kind is argument.KEYWORD_ONLY and not starred:
            arguments.append("*")
            starred = True
        stars = {argument.VAR_POSITIONAL: "*", argument.VAR_KEYWORD: "**"}.get(argument.kind, "")
        default = "" if argument.default is argument.empty else f" = {argument.default!r}"
        arguments.append(f"{stars}{argument.name}: {_annotation(argument.annotation)}{default}")
    result = _annotation(inspect.signature(function).return_annotation)
    line = f"{name}({', '.join(arguments)}) -> {result}"
    if len(line) > 88:
        line = f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f") -> {result}"
    return f"```python\n{line}\n```"


def _annotation(given: Any) -> str:
    """As it is written."""
    return given if isinstance(given, str) else inspect.formatannotation(given)


def _prose(thing: Any) -> str:
    """A docstring as markdown: examples become blocks of code."""
    lines, example = [], False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line.startswith(">>> ") and not example:
            lines += [*([""] if lines and lines[-1] else []), "```pycon"]
            example = True
        elif example and not line.strip():
            lines.append("```")
            example = False
        # Outside of code a star or a bar would be read as markdown, and an underscore is a letter.
        lines.append(line if example or "`" in line else line.replace("*", r"\*").replace("<", "&lt;"))
    return "\n".join([*lines, "```"] if example else lines)


def _fields(thing: Any) -> list[tuple[str, str, str]]:
    """Annotated names of a class with their types and the strings below them."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(tree, ast.ClassDef)
    found = []
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            found.append((node.target.id, ast.unparse(node.annotation), inspect.cleandoc(said) if said else ""))
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
