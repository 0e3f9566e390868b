"""A configuration as JSON: what --print-config prints and --from-config reads, the settings of a run's config.json."""

from __future__ import annotations

import dataclasses
import json
import shlex
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from espalier import progress
from espalier.errors import UserError
from espalier.flags import fields_given, flags_of, nearest, spelled_out
from espalier.redaction import recorded

NOT_TAKEN = frozenset(("run_dir", "stop_at", "export", "json", "debug", "notify", "profile"))
"""Settings of one call, which a file does not hand on: where it writes, where it pauses, how it prints and whom it
tells."""
SECRET = frozenset(("notify",))
"""Those that no file holds, for they are passwords: the URL of a webhook."""
FACTS = frozenset(
    (
        "apart asked_vocabulary beside command concept_mean concept_spread fingerprints head imported_from labels "
        "labels_from_one model part published report task user_code words"
    ).split()
)
"""What config.json records of a run beside its settings, where the configuration has no field of that name."""
INSTEAD = {"steps": "epochs"}
"""A flag → the setting of a file or preset that would win over it, and therefore goes."""
LISTED = 4


class Saved(NamedTuple):
    """A configuration that was read."""

    config: Any
    given: frozenset[str]
    """Fields that flags had set when it was made, nested ones as `outer.inner`."""
    name: str
    """For the run directory of what starts from it."""


def as_json(config: Any, command: str) -> str:
    """The text of --print-config. command: recorded as in config.json, it tells which settings were asked for."""
    task = {"task": config.task} if hasattr(config, "task") else {}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in SECRET}
    return json.dumps(recorded(values | task | {"command": command}), indent=1, ensure_ascii=False)


def read(given: str, config_types: Iterable[type], prog: str) -> Saved:
    """The configuration in `given`: a run directory, its config.json, or a file that --print-config wrote.

    config_types: of the entry point; that of the task in the file is taken, or else which fits the file best. A setting
    that the file does not have gets the default of its class, and a line tells of it. UserError for an unknown setting
    or a wrong value.
    """
    path, values = _read(given)
    kinds = list(config_types)
    kinds = [kind for kind in kinds if getattr(kind, "task", None) == values.get("task")] or kinds
    config_type = min(kinds, key=lambda kind: (len(_unknown(kind, values)), len(_names(kind) - values.keys())))
    unknown = _unknown(config_type, values)
    if unknown and _is_run_of(config_type, values):
        # What a task records of its own, or a newer version.
        progress.say(f"{path}: {', '.join(unknown)} not taken over; {prog} has no such setting")
    elif unknown:
        hint = nearest(unknown[0], _names(config_type))
        by = f" (it was made by `{values['command']}`)" if values.get("command") else ""
        raise UserError(
            f"{path} has {', '.join(unknown[:LISTED])}, which {prog} does not know{hint}{by}; "
            "correct or delete it, or use the command and the version that wrote it"
        )
    missing: list[str] = []
    config = _dataclass(config_type, values, str(path), "", missing)
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        progress.say(f"{path} does not have {', '.join(missing[:LISTED])}{more}: left at the default")
    name = f"{path.parent.name}-again" if path.name == "config.json" else f"{prog}-{path.stem}"
    return Saved(config, _given(values.get("command"), config_type), name)


def check_code(source: str, config: Any, given: Iterable[str] = (), instead: str = "") -> None:
    """UserError where a configuration names code of a user's own that no flag names: a file may be from anyone, and
    what it names would be run. instead: what to do about it, where there is no flag of that name."""
    named = {name: shown for name, shown in _code_in(dataclasses.asdict(config)) if name not in frozenset(given)}
    if named:
        flags = " ".join(f"--{name.replace('_', '-')} {shlex.join(shown)}" for name, shown in named.items())
        raise UserError(
            f"{source} names code to be run: {'; '.join(' '.join(shown) for shown in named.values())}; if you know it, "
            + (instead or f"name it yourself: add {flags}")
        )


