#!/usr/bin/env -S python3 -S
"""A gcloud that plays a slice of two hosts, from the files of $WORLD; tests put it on the PATH as `gcloud`.

calls            each call, as a line of JSON
plan-1, plan-2   the states that the first, second … request goes through, one a line, one a look; the last stays
slice.json       the request that is there: labels, type, states to come
failures         words of calls that fail once each, with what they say: `ssh|Connection refused`
host-0, host-1   home folders of the hosts; a command over ssh runs there
checkout.tar.gz  what arrives in place of any archive
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

WORLD = pathlib.Path(os.environ["WORLD"])
SLICE = WORLD / "slice.json"
words = sys.argv[1:]
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
verb, name = words[3:5]


def hosts() -> list[pathlib.Path]:
    return [WORLD / "host-0", WORLD / "host-1"]


def fail(text: str, code: int = 1) -> None:
    print(f"ERROR: (gcloud.compute.tpus.{verb}) {text}", file=sys.stderr)
    sys.exit(code)


def keep(slice: dict) -> None:
    """Written as a whole, for others read it meanwhile."""
    new = SLICE.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(slice))
    new.replace(SLICE)


def taken_away() -> None:
    """The machines: whatever runs there is killed, whatever lies there is lost."""
    for host in hosts():
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((host / "espalier-run" / "process").read_text()), signal.SIGKILL)
        shutil.rmtree(host, ignore_errors=True)


with (WORLD / "calls").open("a") as file:
    file.write(json.dumps(["gcloud", *words]) + "\n")
failures = (WORLD / "failures").read_text().splitlines() if (WORLD / "failures").exists() else []
for at, line in enumerate(failures):
    what, _, said = line.partition("|")
    if what in words:
        (WORLD / "failures").write_text("".join(f"{other}\n" for other in failures[:at] + failures[at + 1 :]))
        fail(said)
if verb == "create":
    if SLICE.exists():
        fail("ALREADY_EXISTS: it is there already")
    with (WORLD / "requests").open("a+") as file:
        file.write("one more\n")
        file.seek(0)
        number = len(file.readlines())
    states = (WORLD / f"plan-{number}").read_text().split()
    labels = dict(pair.split("=") for pair in flags["labels"].split(","))
    keep({"labels": labels, "type": flags["accelerator-type"], "states": states})
    for host in hosts():
        host.mkdir()
    sys.exit()
if not SLICE.exists():
    fail(f"NOT_FOUND: Resource {name!r} was not found")
found = json.loads(SLICE.read_text())
if verb == "delete":
    taken_away()
    SLICE.unlink()
elif verb == "describe" and words[2] == "tpu-vm":
    print(json.dumps({"state": found.get("node", "READY")}))
elif verb == "describe":
    state = found["states"].pop(0) if len(found["states"]) > 1 else found["states"][0]
    keep(found)
    if state in ("SUSPENDED", "FAILED"):
        taken_away()
    data = {"failedData": {"error": {"message": "There is no more capacity in the zone"}}} if state == "FAILED" else {}
    node = {"labels": found["labels"], "acceleratorType": found["type"]}
    print(json.dumps({"name": name, "state": {"state": state} | data, "tpu": {"nodeSpec": [{"node": node}]}}))
elif verb == "scp":
    for host in hosts():
        shutil.copy(WORLD / "checkout.tar.gz", host / "espalier.tar.gz")
elif verb == "ssh":
    reached = hosts() if flags["worker"] == "all" else hosts()[: 1 + int(flags["worker"])]
    started = [
        subprocess.Popen(["bash", "-c", flags["command"]], cwd=host, env=os.environ | {"HOME": str(host)})
        for host in reached
    ]
    sys.exit(max(process.wait() for process in started))
