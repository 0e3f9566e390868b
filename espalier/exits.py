"""Errors of the user and the machine → one line on standard error and an exit code; bugs keep their traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator

from espalier import signals
from espalier.errors import MachineError, UserError
from espalier.progress import visible
from espalier.redaction import without_secrets

DISK = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EREMOTEIO),
        *(errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
    }
)
"""What a disk says that is full, read-only, broken or gone."""
DISK_ADVICE = {
    errno.ENOSPC: "no space left; make some",
    errno.EDQUOT: "the quota is used up; make room, or ask for more",
    errno.EFBIG: "a file would be larger than is allowed (ulimit -f); raise the limit",
    errno.EROFS: "the disk is read-only now; look for what its system log says, and mount it again",
}
"""What some of them mean and what to do, in words."""
INTACT = "what was saved before is intact, and the same command goes on from it"
REFUSALS = DISK | {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR}
"""Errors that a correct program may get from the machine: no permission, no space left, a file instead of a folder."""

OUT_OF_MEMORY = (
    "the device has too little memory ({}); try --accumulation 2 or more, --execution.remat full, a shorter "
    "--data.sequence-length, or --mesh.fsdp -1 on several devices; what was saved stays"
)


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        # A terminal without UTF-8 gets \u4e2d for a character that it cannot show, not a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except BaseException as error:
        if number := signals.interrupted_by(error):
            if debug:
                print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
            # A lost terminal takes no message.
            with contextlib.suppress(OSError):
                print(signals.words(number), file=sys.stderr)
            raise SystemExit(128 + number) from None
        refused = isinstance(error, OSError) and error.errno in REFUSALS
        full = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(128 + signal.SIGPIPE) from None
        if not (refused or full or isinstance(error, UserError | MachineError)):
            raise
        if debug:
            print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        message = OUT_OF_MEMORY.format(str(error).splitlines()[0]) if full else " ".join(str(error).splitlines())
        # Which of several processes failed (sharding/processes).
        who = "".join(f"{note}: " for note in getattr(error, "__notes__", ()) if note.startswith("process "))
        print(visible(without_secrets(f"error: {who}{message}")), file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None


def _nobody_reads() -> bool:
    """Whether the reader of stdout has gone (`| head`); if so, nothing more is written there, not even at exit."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