def _code_in(values: dict) -> Iterator[tuple[str, list[str]]]:
    """(field, its values) of each that names code: an objective, a masking function, text by python:FILE.py:NAME."""
    data = values.get("data") or {}
    for outer, inner in (("", "objective"), ("masking", "function")):
        value = (values.get(outer) or {}).get(inner) if outer else values.get(inner)
        if isinstance(value, str) and ":" in value:
            yield f"{outer}.{inner}".lstrip("."), [value]
    for name in ("files", "validation_files", "sources", "train", "validation"):
        value = data.get(name) or ()
        texts = [value] if isinstance(value, str) else list(value)
        if any("python:" in str(text) for text in texts):
            yield f"data.{name}", [str(text) for text in texts]


def without_overridden(config: Any, given: Iterable[str]) -> Any:
    """The configuration without what would win over the flags that are given. UserError for two that say the same."""
    given = frozenset(given)
    for flag, other in INSTEAD.items():
        if {flag, other} <= given:
            raise UserError(f"--{flag} and --{other} say how long the schedule is in two ways; give one of them")
    gone = {INSTEAD[flag]: None for flag in given if flag in INSTEAD and hasattr(config, INSTEAD[flag])}
    return dataclasses.replace(config, **gone)


def _read(given: str) -> tuple[Path, dict]:
    path = Path(given).expanduser().absolute()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"--from-config {given}: there is no {path}; accepted is a run directory, its config.json, or a file that "
            "--print-config wrote"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--from-config {given}: {path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"--from-config {given}: {path} holds no JSON object of settings")
    return path, values


def _unknown(config_type: type, values: dict) -> list[str]:
    return sorted(values.keys() - _names(config_type) - FACTS)


def _is_run_of(config_type: type, values: dict) -> bool:
    """Whether this is the config.json of a run of the task that such configurations train."""
    if "fingerprints" not in values:
        return False
    return getattr(config_type, "task", None) == values.get("task")


def _names(config_type: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_type)}


def _given(command: Any, config_type: type) -> frozenset[str]:
    """The fields that the flags of a recorded command set."""
    if not isinstance(command, str):
        return frozenset()
    flags, words = flags_of(config_type), shlex.split(command)
    found = frozenset(fields_given(spelled_out(words, flags), flags))
    for at, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--from-config":
            try:
                found |= _given(_read(value if equals else words[at + 1])[1].get("command"), config_type)
            except (UserError, IndexError):
                continue
    return found


def part_of(kind: type, values: dict, path: str, prefix: str) -> Any:
    """A dataclass within a configuration, of the values that a file has for it; those it does not know are left out."""
    return _dataclass(kind, {name: values[name] for name in values.keys() & _names(kind)}, path, prefix, [])


def _dataclass(kind: type, values: Any, path: str, prefix: str, missing: list[str]) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{path}: {prefix.rstrip('.')}={values!r} must be an object of settings")
    fields, hints = _names(kind), typing.get_type_hints(kind)
    if prefix and (unknown := sorted(values.keys() - fields)):
        raise UserError(
            f"{path} has {prefix}{unknown[0]}, which is no setting here{nearest(unknown[0], fields)}; correct or "
            "delete it, or use the version that wrote it"
        )
    arguments = {}
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        if name in NOT_TAKEN:
            continue
        if field.name not in values:
            missing.append(name)
        elif dataclasses.is_dataclass(hint):
            arguments[field.name] = _dataclass(typing.cast(type, hint), values[field.name], path, f"{name}.", missing)
        elif not _fits(hint, values[field.name]):
            raise UserError(f"{path}: {name}={values[field.name]!r} must be {_words(hint)}")
        else:
            arguments[field.name] = _tuples(values[field.name])
    return kind(**arguments)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value is one of this type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, list):
            return False
        each = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(each) == len(value) and all(map(_fits, each, value))
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin is tuple:
        return f"a list, each {_words(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
