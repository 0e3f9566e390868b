"""The commands of gcloud for one slice, as lists of words, and how one is run: bounded in time, its errors sorted."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from espalier.errors import MachineError, UserError

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""The images for JAX on each generation of chips (cloud.google.com/tpu/docs/runtimes)."""

LABEL = "espalier"
"""Every slice that is made here bears it, with its own name as the value; no other one is touched."""

FINAL = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|Reauthentication|active account|unrecognized arguments"
)
"""What no second try mends."""


@dataclass(frozen=True)
class Slice:
    """A slice of Cloud TPU: what it is called, where it is, and what is asked for."""

    name: str
    project: str
    zone: str
    accelerator: str = ""
    """`v5litepod-16`; empty where it is only looked at."""
    tier: Literal["spot", "reserved", "on-demand"] = "on-demand"
    runtime_version: str = ""
    """Empty: the one of RUNTIMES."""
    create_with: tuple[str, ...] = ()
    """Further flags of `queued-resources create`."""
    internal_ip: bool = False

    def __post_init__(self):
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?", self.name):
            raise UserError(f"the name {self.name!r} is not one of Google Cloud: small letters, digits, -, at most 62")
        if self.accelerator:
            generation, _, size = self.accelerator.partition("-")
            generation = {"v5e": "v5litepod"}.get(generation, generation)
            if generation in ("tpu7x", "tpu7", "v7x"):
                raise UserError(f"{self.accelerator}: TPU7x is to be had through GKE only; see cluster/gke/README.md")
            if generation not in RUNTIMES or not size.isdecimal():
                known = ", ".join(f"{name}-N" for name in RUNTIMES)
                raise UserError(
                    f"the accelerator type {self.accelerator!r} is not known; take one of {known} (v5e-N too)"
                )
            object.__setattr__(self, "accelerator", f"{generation}-{size}")
            object.__setattr__(self, "runtime_version", self.runtime_version or RUNTIMES[generation])

    def describe(self) -> list[str]:
        return [*_QUEUED, "describe", self.name, *self._where(), "--format=json"]

    def create(self) -> list[str]:
        flags = [f"--node-id={self.name}", *self._where(), f"--accelerator-type={self.accelerator}"]
        flags += [f"--runtime-version={self.runtime_version}", f"--labels={LABEL}={self.name}"]
        flags += [f"--{self.tier}"] * (self.tier != "on-demand")
        return [*_QUEUED, "create", self.name, *flags, *self.create_with, "--async", "--quiet"]

    def delete(self) -> list[str]:
        return [*_QUEUED, "delete", self.name, *self._where(), "--force", "--quiet"]

    def node(self) -> list[str]:
        return [*_VM, "describe", self.name, *self._where(), "--format=json"]

    def copy(self, archive: str) -> list[str]:
        return [*_VM, "scp", archive, f"{self.name}:espalier.tar.gz", *self._reach("all")]

    def on_hosts(self, words: Sequence[str], worker: str = "all", before: str = "") -> list[str]:
        """words, run on the hosts; before: shell text that goes ahead of them."""
        return [*_VM, "ssh", self.name, *self._reach(worker), f"--command={before}{shlex.join(words)}"]

    def _where(self) -> list[str]:
        return [f"--project={self.project}", f"--zone={self.zone}"]

    def _reach(self, worker: str) -> list[str]:
        return [*self._where(), f"--worker={worker}", *["--internal-ip"] * self.internal_ip, "--quiet"]


_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
_VM = ("gcloud", "compute", "tpus", "tpu-vm")


class Answer(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    error: str

    @property
    def missing(self) -> bool:
        return self.code != 0 and "NOT_FOUND" in self.error

    @property
    def reason(self) -> str:
        """The last line that it said, for people."""
        lines = [line.strip() for line in (self.error or self.out).splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit {self.code}"


def call(words: Sequence[str], seconds: float) -> Answer:
    """Run a command for at most so long. UserError, MachineError where gcloud says what no second try mends."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A group of its own: gcloud is a shell script whose Python and ssh must end with it.
            start_new_session=True,
        )
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not on the PATH; install it (cloud.google.com/sdk) and log in") from None
    with process:
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return Answer(124, "", f"no answer within {seconds:g} s")
        except BaseException:
            _end(process)
            raise
    answer = Answer(process.returncode, out, error)
    if answer.code and FINAL.search(error):
        raise MachineError(f"gcloud refused: {answer.reason} (`{shlex.join(words)}`)")
    return answer


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
