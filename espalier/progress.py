"""What a person sees while a command runs: lines, a line that is updated in place, and waits.

Everything goes to standard output through Python, or to standard error where results go to the former (`on_stderr`);
threads may print too. If that is neither a terminal nor a notebook, nothing is updated in place: a wait is one line,
repeated at growing intervals. A leaf: every module may import it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from espalier.redaction import without_secrets

PATIENCE = 1.5
"""Seconds before a wait is reported."""
AGAIN = 60.0
"""Seconds until a wait is reported again without a terminal; then twice as long, and so on."""
WIDEST = 100

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that steer a terminal and are no text: a model, a label or a name of a file may hold them."""

_lock = threading.RLock()
_changing = False
_shown = 0
_aside = False
_waits: list[threading.Event] = []


def say(line: str = "") -> None:
    """Print a line."""
    _write(line, keep=True)


def visible(text: str) -> str:
    """The text with what would steer a terminal spelled out: `\\x1b` for the character that begins such a sequence."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def show(line: str) -> None:
    """Print a line that the next one replaces; an ordinary line where none can be."""
    _write(line, keep=not in_place())


def end() -> None:
    """Keep the line that the next one would replace."""
    with _lock:
        if _changing:
            _write("", keep=True, over=False)


@contextlib.contextmanager
def on_stderr() -> Iterator[None]:
    """Within the block all goes to standard error: standard output is for results."""
    global _aside
    end()
    before, _aside = _aside, True
    try:
        yield
    finally:
        end()
        _aside = before


@contextlib.contextmanager
def waiting(what: str, *, bar: bool = False) -> Iterator[Callable[[str], None]]:
    """Report what the block does ("tokenizing train.tsv") once it takes longer than PATIENCE.

    Yields a function that takes its progress ("12 of 128 batches"). bar: the block draws a progress bar on standard
    error, which is enough if that is a terminal.
    """
    far, told, began, ended = "", 0, time.monotonic(), threading.Event()
    if bar and sys.stderr.isatty():
        yield lambda words: None
        return

    def set_far(words: str) -> None:
        nonlocal far
        far = words

    def tell() -> None:
        nonlocal told
        pause = PATIENCE
        while not ended.wait(pause):
            # Of nested waits, only the innermost is reported.
            if not _waits or _waits[-1] is not ended:
                pause = PATIENCE
                continue
            seconds = f"{time.monotonic() - began:.0f} s"
            words = [word for word in (far, seconds if told or in_place() else "") if word]
            show(f"{what} … {', '.join(words)}".rstrip())
            pause = 0.5 if in_place() else AGAIN * 2**told
            told += 1

    teller = threading.Thread(target=tell, name=what, daemon=True)
    _waits.append(ended)
    teller.start()
    try:
        yield set_far
    finally:
        ended.set()
        teller.join()
        _waits.remove(ended)
        with _lock:
            if told and _changing:
                _write("", keep=False)


def block(rows: Mapping[str, str]) -> None:
    """Print names and values in two columns, the values wrapped at spaces to the width of the terminal."""
    room = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    left = 4 + max(map(len, rows))
    lines = []
    for name, value in rows.items():
        for number, part in enumerate(wrapped(value, room - left)):
            lines.append(f"  {'' if number else name}".ljust(left) + part)
    say("\n".join(lines))


def wrapped(text: str, room: int) -> list[str]:
    """The text in lines of at most `room` columns, broken at spaces; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and columns(lines[-1]) + 1 + columns(word) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def columns(text: str) -> int:
    """The width of the text on a terminal: East Asian wide characters take two columns, combining marks none."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )


def plural(count: int, what: str) -> str:
    """1 article, 1,190 questions, 2 micro-batches."""
    ending = "" if count == 1 else "es" if what.endswith("ch") else "s"
    return f"{count:,} {what}{ending}"


def amount(number: float) -> str:
    """A count in three digits: 823, 9.87 k, 110 M, 1.24 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:
            return f"{number / size:#.3g}".rstrip(".") + f" {letter}"
    return f"{number:.0f}"


def size(count: float) -> str:
    """Bytes in three digits: 823 B, 9.87 kB, 1.24 GB."""
    words = amount(count)
    return f"{words.replace(' B', ' G')}{'' if ' ' in words else ' '}B"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:07, 12:00, 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _terminal() -> bool:
    return _stream().isatty()


def _notebook() -> bool:
    """Whether what is printed goes to a cell's output, where a carriage return begins the line anew."""
    return type(_stream()).__module__.startswith("ipykernel.")


def in_place() -> bool:
    """Whether a line can be replaced by the next one."""
    return _terminal() or _notebook()


def _stream() -> TextIO:
    return sys.stderr if _aside else sys.stdout


def _write(line: str, keep: bool, over: bool = True) -> None:
    global _changing, _shown
    with _lock:
        begin = ""
        if over and _changing:
            # A notebook knows no order to clear a line.
            begin = "\r\033[K" if _terminal() else f"\r{' ' * _shown}\r" if _notebook() else ""
        line = visible(without_secrets(line))
        if not keep:
            line = _fitting(line)
        _changing = not keep and bool(line)
        _shown = columns(line)
        try:
            print(begin + line, end="\n" if keep else "", file=_stream(), flush=True)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # The terminal was closed; what runs goes on without one, or ends by the signal that comes with it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), _stream().fileno())


def _fitting(line: str) -> str:
    """The line cut to one line of the terminal: a line that wraps cannot be replaced."""
    room = shutil.get_terminal_size((WIDEST, 24)).columns - 1
    while columns(line) > room:
        line = line[:-1]
    return line
