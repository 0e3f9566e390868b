"""Code of the user's own, named on a command line as FILE.py:NAME or package.module:NAME."""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import hashlib
import importlib
import inspect
import os
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from espalier.errors import UserError
from espalier.files import sha256_of_file, sha256_of_text
from espalier.flags import nearest

FORMS = "FILE.py:NAME or package.module:NAME"
_current: dict[Path, str] = {}
"""SHA-256 of each file as it was last run."""


def load(given: str) -> Any:
    """What `FILE.py:NAME` or `package.module:NAME` names. A file is run once in a process, anew where it was edited.

    Modules beside the file (for the other form: in the working directory) can be imported by it; they hide no module
    that is installed. UserError where there is no such file, module or name, and where it raises.
    """
    place, _, name = given.rpartition(":")
    if not place or not name:
        raise UserError(
            f"{given!r} names nothing in a file; accepted is {FORMS}, for instance my_file.py:{name or 'x'}"
        )
    module = _file(given, place) if place.endswith(".py") or os.sep in place else _module(given, place)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(f"{given}: {place} has no {name}{nearest(name, own)}; it defines {', '.join(own) or 'nothing'}")
    return getattr(module, name)


def preset(given: str, config_types: tuple[type, ...]) -> tuple[Callable[[], Any], Any]:
    """A user's preset and its configuration, as one of `config_types`; UserError if it returns something else.

    A configuration of a base class gets the defaults of the rest: `plan` adds settings of its own to those of a run.
    """
    function = load(given)
    kinds = " or ".join(dict.fromkeys(map(_name, config_types)))
    if not callable(function):
        raise UserError(
            f"{given} is a {_name(type(function))}; accepted is a function without arguments that returns {kinds}"
        )
    with one_line(given, getattr(getattr(function, "__code__", None), "co_filename", None)):
        config = function()
    if isinstance(config, config_types):
        return function, config
    base: type = type(config)
    extended = [kind for kind in config_types if issubclass(kind, base)]
    if extended and dataclasses.is_dataclass(config):
        return function, extended[0](
            **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        )
    raise UserError(
        f"{given} returns a {_name(type(config))}; accepted is {kinds}: begin with one, or with a preset and "
        "dataclasses.replace"
    )


def function(given: Any, form: str, said: str = "") -> Callable[..., Any]:
    """A function of the user's own: `given` itself, or what it names. Its errors are one line each.

    form: how it is called, `mask(batch, key)`, for the UserError where it does not take that many arguments. said: what
    it is called in messages; unset = its name.
    """
    found = load(given) if isinstance(given, str) else given
    said = said or (given if isinstance(given, str) else getattr(found, "__qualname__", repr(found)))
    takes = form[form.index("(") + 1 : form.rindex(")")]
    arguments = [name for name in takes.split(", ") if name]
    if not callable(found):
        raise UserError(f"{said} is a {_name(type(found))}; accepted is a function {form}")
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError:
        raise UserError(f"{said} takes {inspect.signature(found)}; accepted is a function {form}") from None

    def called(*given: Any) -> Any:
        with one_line(said, getattr(getattr(found, "__code__", None), "co_filename", None)):
            return found(*given)

    return called


def recorded(given: Any) -> dict[str, str]:
    """Where code of the user's own is, for config.json: its file, its name in there, and a SHA-256.

    given: as on a command line, and the SHA-256 is of the file; or a function, and it is of its source and of what that
    uses: values of the functions around it, and simple values and functions of its module. Of a functools.partial, the
    name holds the arguments. UserError where that cannot be told.
    """
    if isinstance(given, str):
        place, _, name = given.rpartition(":")
        load(given)
        if not (place.endswith(".py") or os.sep in place):
            file = _file_of(place)
            return {"file": str(file), "name": name, "sha256": sha256_of_file(file)}
        file = Path(place).expanduser().absolute()
        # Of what was run, which may have been edited since.
        return {"file": str(file), "name": name, "sha256": _current[file]}
    inner, arguments = given, []
    while isinstance(inner, functools.partial):
        named = [f"{name}={_plain(value, given)}" for name, value in inner.keywords.items()]
        arguments += [*(_plain(value, given) for value in inner.args), *named]
        inner = inner.func
    if not inspect.isfunction(inner):
        raise _untold(given, f"is a {_name(type(inner))}")
    name = inner.__qualname__ + (f"({', '.join(arguments)})" if arguments else "")
    parts = [*arguments, *_sources(inner, set())]
    return {"file": inner.__code__.co_filename, "name": name, "sha256": sha256_of_text("\0".join(parts))}


