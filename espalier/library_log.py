"""Library output goes to a log file; the terminal shows only our lines and the user's. A leaf.

Native code writes to file descriptors 1 and 2, so these are redirected to the log. `sys.stdout` and `sys.stderr` write
to the terminal through other descriptors, unless a library is writing (`speakers.py`).

The log starts in the cache, moves into the run directory once that exists (`move_to`), and is removed if it is empty. A
small process (/bin/sh on a pipe) outlives this one for a moment: if this one ends without `ended()`, by a signal or an
abort in native code, it prints the last lines of the log.

Only commands do this (`cli.run`, started as a program), not code that is called from Python. In a notebook what a
library writes while it works for us goes to such a log too (`begin_in_notebook`); all else is the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import io
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from espalier.redaction import without_secrets
from espalier.speakers import has_part, on_our_behalf, speaker

SHOWN = 20
"""Lines of the log that are printed after an abnormal end."""
WIDTH = 300
"""Characters of each line; lines of XLA may have thousands."""
NO_HINT = r"^Extension modules: |cpu_aot_loader.*\+prefer-no-"
"""Lines that are not printed: the end of faulthandler's output, and tuning preferences that the loader of compiled
programs mistakes for processor features (jax#38445), 2 kB per line and several lines per program."""
ORPHANED = "JAX distributed service detected fatal errors"
KEPT = 50
"""Logs that are kept in the cache, besides those of the last hour."""

WATCHER = """
trap '' HUP INT QUIT TERM
log=$1
while IFS= read -r line; do
    case $line in
    /*) log=$line ;;
    =*) orphaned=${line#=} ;;
    *) exit 0 ;;
    esac
done
exec "$2" -P -E -s -S -c "$3" "$4" "$log" "$orphaned"
"""
"""Reads the current path of the log, or what `orphaned` gave; any other line means that the end was expected."""
SHOW_LAST = """
import sys
sys.path.insert(0, sys.argv[1])
from espalier.library_log import last_lines
sys.stderr.write(last_lines(*sys.argv[2:]))
"""
HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class _Log:
    path: str
    descriptor: int
    terminal: dict[int, int]
    """The original files of descriptors 1 and 2, under their new numbers."""
    provisional: bool
    """Not yet in a run directory."""
    watcher: int
    """Write end of the pipe to the watching process; -1 = none."""
    process: int
    lent: bool = False
    """Whether a debugger currently has 1 and 2 on the terminal."""


_log: _Log | None = None


def begin() -> None:
    """Send library output to a log from here on. Does nothing if the streams were replaced already (a notebook)."""
    global _log
    if _log is not None or sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        return
    occupy()
    path, descriptor = _open_first()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    _log = _Log(path, descriptor, {1: os.dup(1), 2: os.dup(2)}, True, -1, os.getpid())
    _log.watcher = _watched(path, _log.terminal[2])
    _take()
    before = sys.stdout, sys.stderr
    sys.stdout = sys.__stdout__ = _terminal_stream(sys.stdout, 1)
    sys.stderr = sys.__stderr__ = _terminal_stream(sys.stderr, 2)
    _hand_over_handlers(dict(zip(before, (sys.stdout, sys.stderr), strict=True)))
    # Descriptor 2 is the log, wherever it moves.
    faulthandler.enable(file=2, all_threads=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if _log.watcher >= 0 and signal.getsignal(number) == signal.SIG_DFL:
            # Immediately, also within native code: whoever ends the process this way needs no lines of its log.
            faulthandler.register(number, file=_log.watcher, all_threads=False, chain=True)
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable
    threading.excepthook = _uncaught_in_thread
    os.register_at_fork(after_in_child=_forget_watcher)
    for name in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{name}_DISABLE_PROGRESS_BARS", "1")
    # Registered first, so that it runs last.
    atexit.register(ended)


def occupy() -> None:
    """Open /dev/null where standard streams are closed: a file or socket opened then would get their number."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)


def begin_in_notebook() -> None:
    """Keep the words of libraries that work for us out of a cell's output: they go to a log in the cache."""
    for stream in (sys.stdout, sys.stderr):
        kind: Any = type(stream)
        if kind.__module__.startswith("ipykernel.") and not hasattr(kind, "sifts"):
            # IPython sets `write` at the start of a cell, and at its end what it was: neither may undo this.
            write = stream.write
            vars(stream).pop("write", None)
            vars(stream)["_unsifted"] = write
            contents = {"write": property(_sifted, _set_write), "sifts": True, "__module__": kind.__module__}
            stream.__class__ = type(kind.__name__, (kind,), contents)


def _sifted(stream: Any) -> Callable[..., int]:
    write = stream._unsifted

    def sifted(text: str, *more: Any) -> int:
        frame = sys._getframe(1)
        if speaker(frame) != "library" or not on_our_behalf(frame):
            return write(text, *more)
        with contextlib.suppress(OSError):
            _append(_notebook_log(), without_secrets(text).encode("utf-8", "backslashreplace"))
        return len(text)

    sifted.unsifted = write  # type: ignore[attr-defined]
    return sifted


def _set_write(stream: Any, write: Any) -> None:
    stream._unsifted = getattr(write, "unsifted", write)


@functools.cache
def _notebook_log() -> int:
    return _open_first()[1]


def terminal(number: int) -> int:
    """The descriptor of the original standard output (1) or standard error (2)."""
    return number if _log is None else _log.terminal[number]


def move_to(path: str | os.PathLike[str]) -> None:
    """Continue at the end of another file; output from before the run directory existed moves along."""
    if _log is None or os.fspath(path) == _log.path:
        return
    # A log that cannot be moved stays where it is.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        old, provisional = _log.path, _log.provisional
        with contextlib.ExitStack() as stack:
            said = stack.enter_context(open(old, "rb")) if provisional else io.BytesIO()
            _append(descriptor, said.read())
            os.dup2(descriptor, _log.descriptor, inheritable=False)
            os.close(descriptor)
            if not _log.lent:
                _take()
            # Output since the first read.
            _append(_log.descriptor, said.read())
        if provisional or not os.path.getsize(old):
            os.unlink(old)
        _log.path, _log.provisional = os.path.abspath(path), False
        _tell_watcher(_log.path)


def ended() -> None:
    """Announce an expected end of this process. Call it before `os._exit`."""
    if _log is None or os.getpid() != _log.process:
        return
    _tell_watcher("ended")
    with contextlib.suppress(OSError):
        if not os.path.getsize(_log.path):
            os.unlink(_log.path)


def orphaned(line: str) -> None:
    """What is printed should JAX abort this process because that with its coordinator has ended."""
    if _log is not None:
        _tell_watcher(f"={line}")


def last_lines(path: str, orphaned: str = "") -> str:
    """The last lines of a log as printed after an abnormal end, below a line that names the file; "" if it is empty."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 200_000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    lines = [line for line in lines if line.strip() and not re.search(NO_HINT, line)]
    if orphaned and any(ORPHANED in line for line in lines):
        return f"{orphaned}\n"
    fatal = next((number for number, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
    # Otherwise only the outer frames would be shown.
    lines = lines[: fatal + 8][-SHOWN:]
    lines = [line if len(line) <= WIDTH else f"{line[:WIDTH]} …" for line in lines]
    head = f"the last lines of library output; all of it is in {path}"
    return "\n".join([head, *lines, ""]) if lines else ""


class _Terminal(io.TextIOWrapper):
    """`sys.stdout` or `sys.stderr` on the terminal; library output goes to the log."""

    number = 0

    def write(self, text: str, /) -> int:
        who = speaker(sys._getframe(1))
        if _log is not None and (who == "debugger") != _log.lent:
            _log.lent = not _log.lent
            if _log.lent:
                # Line editing is native code, which `input` uses only if the streams are descriptors 0 and 1.
                os.dup2(_log.terminal[1], 1)
                os.dup2(_log.terminal[2], 2)
            else:
                _take()
        if who == "library" and _log is not None:
            _append(_log.descriptor, without_secrets(text).encode("utf-8", "backslashreplace"))
            return len(text)
        return super().write(text)

    def fileno(self) -> int:
        return self.number if _log is not None and _log.lent else super().fileno()


def _terminal_stream(stream: Any, number: int) -> Any:
    """A stream like this one on the terminal's new descriptor. stream: None if it was closed."""
    assert _log is not None
    raw = io.FileIO(_log.terminal[number], "wb", closefd=False)
    if stream is None:
        twin = _Terminal(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace")
    else:
        twin = _Terminal(
            # PYTHONUNBUFFERED
            raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw),  # type: ignore[arg-type]
            encoding=stream.encoding,
            errors=stream.errors,
            newline="\n",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
    twin.number = number
    twin.mode = "w"  # type: ignore[attr-defined]
    return twin


def _open_first() -> tuple[str, int]:
    """Path and descriptor of a new log in the cache, or among the temporary files if the cache is not writable."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    cache = os.environ.get("ESPALIER_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "espalier")
    folder = os.path.join(os.path.abspath(cache), "logs")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.uname().nodename}-{os.getpid()}.log"
    try:
        os.makedirs(folder, exist_ok=True)
        _remove_old(folder)
        path = os.path.join(folder, name)
        return path, os.open(path, flags, 0o666)
    except OSError:
        descriptor, path = tempfile.mkstemp(prefix="espalier-", suffix=".log")
        os.close(descriptor)
        return path, os.open(path, flags)


def _remove_old(folder: str) -> None:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".log"))
    for name in names[: -KEPT + 1]:
        # Another process may be removing it too.
        with contextlib.suppress(OSError):
            path = os.path.join(folder, name)
            if os.path.getmtime(path) < time.time() - 3600:
                os.unlink(path)


def _take() -> None:
    """Redirect descriptors 1 and 2 to the log."""
    assert _log is not None
    os.dup2(_log.descriptor, 1)
    os.dup2(_log.descriptor, 2)


def _append(descriptor: int, data: bytes) -> None:
    # A full disk must not end the run.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


def _watched(path: str, stderr: int) -> int:
    """Start the watching process; returns the write end of its pipe."""
    there, here = os.pipe()
    files = [(os.POSIX_SPAWN_DUP2, there, 0), (os.POSIX_SPAWN_DUP2, stderr, 2)]
    files += [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    try:
        arguments = ["sh", "-c", WATCHER, "sh", path, sys.executable, SHOW_LAST, HOUSE]
        os.posix_spawn("/bin/sh", arguments, os.environ, file_actions=files)
    except OSError:
        os.close(here)
        return -1
    finally:
        os.close(there)
    return here


def _tell_watcher(line: str) -> None:
    assert _log is not None
    if _log.watcher >= 0:
        with contextlib.suppress(OSError):
            os.write(_log.watcher, os.fsencode(line) + b"\n")


def _forget_watcher() -> None:
    """In a forked child, whose end must not look like the end of the parent."""
    if _log is not None and _log.watcher >= 0:
        os.close(_log.watcher)
        _log.watcher = -1


def _hand_over_handlers(streams: dict[Any, Any]) -> None:
    """Logging handlers that were created before stay on the terminal."""
    logging = sys.modules.get("logging")
    if logging is None:
        return
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        stream = getattr(handler, "stream", None)
        if stream is not None and stream in streams:
            handler.setStream(streams[stream])


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the last library output, then the traceback, last, where people look for it."""
    if _log is not None and not issubclass(kind, KeyboardInterrupt):
        os.write(_log.terminal[2], last_lines(_log.path).encode("utf-8", "replace"))
    if _log is not None and sys.stderr is not None:
        import traceback

        sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))
        sys.stderr.flush()
    else:
        sys.__excepthook__(kind, error, trace)


def _unraisable(unraisable: Any) -> None:
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Of signals.py, which imports this.
        getattr(unraisable.exc_value, "swallowed", lambda: None)()
        return
    if has_part(unraisable.exc_traceback):
        sys.__unraisablehook__(unraisable)
    else:
        _report(f"{unraisable.err_msg or 'Exception ignored in'}: {unraisable.object!r}", unraisable.exc_value)


def _uncaught_in_thread(arguments: Any) -> None:
    if has_part(arguments.exc_traceback):
        threading.__excepthook__(arguments)
    else:
        _report(f"Exception in thread {getattr(arguments.thread, 'name', '')}", arguments.exc_value)


def _report(head: str, error: BaseException | None) -> None:
    import traceback

    assert _log is not None
    lines = traceback.format_exception(error) if error is not None else []
    text = without_secrets("".join([f"{head}\n", *lines]))
    _append(_log.descriptor, text.encode("utf-8", "backslashreplace"))
