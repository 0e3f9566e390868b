"""What Ctrl-C, SIGTERM and SIGHUP (a lost terminal) do to a command: it ends with one line and the status 128 + n.

Who has something to save (`saving`) is asked to, and ends by itself. Everything else is interrupted (`Interrupted`), as
Python does on Ctrl-C, and cut off if it is not over after GRACE seconds; a second Ctrl-C cuts off at once. What is on
the disk bears that: it bears a kill.

In a command, signals are told to a thread too, by a pipe that the system writes to: the main thread may be in native
code for minutes (a compiler), where it handles none. From Python nothing is cut off: a second Ctrl-C interrupts. A
signal that is ignored already (nohup) stays ignored. A leaf.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from espalier import library_log

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 10.0
"""Seconds that an interrupted command has to clean up."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the command."""

    def __init__(self, number: int):
        super().__init__(words(number))
        self.number = number

    def swallowed(self) -> None:
        """It was raised in a callback of the interpreter, which lets no exception out: nothing else would end it."""
        if _pipe is not None:
            _cut_off(self.number)


Saver = Callable[[int], bool]
"""Number of a signal → whether there is something to save, which is then begun; called once, by any thread."""

_before: dict[int, Any] = {}
_pipe: tuple[socket.socket, socket.socket] | None = None
_timer: threading.Timer | None = None
_lock = threading.RLock()
_saver: Saver | None = None
_farewell: Callable[[int], object] | None = None
_asked: int | None = None
_saves = _raised = _early = False


def begin(early: bool = False) -> None:
    """Take over the signals of a command. early: nothing has begun, so that nothing needs cleaning up."""
    global _pipe, _early
    _early = early
    if _pipe is None:
        library_log.occupy()
        here, there = _pipe = socket.socketpair()
        there.setblocking(False)
        threading.Thread(target=_listen, args=(here,), name="listening for signals", daemon=True).start()
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forked)
        _take()


def again() -> None:
    """Take them over once more, after a library has."""
    for number in _before:
        signal.signal(number, _handle)


def end() -> None:
    """Give them back, and call off what would cut the command off."""
    global _pipe, _timer, _asked, _saves, _raised, _early
    with _lock:
        if _pipe is not None:
            signal.set_wakeup_fd(-1)
            _pipe[1].close()
        if _timer is not None:
            _timer.cancel()
        while _before:
            signal.signal(*_before.popitem())
        _pipe = _timer = _asked = None
        _saves = _raised = _early = False


def _forked() -> None:
    """In a forked child: signals to it are none to this process, and the thread that may hold the lock is not here."""
    global _lock
    _lock = threading.RLock()
    end()


@contextlib.contextmanager
def saving(saver: Saver) -> Iterator[None]:
    """Within the block a signal asks `saver`, and interrupts nothing where that has something to save."""
    global _saver
    alone = not _before and threading.current_thread() is threading.main_thread()
    if alone:
        _take()
    before, _saver = _saver, saver
    try:
        yield
    finally:
        _saver = before
        if alone:
            end()


@contextlib.contextmanager
def telling(farewell: Callable[[int], object]) -> Iterator[None]:
    """Within the block `farewell` is called with the number of the signal before the command is cut off."""
    global _farewell
    before, _farewell = _farewell, farewell
    try:
        yield
    finally:
        _farewell = before


def interrupted_by(error: BaseException) -> int | None:
    """The number of the signal that this error comes from, also where a library made another one of `Interrupted`."""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "number", signal.SIGINT)
    return None if _saves else _asked


def words(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}"


def tell(line: str) -> None:
    """Write a line to standard error, past Python's streams: the main thread may be in the middle of writing there."""
    # A lost terminal takes no message.
    with contextlib.suppress(OSError):
        os.write(library_log.terminal(2), f"{line}\n".encode())


def _take() -> None:
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            _before[number] = signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    """In the main thread, between two steps of its bytecode."""
    global _raised
    if _early:
        _leave(number)
    again = _asked is not None and _pipe is None and number == signal.SIGINT
    if again or not _decide(number) and not _raised:
        if _pipe is not None and _importing(frame):
            _cut_off(number)
        _raised = True
        raise Interrupted(number)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: native ones do not bear an exception then, and may crash."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _listen(pipe: socket.socket) -> None:
    global _timer
    heard = False
    with pipe:
        while received := pipe.recv(1):
            number = received[0]
            with _lock:
                # The command may have ended, and another one begun, since the system wrote it.
                if _pipe is None or _pipe[0] is not pipe:
                    return
                # Where a server has put a handler of its own, it is not ours to judge.
                if signal.getsignal(number) is not _handle:
                    continue
                if heard and number == signal.SIGINT:
                    _cut_off(number)
                elif not heard and (_early or not _decide(number)):
                    _timer = threading.Timer(1.0 if _early else GRACE, _cut_off, (number,))
                    _timer.daemon = True
                    _timer.start()
                heard = True


def _decide(number: int) -> bool:
    """Whether something is saved; the first of the two who hear of the first signal asks."""
    global _asked, _saves
    with _lock:
        if _asked is None:
            _asked = number
            _saves = _saver is not None and _saver(number)
        return _saves


def _cut_off(number: int) -> NoReturn:
    if _farewell is not None:
        _farewell(number)
    _leave(number)


def _leave(number: int) -> NoReturn:
    tell(words(number))
    library_log.ended()
    os._exit(128 + number)
