"""The `espalier` command, also `python -m espalier`: runs the module of a command as the program.

launch.sh calls it once the environment is there, and a wheel installs it. The commands are in commands/table.txt. What
must be in the environment before JAX is loaded, or before the process begins, is set here.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import runpy
import signal
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "commands", "table.txt")

KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""On CPUs, XLA takes and returns its large buffers at every step, and glibc would hand each back to the system: kept in
one arena, there are 16 times fewer page faults and a third more tokens a second (mlm demo on 2 cores); in huge pages,
where the system offers them (glibc 2.35), it is 5 to 20 % more again. Tokenizing alone is faster without. glibc reads
these when a process begins."""

ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
"""Device files of GPUs and TPUs; where one is there, memory is left as it is."""

HELP = """
Each command has its own --help; after a PRESET, --help-all lists every flag. From Python: `import espalier`.
"""


class Command(NamedTuple):
    name: str
    module: str
    before: tuple[str, ...]
    """What stands before the user's arguments."""
    training: bool
    takes: str
    meaning: str


def commands() -> Iterator[Command]:
    """Every command, in the order of the table."""
    with open(TABLE, encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                name, takes, meaning, called, training = (part.strip() for part in line.split("|"))
                module, *before = called.split()
                yield Command(name, module, tuple(before), training == "training", takes, meaning)


def usage() -> str:
    lines = [(f"{each.name} {each.takes}", each.meaning) for each in commands()]
    width = max(len(call) for call, _ in lines)
    shown = (f"  espalier {call:{width}}  {meaning}" for call, meaning in lines)
    return "\n".join(["usage: espalier COMMAND [arguments]", "", *shown]) + "\n" + HELP


def main() -> None:
    """Run the command that the arguments name; does not return where the process must begin anew."""
    from espalier import signals

    # Those that came while the process began anew were kept back.
    signals.begin(early=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.NUMBERS)
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return
    if name == "--version":
        from espalier import __version__

        print(f"espalier {__version__}")
        return
    environment = os.environ | _private(compiled_programs()) | os.environ
    if name == "python":
        signals.end()
        # This environment's Python, as launch.sh calls it: the cache of compiled programs serves scripts too.
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    known = {each.name: each for each in commands()}
    if name not in known:
        import difflib

        nearest = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean {nearest[0]}?" if nearest else ""
        sys.exit(_refused(f"unknown command {name!r}{meant}; `espalier --help` lists {' '.join(known)}"))
    command = known[name]
    if command.training and keeps_memory(os.environ):
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], KEPT_MEMORY | environment)
    os.environ.update(environment)
    sys.argv = [command.module, *command.before, *arguments]
    # As `python -m` would: the module is `__main__`, also for processes that it starts.
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


def keeps_memory(environment: Mapping[str, str]) -> bool:
    """Whether the process must begin anew for KEPT_MEMORY: on Linux without accelerator, and not where all is set."""
    return (
        sys.platform == "linux"
        and not KEPT_MEMORY.keys() <= environment.keys()
        and not any(name.startswith("TPU_") for name in environment)
        and not any(glob.glob(pattern) for pattern in ACCELERATORS)
    )


def compiled_programs(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The folder where compiled programs are kept, so that a resumed or repeated run starts at once.

    One for every kind of processor, for they hold its instructions and a home may be shared among many kinds, and for
    every version of JAX.
    """
    wanted = r"(vendor_id|cpu family|model|flags|CPU|Features|isa|cpu\s*:)"
    try:
        with open(cpuinfo, encoding="utf-8") as file:
            # The first processor stands for all.
            lines = [line for line in file.read().split("\n\n")[0].splitlines() if re.match(wanted, line)]
    except OSError:
        lines = [platform.processor()]
    processor = zlib.crc32("\n".join([platform.machine(), *lines]).encode())
    versions = "-".join([*_versions(), ""])
    cache = os.environ.get("ESPALIER_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "espalier")
    return os.path.join(cache, "compiled", f"{versions}cpu-{processor:08x}")


def _private(folder: str) -> dict[str, str]:
    """The variable that makes JAX keep its programs there, in a folder that nobody else may write or read.

    They are machine code, which is run as it is found. In a cache that is someone else's, a folder of one's own is made
    beside theirs; where that is not to be had, programs are not kept.
    """
    compiled = os.path.dirname(folder)
    for own in (compiled, f"{compiled}-{os.getuid()}"):
        try:
            os.makedirs(own, 0o700, exist_ok=True)
            # Neither a link that someone else has made nor what it leads to.
            if not os.lstat(own).st_uid == os.stat(own).st_uid == os.getuid():
                continue
            if os.stat(own).st_mode & 0o077:
                os.chmod(own, 0o700)
        except OSError:
            continue
        return {"JAX_COMPILATION_CACHE_DIR": os.path.join(own, os.path.basename(folder))}
    return {}


def _versions() -> list[str]:
    """`jax-0.10.1` and `jaxlib-0.10.1` where they are installed."""
    found = []
    for name in ("jax", "jaxlib"):
        for folder in sys.path:
            if there := glob.glob(os.path.join(glob.escape(folder), f"{name}-[0-9]*.dist-info")):
                found.append(os.path.basename(there[0]).removesuffix(".dist-info"))
                break
    return found


def _refused(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
