"""Presets → command line: everything between the arguments of a command and its `main`.

An entry point with presets calls `run`, a command without presets `run_config`. Both make one flag of every field of
the configuration's dataclasses (flags.py), call `main(config)`, print its result as JSON under `--json`, and report an
error of the user or the machine in one line (exits.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from espalier import library_log, progress, saved_config, signals, user_code
from espalier.errors import UserError
from espalier.exits import one_line_errors
from espalier.flags import fields_given, flags_of, nearest, parse, spelled_out
from espalier.redaction import without_secrets
from espalier.short_help import preset_help

FROM, PRINT = "--from-config", "--print-config"


@dataclasses.dataclass(frozen=True)
class Call:
    """How an entry point was called, beyond its configuration; empty where Python calls it."""

    command: str | None = None
    """The command line, without secrets."""
    given: frozenset[str] = frozenset()
    """The fields that flags set, nested ones as `outer.inner`."""
    began: float | None = None
    """When the process began, in seconds since 1970."""

    def greet(self) -> None:
        """Print the first line of a command, before imports that take seconds."""
        if self.command:
            words = shlex.split(self.command)[1:]
            progress.say(f"{' '.join(words[: 3 if FROM in words[1:2] else 2])}: loading JAX …")

    def settings_of(self, name: str) -> frozenset[str]:
        """The fields that flags set in the nested configuration `name`."""
        return frozenset(field.removeprefix(f"{name}.") for field in self.given if field.startswith(f"{name}."))


FROM_PYTHON = Call()


def run(
    main: Callable[[Any, Call], Any],
    presets: Mapping[str, Callable[[], Any]],
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """`prog PRESET [flags]`: call `main` with the preset's configuration as the flags changed it, and the call.

    PRESET is a name in `presets`, or FILE.py:NAME or package.module:NAME of a user's own (user_code.py). In its place,
    --from-config takes a saved configuration (saved_config.py); --print-config prints the configuration and ends.
    A configuration whose `run_dir` is unset gets `runs/<prog>-<preset>`. If this is the program that was started,
    library output goes to a log (library_log.py). Exit codes, by SystemExit: 2 for an error of the user, 1 for one of
    the machine, 128 + n if signal n (Ctrl-C: 2) ended it early.
    """
    began = _process_began() if _take_the_terminal() else time.time()
    arguments = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors("--debug" in arguments):
        if arguments[:1] in (["-h"], ["--help"], ["--help-all"]):
            print(preset_help(presets, prog, description))
            return
        printing = PRINT in arguments
        arguments = [argument for argument in arguments if argument != PRINT]
        command = without_secrets(f"./launch.sh {prog} {shlex.join(map(without_secrets, _unrecorded(arguments)))}")
        base, arguments = _base(presets, prog, arguments)
        config_type = type(base.config)
        flags = flags_of(config_type)
        arguments = spelled_out(arguments, flags)
        given = frozenset(fields_given(arguments, flags))
        if base.source:
            saved_config.check_code(base.source, base.config, given)
        default = saved_config.without_overridden(base.config, given)
        config = parse(config_type, base.prog, base.description, arguments, default, also=(FROM, PRINT))
        if getattr(config, "run_dir", "") is None:
            config = dataclasses.replace(config, run_dir=f"runs/{base.name}")
        called = Call(command, given | base.given, began)
        _refuse_contradictions(config, called)
        if printing:
            print(saved_config.as_json(config, command))
        else:
            _call(lambda config: main(config, called), config)


class _Base(NamedTuple):
    """The configuration that flags change."""

    config: Any
    prog: str
    """As the command line names it: `mlm demo`."""
    description: str | None
    name: str
    """Of its run directory."""
    given: frozenset[str] = frozenset()
    """The fields that flags had set when it was saved."""
    source: str = ""
    """The file that it was read from, which may be someone else's."""