@contextlib.contextmanager
def one_line(given: str, file: str | None) -> Iterator[None]:
    """Errors of the user's code become a UserError that says where they are in `file`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == file else []
        where = f" in line {lines[-1]} of {file}" if lines else ""
        words = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise UserError(
            f"{given}: {type(error).__name__}{where}: {words}; correct it there (--debug shows the traceback)"
        ) from error


def _file(given: str, place: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        raise UserError(
            f"{given}: there is no file {path}; paths are seen from where you are, and NAME follows a colon"
        )
    source = path.read_bytes()
    sha256 = hashlib.sha256(source).hexdigest()
    # A name that no package has, so that a file may be called as it likes (data.py, models.py).
    name = f"espalier_user_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:12]}_{sha256[:12]}"
    if name not in sys.modules:
        _importable(path.parent)
        module = sys.modules[name] = types.ModuleType(name)
        module.__file__ = str(path)
        try:
            with one_line(given, str(path)):
                # Not by a loader, which may take what it compiled of a file of the same second and size.
                exec(compile(source, str(path), "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    _current[path] = sha256
    return sys.modules[name]


def _module(given: str, place: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        with one_line(given, None):
            return importlib.import_module(place)
    except UserError as error:
        missing = getattr(error.__cause__, "name", None)
        if isinstance(error.__cause__, ModuleNotFoundError) and f"{place}.".startswith(f"{missing}."):
            raise UserError(
                f"{given}: no module {missing}, neither here nor installed; accepted is {FORMS}"
            ) from error.__cause__
        raise


def _file_of(module: str) -> Path:
    return Path(sys.modules[module].__file__ or "")


def _name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _importable(folder: Path) -> None:
    # At the end: a data.py of the user's must not take the place of an installed one.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _sources(function: types.FunctionType, seen: set) -> Iterator[str]:
    """The source of a function and of those of its module that it uses, with the simple values that it reads."""
    code = function.__code__
    if code in seen:
        return
    seen.add(code)
    try:
        # Of the code: of a function, it would be that of what it wraps.
        yield textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        if not Path(code.co_filename).is_file():
            raise _untold(function, "has no source that can be read") from None
        yield sha256_of_file(Path(code.co_filename))
    defaults = dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
    around = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    for name, value in (defaults | around).items():
        yield from _sources(value, seen) if inspect.isfunction(value) else [f"{name}={_plain(value, function)}"]
    for name in sorted(_globals(code)):
        value = function.__globals__.get(name)
        if inspect.isfunction(value) and value.__module__ == function.__module__:
            yield from _sources(value, seen)
        elif _simple(value):
            yield f"{name}={value!r}"


def _globals(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    own = {str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return own.union(*map(_globals, inner))


def _simple(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_simple, value))
    if isinstance(value, dict):
        return all(map(_simple, (*value.keys(), *value.values())))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_simple(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value is None or isinstance(value, str | bytes | int | float)


def _plain(value: Any, given: Any) -> str:
    if inspect.ismodule(value) or inspect.isclass(value):
        return value.__name__
    if not _simple(value):
        raise _untold(given, f"holds a {_name(type(value))}")
    return repr(value)


def _untold(given: Any, why: str) -> UserError:
    said = getattr(given, "__qualname__", None) or _name(type(given))
    return UserError(
        f"{said} {why}, so a resumed run could not tell whether it is the same; give a function whose values are "
        f"numbers, strings or settings (functools.partial may add some), or name it as {FORMS}"
    )
