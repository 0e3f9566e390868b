"""Presets → command line; errors of the user → one line and exit code 2.

A door calls `run` with its presets, a command without presets calls `run_config`. Both build one flag for every
field of the configuration's dataclasses (tyro), call `main(config)` and print what it returns as JSON under `--json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import json
import math
import os
import re
import select
import shlex
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from espalier import library_log, progress
from espalier.errors import MachineError, UserError
from espalier.short_help import preset_help, settings, short_help

REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR})
"""What the machine may answer to a sound program: no permission, no space left, a file where a folder should be."""

OUT_OF_MEMORY = (
    "the device has too little memory ({}); try --accumulation 2 or more, --execution.remat full, a shorter "
    "--data.sequence-length, or --mesh.fsdp -1 on several devices; what was saved stays"
)
PLAIN_WORDS = (
    (r"^Error parsing ", ""),
    (r"^Unrecognized options: ", "unexpected "),
    (r"^[Ii]nvalid choice ('.*?') for argument '(.*?)'\. Expected one of \((.*?),?\)", r"\2: \1 is not one of \3"),
    (r"^Missing value for argument '(.*?)'.*", r"\1 needs a value"),
    (r"invalid literal for int\(\) with base 10: ('.*?')", r"\1 is not a whole number"),
    (r"could not convert string to float: ('.*?')", r"\1 is not a number"),
    (r"no type matching (\S+) could be instantiated from \[(.*)\]", r"\2 is not \1"),
)
"""Messages of tyro and Python, and what people understand; one that is not listed stays as it is."""


@dataclasses.dataclass(frozen=True)
class Call:
    """How a door was called, beyond its configuration; empty where Python calls it."""

    command: str | None = None
    """The command line."""
    given: frozenset[str] = frozenset()
    """Fields that flags have set, nested ones as `outer.inner`."""

    def greet(self) -> None:
        """The first line of a command, before it imports what takes seconds."""
        if self.command:
            progress.say(f"{' '.join(shlex.split(self.command)[1:3])}: loading JAX …")

    def settings_of(self, name: str) -> frozenset[str]:
        """The fields that were set within the nested configuration `name`."""
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

    A configuration whose `run_dir` is unset gets `runs/<prog>-<preset>`. Where this is the program, and not a part of
    another, what libraries say goes to a log (library_log.py). Leaves by SystemExit where it fails:
    2 for what the user gave, 1 for what the machine refused, 128 + n where a signal n (Ctrl-C: 2) ended it early.
    """
    _take_the_terminal()
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _one_line_errors("--debug" in arguments):
        if arguments[:1] in (["-h"], ["--help"], ["--help-all"]):
            print(preset_help(presets, prog, description))
            return
        name = arguments[0] if arguments else ""
        if name not in presets:
            given = f"unknown preset {name!r}" if arguments and not name.startswith("-") else "no preset given"
            raise UserError(
                f"{given}{_nearest(name, presets)}; `{prog} PRESET [flags]` takes one of {', '.join(presets)}"
            )
        preset = presets[name]
        default = preset()
        flags = dict(_flags(type(default)))
        arguments[1:] = _spelled_out(arguments[1:], flags)
        config = _parse(type(default), f"{prog} {name}", inspect.getdoc(preset), arguments[1:], default)
        if getattr(config, "run_dir", "") is None:
            config = dataclasses.replace(config, run_dir=f"runs/{prog}-{name}")
        called = Call(f"./launch.sh {prog} {shlex.join(arguments)}", frozenset(_given(arguments, flags)))
        for group in (name.removesuffix(".auto") for name in called.given if name.endswith(".auto")):
            if others := sorted(called.settings_of(group) - {"auto"}):
                raise UserError(f"--{group} auto chooses --{group}.{others[0]} too; leave out one of them")
        _call(lambda config: main(config, called), config)


