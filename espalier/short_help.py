"""The `--help` of a command with hundreds of settings: those that people change, on one screen.

A configuration declares such a field by `often`. A leaf: configurations import it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

OFTEN = "often"
WIDEST = 100
LONGEST_FLAG = 34
"""A longer flag has a line of its own."""


def often(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that people often set, with this default: the short help lists it."""
    return dataclasses.field(default=default, metadata={OFTEN: True})


OTHER_BASES = """In place of PRESET:
  FILE.py:NAME         a function of yours that returns the configuration; or package.module:NAME
  --from-config FILE   a saved configuration: a run directory, its config.json, or what --print-config printed; all its
                       settings but run_dir, stop_at, export, profile, json and debug

Flags change what the preset, function or file says. `{prog} PRESET --help` shows the flags that people
change, `--help-all` every flag; `--print-config` prints all settings as JSON and exits."""


class Setting(NamedTuple):
    """A setting as the short help shows it."""

    flag: str
    """With its value: `--steps INT`."""
    meaning: str
    """The first sentence of its documentation, with the meaning of leaving it unset."""
    default: Any


def settings(config: Any, prefix: str = "--") -> Iterator[Setting]:
    """The settings that a configuration declares by `often`, nested ones as `--outer.inner`.

    A class may name inherited ones in its attribute `SELDOM`: they are left out.
    """
    hints, meanings = typing.get_type_hints(type(config)), documentation(type(config))
    seldom = getattr(config, "SELDOM", ())
    for field in dataclasses.fields(config):
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{name}.")
        elif field.metadata.get(OFTEN) and field.name not in seldom:
            meaning = re.sub(r"\s+", " ", meanings.get(field.name, ""))
            first, *more = re.split(r"(?<!e\.g)\. ", meaning)[0].rstrip(".").split("; ")
            words = "; ".join([first, *(part for part in more if part.startswith("unset"))])
            yield Setting(f"{name} {_takes(hints[field.name])}".rstrip(), words, value)


@functools.cache
def documentation(config_type: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and its bases."""
    found = {}
    for parent in reversed(config_type.__mro__):
        # One that only joins others has no source where a function made it.
        if not dataclasses.is_dataclass(parent) or not inspect.get_annotations(parent):
            continue
        (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(parent))).body)  # type: ignore
        for field, below in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = getattr(below.value, "value", None)
                if isinstance(text, str) and isinstance(field.target, ast.Name):
                    found[field.target.id] = text
    return found


def short_help(config: Any, prog: str, description: str | None) -> str:
    """The page: what the command does, the settings that people change, and where the others are listed."""
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    lines = [f"usage: {prog} [flags]", ""]
    for paragraph in (description or "").split("\n\n"):
        lines += textwrap.wrap(paragraph, width, break_on_hyphens=False, break_long_words=False) + [""]
    # The training data comes first.
    shown = sorted(settings(config), key=lambda setting: not setting.flag.startswith("--data."))
    left = 4 + max(len(setting.flag) for setting in shown if len(setting.flag) <= LONGEST_FLAG)
    for flag, meaning, default in shown:
        words = meaning if default in (None, (), False) else f"{meaning} (default: {_written(default)})"
        head = f"  {flag}".ljust(left)
        if len(head) > left:
            lines.append(head)
            head = ""
        lines += textwrap.wrap(
            words, width, initial_indent=head.ljust(left), subsequent_indent=" " * left, break_on_hyphens=False
        )
    end = f"`{prog} --help-all` lists every flag, `--print-config` their values."
    return "\n".join([*lines, "", *textwrap.wrap(end, width, break_on_hyphens=False)])


def preset_help(presets: Mapping[str, Callable[[], Any]], prog: str, description: str) -> str:
    """The page of a command that takes a preset: what it does, its presets, and other forms of a configuration."""
    width = max(map(len, presets)) + 4
    lines = [f"usage: {prog} PRESET [flags]", "", description, "", "presets:"]
    for name, preset in presets.items():
        summary = (inspect.getdoc(preset) or "").split("\n")[0]
        lines += textwrap.wrap(
            f"  {name}".ljust(width) + summary, 118, subsequent_indent=" " * width, break_on_hyphens=False
        )
    return "\n".join([*lines, "", OTHER_BASES.format(prog=prog)])


def _takes(hint: Any) -> str:
    """What follows the flag: INT, {adamw,muon}, STR …; nothing after a switch."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if typing.get_origin(hint) is tuple:
        return f"{_takes(parts[0])} …"
    if parts:
        return _takes(parts[0])
    return "" if hint is bool else hint.__name__.upper()


def _written(default: Any) -> str:
    return (
        f"{default:g}" if isinstance(default, float) else f"{default:,}" if isinstance(default, int) else str(default)
    )
