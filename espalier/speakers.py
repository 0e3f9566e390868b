"""Who writes to the terminal: our code or the user's, a library, or a debugger. The call stack tells.

Walking up from the write, the standard library and pure printers (tqdm, rich) count as their caller. A library called
by our code counts as a library; a library called by the user's code counts as the user, who asked for it. Records of
logging and warnings have an author of their own; a report of the standard library (asyncio) counts as a library.
"""

from __future__ import annotations

import functools
import os
import threading
from types import FrameType, TracebackType

HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN = tuple(os.path.join(HOUSE, name, "") for name in "espalier mlm clm finetune sharding cluster tests".split())
"""Folders of our code; installed, they are among those of the libraries."""
STANDARD_LIBRARY = os.path.dirname(os.__file__)
PRINTERS = frozenset("tqdm tyro rich loguru icecream IPython prompt_toolkit pygments".split())
"""Packages that print what their callers say."""
DEBUGGERS = ("/bdb.py", "/pdb.py", "/jax/_src/debugger/cli_debugger.py")
FOR_USERS = ("/jax/_src/debugging.py",)
"""Files of libraries that print what the user asked for, from threads in which no code of the user's is seen."""
REPORTERS = {"callHandlers": ("record", "pathname"), "_showwarnmsg_impl": ("msg", "filename")}
"""Functions of logging and warnings through which every report comes: its variable there, and what names the author."""


def speaker(frame: FrameType | None) -> str:
    """Whose words are written at this frame: "own" (ours or the user's), "library" or "debugger"."""
    within = "own"
    while frame is not None:
        kind = _kind(_file(frame))
        if kind == "standard library" and frame.f_code.co_name in REPORTERS:
            variable, author = REPORTERS[frame.f_code.co_name]
            found = _kind(getattr(frame.f_locals.get(variable), author, ""))
            # A warning that names a line of ours is about it, not from it.
            return "own" if found == "user" or found == "own" and variable == "record" else "library"
        if kind in ("debugger", "user"):
            return "own" if kind == "user" else kind
        if kind == "own":
            return within
        if kind == "library":
            within = "library"
        frame = frame.f_back
    return within


def on_our_behalf(frame: FrameType | None) -> bool:
    """Whether this is a library at work for our code, not for a caller of the user's: our code is nearer to the write.

    A thread that has neither belongs to a library.
    """
    while frame is not None:
        kind = _kind(_file(frame))
        if kind in ("own", "user"):
            return kind == "own"
        frame = frame.f_back
    return threading.current_thread() is not threading.main_thread()


def has_part(trace: TracebackType | None) -> bool:
    """Whether code of ours or the user's has part in a traceback."""
    while trace is not None:
        if _kind(_file(trace.tb_frame)) in ("own", "user"):
            return True
        trace = trace.tb_next
    return False


def _file(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    if not name.startswith("<") or name.startswith("<frozen"):
        return name
    # Made at run time, as the methods of dataclasses are: by whom is the question.
    return str(frame.f_globals.get("__file__") or "")


@functools.cache
def _kind(file: str) -> str:
    """Whose code a file is: own, user, library, printer, debugger or standard library."""
    if file.startswith("<frozen"):
        return "standard library"
    path = os.path.normpath(file)
    if path.endswith(DEBUGGERS):
        return "debugger"
    if path.endswith(FOR_USERS):
        return "user"
    if path.startswith(OWN):
        return "own"
    parts = path.split(os.sep)
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            package = parts[parts.index(folder) + 1 :][:1] or [""]
            return "printer" if package[0].removesuffix(".py") in PRINTERS else "library"
    if path.startswith(STANDARD_LIBRARY + os.sep):
        return "standard library"
    return "user"
