"""Code of the user's own, named on a command line as FILE.py:NAME or package.module:NAME."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from espalier.errors import UserError
from espalier.files import sha256_of_file, sha256_of_text
from espalier.flags import nearest

FORMS = "FILE.py:NAME or package.module:NAME"


def load(given: str) -> Any:
    """What `FILE.py:NAME` or `package.module:NAME` names. A file is run once in a process, however often it is named.

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
    """Where code of the user's own is, for config.json: its file, its name in there, and the SHA-256 of the file.

    given: as on the command line, or the function itself; of one from a notebook, the SHA-256 is of its own source.
    """
    if isinstance(given, str):
        place, _, name = given.rpartition(":")
        load(given)
        file = Path(place).expanduser().absolute() if place.endswith(".py") or os.sep in place else _file_of(place)
        return {"file": str(file), "name": name, "sha256": sha256_of_file(file)}
    name = given.__qualname__
    try:
        file = Path(inspect.getsourcefile(given) or "")
        sha256 = sha256_of_file(file) if file.is_file() else sha256_of_text(inspect.getsource(given))
    except (OSError, TypeError):
        raise UserError(
            f"{name}: its source cannot be read, so a resumed run could not tell whether it is the same; define it in "
            "a file or a notebook"
        ) from None
    return {"file": str(file), "name": name, "sha256": sha256}


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
    # A name that no package has, so that a file may be called as it likes (data.py, models.py).
    name = f"espalier_user_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{given}: {path} is no Python file (.py)")
    _importable(path.parent)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with one_line(given, str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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