def _base(presets: Mapping[str, Callable[[], Any]], prog: str, arguments: list[str]) -> tuple[_Base, list[str]]:
    """The preset or saved configuration that the arguments name, and the flags."""
    kinds = tuple(dict.fromkeys(type(preset()) for preset in presets.values()))
    name = "" if not arguments or arguments[0].startswith("-") else arguments[0]
    at = next((at for at, argument in enumerate(arguments) if argument.partition("=")[0] == FROM), None)
    if at is not None:
        _, equals, path = arguments[at].partition("=")
        path = path if equals else "".join(arguments[at + 1 : at + 2])
        if not path or path.startswith("-"):
            raise UserError(f"{FROM} needs a run directory, its config.json, or a file that {PRINT} wrote")
        if name:
            raise UserError(
                f"{name} and {FROM} {path} are each a whole configuration; give one of them, and flags for what changes"
            )
        saved = saved_config.read(path, kinds, prog)
        rest = arguments[:at] + arguments[at + (1 if equals else 2) :]
        description = f"The settings of {path}, and what flags change."
        return _Base(saved.config, f"{prog} {FROM} {path}", description, saved.name, saved.given, path), rest
    if name in presets:
        preset = presets[name]
        return _Base(preset(), f"{prog} {name}", inspect.getdoc(preset), f"{prog}-{name}"), arguments[1:]
    if ":" in name:
        preset, config = user_code.preset(name, kinds)
        own = f"{prog}-{name.rpartition(':')[2]}"
        return _Base(config, f"{prog} {name}", inspect.getdoc(preset), own), arguments[1:]
    said = f"unknown preset {name!r}{nearest(name, presets)}" if name else "no preset given"
    raise UserError(
        f"{said}; `{prog} PRESET [flags]` takes one of {', '.join(presets)}, a function of yours as {user_code.FORMS}, "
        f"or, in its place, {FROM} RUN"
    )


def _refuse_contradictions(config: Any, called: Call) -> None:
    """UserError if a group of settings is to be chosen automatically and one of them was given too."""
    for group in (name.removesuffix(".auto") for name in called.given if name.endswith(".auto")):
        chosen = getattr(config, group, None)
        if chosen is not None and chosen.auto and (others := sorted(called.settings_of(group) - {"auto"})):
            raise UserError(f"--{group} auto chooses --{group}.{others[0]} too; leave out one of them")


def run_config(main: Callable[[Any], Any], config_type: type, prog: str, argv: Sequence[str] | None = None) -> None:
    """`prog [flags]`: call `main` with a `config_type` made from the flags; exit codes as in `run`.

    Fields without default may come first, in their order and without the flag: `prog RUN [flags]`.
    """
    _take_the_terminal()
    arguments = list(sys.argv[1:] if argv is None else argv)
    required = [
        field.name
        for field in dataclasses.fields(config_type)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    bare = next((at for at, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    values = min(bare, len(required))
    named = zip(required[:values], arguments[:values], strict=True)
    arguments[:values] = [part for name, value in named for part in (f"--{name.replace('_', '-')}", value)]
    with one_line_errors("--debug" in arguments):
        _call(main, parse(config_type, prog, inspect.getdoc(config_type), arguments))


def _unrecorded(arguments: Sequence[str]) -> list[str]:
    """The arguments as config.json records them."""
    kept, flags = [], {f"--{name.replace('_', '-')}" for name in saved_config.SECRET}
    words = iter(arguments)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.replace("_", "-") not in flags:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def _take_the_terminal() -> bool:
    """Take over signals and send library output to a log, if `run` or `run_config` was called by the program that was
    started; whether so."""
    started = sys._getframe(2).f_globals.get("__name__") == "__main__"
    if started:
        signals.begin()
        library_log.begin()
    return started


def _process_began() -> float:
    """When this process began, in seconds since 1970; where the system does not say so (Linux does), now."""
    now = time.time()
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            # Fields after the name, which may have spaces; the 22nd of all is the start, in ticks since the boot.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return now


def _call(main: Callable[[Any], Any], config: Any) -> None:
    result = main(config)
    if getattr(config, "json", False) and result is not None:
        print(_json_line(_plain(result)))
    sys.stdout.flush()
    if isinstance(result, dict) and result.get("stopped_by"):
        # The convention of shells, so that a script does not go on after an interrupted run as after a finished one.
        raise SystemExit(128 + result["stopped_by"])


def _json_line(value: Any) -> str:
    """One line of JSON; escaped if the encoding of standard output cannot show every character."""
    line = json.dumps(value, allow_nan=False, ensure_ascii=False)
    # Python ends lines at these characters, JSON does not.
    line = re.sub("[\x85\u2028\u2029]", lambda end: f"\\u{ord(end[0]):04x}", line)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return line


def _plain(value: Any) -> Any:
    """JSON values: NaN and infinity become null (JSON has neither), paths strings, NumPy scalars numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
