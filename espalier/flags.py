"""Command-line arguments → a configuration of nested dataclasses (tyro). A mistake is a UserError of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from espalier.errors import UserError
from espalier.short_help import settings, short_help

PLAIN_WORDS = (
    (r"^Error parsing ", ""),
    (r"^Unrecognized options: ", "unexpected "),
    (r"^[Ii]nvalid choice ('.*?') for argument '(.*?)'\. Expected one of \((.*?),?\)", r"\2: \1 is not one of \3"),
    (r"^Missing value for argument '(.*?)'.*", r"\1 needs a value"),
    (r"invalid literal for int\(\) with base 10: ('.*?')", r"\1 is not a whole number"),
    (r"could not convert string to float: ('.*?')", r"\1 is not a number"),
    (r"no type matching (\S+) could be instantiated from \[(.*)\]", r"\2 is not \1"),
)
"""Messages of tyro and Python → plain words; a message that is not listed stays as it is."""


def parse(
    config_type: type,
    prog: str,
    description: str | None,
    arguments: list[str],
    default: Any = None,
    also: Sequence[str] = (),
) -> Any:
    """The configuration that the flags describe; UserError in one line where tyro would draw a box.

    default: the base that flags change; None = the defaults of `config_type`. also: further flags, which the caller has
    removed from the arguments.
    """
    if default is not None and not arguments:
        return default
    import tyro

    flags = flags_of(config_type)
    short = default is not None and any(settings(default))
    helping = "--help-all" if short else "--help"
    if short and {"-h", "--help"} & {*arguments}:
        print(short_help(default, prog, description))
        raise SystemExit(0)
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    for number, argument in enumerate(arguments):
        given, equals, value = argument.partition("=")
        flag = given.replace("_", "-")
        if not re.fullmatch(r"--[A-Za-z][\w.-]*", given) or flag in ("--help", "--tyro-print-completion"):
            continue
        # tyro finds these mistakes too, but also calls the arguments after the flag unknown.
        if flag not in flags:
            known = [*flags, *also]
            raise UserError(f"unknown flag {flag}{nearest(flag, known)}; `{prog} {helping}` lists all")
        following = arguments[number + 1 : number + 2]
        if flags[flag] == tuple[str, ...] and not equals and (not following or following[0].startswith("--")):
            raise UserError(f"{flag} needs a value, or more; leave it out for none")
        if equals and flags[flag] is bool:
            raise UserError(f"{argument}: a switch takes no value; write {_switch(flag)}, not {value!r}")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                config_type,
                prog=prog,
                description=description,
                args=arguments,
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        cause: BaseException | None = exit
        while cause := cause.__context__:
            if isinstance(cause, UserError):
                raise cause from None
        raise UserError(f"{_unboxed(box.getvalue())}; `{prog} {helping}` says what is accepted") from None


def flags_of(config_type: type, prefix: str = "--") -> dict[str, Any]:
    """Every flag of a dataclass with its type, nested ones as `--outer.inner`."""
    hints, found = typing.get_type_hints(config_type), {}
    for field in dataclasses.fields(config_type):
        hint, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found |= flags_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = hint
            if hint is bool:
                found[f"{prefix}no-{name}"] = hint
    return found


def spelled_out(arguments: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """`--mesh auto` as `--mesh.auto`: the word `auto` after a group of flags that has such a switch."""
    line: list[str] = []
    for argument in arguments:
        if argument == "auto" and line and f"{line[-1]}.auto" in flags:
            line[-1] += ".auto"
        elif argument.endswith("=auto") and f"{argument.removesuffix('=auto')}.auto" in flags:
            line.append(argument.removesuffix("=auto") + ".auto")
        else:
            line.append(argument)
    return line


def fields_given(arguments: Sequence[str], flags: Mapping[str, Any]) -> Iterator[str]:
    """The fields that these arguments set, as `outer.inner`."""
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in flags:
            name = flag.removeprefix("--")
            if flags[flag] is bool:
                name = re.sub(r"(^|\.)no-", r"\1", name)
            yield name.replace("-", "_")


def _switch(flag: str) -> str:
    """Both spellings of a boolean flag: `--a.b or --a.no-b`."""
    *outer, name = flag.removeprefix("--").split(".")
    name = name.removeprefix("no-")
    return " or ".join("--" + ".".join([*outer, spelling]) for spelling in (name, f"no-{name}"))


def nearest(given: str, known: Iterable[str]) -> str:
    """'; did you mean …?' with up to three names: given without the group or by initials, else similarly spelled."""
    known = sorted(known)
    wanted = given.lstrip("-").split(".")[-1]
    near = []
    for name in known:
        last = name.lstrip("-").split(".")[-1]
        if wanted in (last, "".join(word[:1] for word in last.split("-"))):
            near.append(name)
    near = near or difflib.get_close_matches(given, known, cutoff=0.65)
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def _unboxed(box: str) -> str:
    """The message inside tyro's box, on one line and in plain words."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    parts = [" ".join(part.split()) for part in re.split(r"^[─-]+$", "\n".join(lines), flags=re.M)]
    # The title is in the frame (─ Value error ─), or above a rule where standard output cannot show a frame.
    message = re.sub(r"^─.*?─+ ", "", parts[0]) if parts[0].startswith("─") else parts[1]
    message = message.rstrip(".")
    for pattern, plain in PLAIN_WORDS:
        message = re.sub(pattern, plain, message)
    return message