def run_config(main: Callable[[Any], Any], config_type: type, prog: str, argv: Sequence[str] | None = None) -> None:
    """`prog [flags]`: call `main` with a `config_type` made from the flags; exit codes as in `run`.

    The values of fields without default may stand first, in their order and without the flag: `prog RUN [flags]`.
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
    with _one_line_errors("--debug" in arguments):
        _call(main, _parse(config_type, prog, inspect.getdoc(config_type), arguments))


def _take_the_terminal() -> None:
    """Send what libraries say to a log, where `run` or `run_config` was called by the program that was started."""
    if sys._getframe(2).f_globals.get("__name__") == "__main__":
        library_log.begin()


def _call(main: Callable[[Any], Any], config: Any) -> None:
    result = main(config)
    if getattr(config, "json", False) and result is not None:
        print(_json_line(_plain(result)))
    sys.stdout.flush()
    if isinstance(result, dict) and result.get("stopped_by"):
        # As shells have it, so that what should follow a finished run does not follow an interrupted one.
        raise SystemExit(128 + result["stopped_by"])


def _json_line(value: Any) -> str:
    """As people read it, or escaped where the encoding of standard output cannot show every character."""
    line = json.dumps(value, allow_nan=False, ensure_ascii=False)
    # Where Python ends lines, and JSON does not.
    line = re.sub("[\x85\u2028\u2029]", lambda end: f"\\u{ord(end[0]):04x}", line)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return line


def _parse(config_type: type, prog: str, description: str | None, arguments: list[str], default: Any = None) -> Any:
    """The configuration that the flags describe; UserError in one line where tyro would draw a box of many."""
    import tyro

    flags = dict(_flags(config_type))
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
        # tyro would find these two itself, but count what follows the flag as unknown too.
        if flag not in flags:
            raise UserError(f"unknown flag {flag}{_nearest(flag, flags)}; `{prog} {helping}` lists all")
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


def _flags(config_type: type, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Every flag of a dataclass with its type, nested ones as `--outer.inner`."""
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        hint, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _flags(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint
            if hint is bool:
                yield f"{prefix}no-{name}", hint


def _spelled_out(arguments: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """`--mesh auto` as `--mesh.auto`: a group of flags with a switch `auto` takes that word for all of them."""
    line: list[str] = []
    for argument in arguments:
        if argument == "auto" and line and f"{line[-1]}.auto" in flags:
            line[-1] += ".auto"
        elif argument.endswith("=auto") and f"{argument.removesuffix('=auto')}.auto" in flags:
            line.append(argument.removesuffix("=auto") + ".auto")
        else:
            line.append(argument)
    return line


def _given(arguments: list[str], flags: Mapping[str, Any]) -> Iterator[str]:
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


def _nearest(given: str, known: Iterable[str]) -> str:
    """'; did you mean …?' with up to three names: given without their group or by initials, else spelled alike."""
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


@contextlib.contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        # A terminal that is no UTF-8 gets \u4e2d for a character that it does not have, not a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (UserError, MachineError, KeyboardInterrupt, OSError, RuntimeError) as error:
        refused = isinstance(error, OSError) and error.errno in REFUSALS
        full = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(128 + signal.SIGPIPE) from None
        if not (refused or full or isinstance(error, UserError | MachineError | KeyboardInterrupt)):
            raise
        if debug:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        message = OUT_OF_MEMORY.format(str(error).splitlines()[0]) if full else " ".join(str(error).splitlines())
        # Which of several processes it was (sharding/processes).
        who = "".join(f"{note}: " for note in getattr(error, "__notes__", ()) if note.startswith("process "))
        print(f"error: {who}{message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None


def _nobody_reads() -> bool:
    """Whether the reader of stdout has gone (`| head`); if so, nothing more is written there, at exit neither."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _plain(value: Any) -> Any:
    """JSON values: not-finite numbers are null (JSON has no NaN), paths are strings, NumPy scalars are numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
