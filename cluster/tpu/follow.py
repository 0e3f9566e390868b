"""One run on one slice, from the request to its end: what is to be done next follows from what gcloud and hosts say.

Nothing is remembered from one look to the next but how often something failed: whoever gives the same command again,
here or on another machine, goes on where this one was.

    the slice is not there            ask for it
    waiting, provisioning, …          wait
    FAILED, SUSPENDED, preempted      delete the request, which holds no machines any more, and ask again
    ACTIVE                            look at the hosts:
        no run on a host              copy this checkout, make the environment, start the run (where it does not run)
        running                       wait
        ended: 0 everywhere           done
        ended: 2 somewhere            give up, the third time: the arguments are wrong, and will be
        ended otherwise               start it again: it takes up its last checkpoint
        stopped                       done, for somebody asked for it
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cluster.tpu.gcloud import LABEL, Answer, Slice, call
from espalier.errors import MachineError, UserError

ROOT = Path(__file__).resolve().parent.parent.parent
HOST_SCRIPT = "espalier/cluster/tpu/host.sh"
UNPACK = "rm -rf espalier.new && mkdir espalier.new && tar -xzf espalier.tar.gz -C espalier.new && "

LOOK, REACH, INSTALL = 180, 600, 3600
"""Seconds for a question to gcloud, to the hosts, and for what installs there or deletes."""


@dataclass(frozen=True)
class Run:
    """What runs on the slice, and how patiently it is watched."""

    slice: Slice
    arguments: tuple[str, ...]
    """Those of ./launch.sh."""
    bucket: str = ""
    before: str = ""
    """Shell text that each host runs before the run, for instance a mount."""
    poll: float = 30.0
    """Seconds between two looks."""
    tries: int = 12
    """Failures in a row of one kind, after which it is given up."""

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.arguments).encode()).hexdigest()[:12]

    def archive(self, path: str) -> list[str]:
        return ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={path}", "HEAD"]

    def install(self) -> list[str]:
        words = ["bash", HOST_SCRIPT.replace("espalier/", "espalier.new/", 1), "install", self.bucket, self.before]
        return self.slice.on_hosts(words, before=UNPACK)

    def start(self) -> list[str]:
        return self.slice.on_hosts(["bash", HOST_SCRIPT, "start", self.digest, *self.arguments])

    def state(self) -> list[str]:
        return state_of(self.slice)


def state_of(slice: Slice) -> list[str]:
    """Where no checkout is there yet, the host says so itself."""
    return slice.on_hosts(
        ["bash", HOST_SCRIPT, "state"],
        before=f'[ -e {HOST_SCRIPT} ] || {{ echo "espalier $(hostname) absent none - |"; exit; }}; ',
    )


class Host(NamedTuple):
    """What a host says of the run."""

    name: str
    state: str
    digest: str
    code: int | None
    last: str
    """The last line of its log."""


def hosts_in(text: str) -> list[Host]:
    found = re.findall(r"^espalier (\S+) (absent|running|ended|stopped) (\S+) (\S+) \| ?(.*)$", text, re.MULTILINE)
    return [
        Host(name, state, digest, int(code) if code.isdecimal() else None, last)
        for name, state, digest, code, last in found
    ]


def look(slice: Slice) -> tuple[str, Answer]:
    """The state of the slice: MISSING, or what gcloud calls it; UNKNOWN where it gave none. Beside it, the answer.

    UserError where the slice was not made here, or is of another type than asked for.
    """
    answer = call(slice.describe(), LOOK)
    if answer.missing:
        return "MISSING", answer
    try:
        described = json.loads(answer.out)
        state = described["state"]["state"]
    except (ValueError, KeyError, TypeError):
        return "UNKNOWN", answer
    node = (described.get("tpu", {}).get("nodeSpec") or [{}])[0].get("node", {})
    if node.get("labels", {}).get(LABEL) != slice.name:
        raise UserError(
            f"{slice.name} in {slice.zone} was not made by this command (it has no label {LABEL}={slice.name}); it is "
            "left as it is, choose another name"
        )
    if slice.accelerator and node.get("acceleratorType", slice.accelerator) != slice.accelerator:
        raise UserError(
            f"{slice.name} is a {node['acceleratorType']}, not a {slice.accelerator}; choose another name, or delete it"
        )
    return state, answer


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


@dataclass
class Patience:
    """Waits longer after each failure in a row, and gives up after so many."""

    run: Run
    counts: dict[str, int] = field(default_factory=dict)

    def again(self, what: str, reason: str) -> None:
        count = self.counts[what] = self.counts.get(what, 0) + 1
        if count >= self.run.tries:
            raise MachineError(
                f"{what}, {count} times: {reason}. What the slice does goes on, and costs; the same command looks again"
            )
        seconds = self.run.poll * min(2**count, 20)
        say(f"{what} ({reason}); try {count + 1} of {self.run.tries} in {seconds:.0f} s")
        time.sleep(seconds)

    def over(self, *what: str) -> None:
        for name in what:
            self.counts.pop(name, None)


NO_ANSWER, NOT_MADE, NOT_DELETED = "gcloud gives no answer", "the slice was not given", "it was not deleted"
UNREACHED, NOT_STARTED, ENDED = "a host does not answer", "the run was not started", "the run ended early"

SAVED = {0, 129, 130, 143}
"""Codes of runs that ended as they should, after a signal too."""

REFUSED = 3
"""So often 2 is given another try, for a host that comes too late to the others ends with it too."""


def follow(run: Run) -> int:
    """Until the run has ended. Returns its exit code: 0, or 128 + n where it was stopped.

    UserError where the run refused its arguments; MachineError where something failed too often.
    """
    patience, shown, began = Patience(run), "", False
    while True:
        state, answer = look(run.slice)
        if state != shown:
            say(f"{run.slice.name}: {state}")
            shown = state
        if state == "UNKNOWN":
            patience.again(NO_ANSWER, answer.reason)
            continue
        patience.over(NO_ANSWER)
        if state == "MISSING":
            answer = call(run.slice.create(), LOOK)
            if answer.code and "ALREADY_EXISTS" not in answer.error:
                patience.again(NOT_MADE, answer.reason)
            else:
                time.sleep(run.poll)
        elif state in ("FAILED", "SUSPENDED"):
            _delete(run.slice, patience)
            if state == "FAILED":
                patience.again(NOT_MADE, _why(answer))
        elif state == "ACTIVE":
            patience.over(NOT_MADE)
            code, began = _attend(run, patience, began)
            if code is not None:
                return code
        else:
            time.sleep(run.poll)


def _attend(run: Run, patience: Patience, began: bool) -> tuple[int | None, bool]:
    """One look at the hosts of an active slice, and what follows. Returns the exit code once all is over, and whether
    the run was seen or started here."""
    answer = call(run.state(), REACH)
    hosts = hosts_in(answer.out)
    if answer.code or not hosts:
        if _preempted(run.slice):
            say("the machines were taken away; asking for others")
            _delete(run.slice, patience)
        else:
            patience.again(UNREACHED, answer.reason)
        return None, began
    patience.over(UNREACHED)
    states = {host.state for host in hosts}
    others = [host for host in hosts if host.digest != run.digest]
    if "running" in states and any(host.state == "running" for host in others):
        raise UserError(
            f"{run.slice.name} is busy with another run; `python -m cluster.tpu stop {run.slice.name} …` ends it, saved"
        )
    if "running" in states and "absent" not in states:
        # Those that have ended are followed by the others, within seconds.
        patience.over(NOT_STARTED)
        say(next((host.last for host in hosts if host.state == "running" and host.last), "running"))
        time.sleep(run.poll)
        return None, True
    over = not others and states <= {"ended", "stopped"}
    codes = sorted({host.code for host in hosts if host.code is not None})
    if over and codes == [0]:
        say("the run has ended")
        return 0, began
    if over and began:
        last = "; ".join(dict.fromkeys(host.last for host in hosts if host.code and host.last))
        if "stopped" in states:
            say("the run was stopped; the same command takes it up again")
            return max(codes, default=143), began
        if 2 in codes and patience.counts.get(ENDED, 0) + 1 >= REFUSED:
            raise UserError(f"the run refused what it was given: {last or 'see the log'} (the slice stays, and costs)")
        if set(codes) - SAVED:
            patience.again(ENDED, f"exit {', '.join(map(str, codes))}: {last}")
    say("copying this checkout to the hosts, making the environment, starting the run")
    with tempfile.TemporaryDirectory() as folder:
        archive = f"{folder}/espalier.tar.gz"
        subprocess.run(run.archive(archive), check=True)
        for words, seconds in ((run.slice.copy(archive), INSTALL), (run.install(), INSTALL), (run.start(), REACH)):
            answer = call(words, seconds)
            if answer.code:
                patience.again(NOT_STARTED, answer.reason)
                return None, began
    return None, True


def _preempted(slice: Slice) -> bool:
    answer = call(slice.node(), LOOK)
    return answer.missing or any(f'"{state}"' in answer.out for state in ("PREEMPTED", "TERMINATED"))


def _why(answer: Answer) -> str:
    error = json.loads(answer.out)["state"].get("failedData", {}).get("error", {})
    return " ".join(str(error.get("message") or "FAILED").split())[:300]


def _delete(slice: Slice, patience: Patience) -> None:
    """`look` has just seen that it is ours."""
    answer = call(slice.delete(), INSTALL)
    if answer.code and not answer.missing:
        patience.again(NOT_DELETED, answer.reason)
    else:
        patience.over(NOT_DELETED)


def delete(slice: Slice) -> None:
    """On request: the slice with its machines, whatever runs there."""
    state, answer = look(slice)
    if state == "MISSING":
        say(f"{slice.name} is not there")
        return
    if state == "UNKNOWN":
        raise MachineError(f"{NO_ANSWER}: {answer.reason}; {slice.name} was not deleted")
    answer = call(slice.delete(), INSTALL)
    if answer.code and not answer.missing:
        raise MachineError(f"{slice.name} was not deleted, and costs: {answer.reason}")
    say(f"{slice.name} is deleted")


def commands(run: Run, delete_after: bool) -> list[tuple[str, list[list[str]]]]:
    """Every command that `follow` may run, under what it is run for."""
    slice = run.slice
    archive = "espalier.tar.gz"
    shown = [
        ("is it there, and in which state", [slice.describe()]),
        ("where it is not there", [slice.create()]),
        (f"ACTIVE: every {run.poll:g} s, what the hosts say of the run", [run.state()]),
        (
            "where a host has no run, or it ended early (then it takes up its last checkpoint)",
            [run.archive(archive), slice.copy(archive), run.install(), run.start()],
        ),
        ("where a host does not answer: were its machines taken away", [slice.node()]),
        ("after preemption or failure; then from the beginning", [slice.delete()]),
    ]
    return shown + [("after the end, as was asked for", [slice.describe(), slice.delete()])] * delete_after
