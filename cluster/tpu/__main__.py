"""A run on a slice of Cloud TPU: `python -m cluster.tpu run NAME --project P --zone Z --accelerator v5e-16 -- mlm …`.

    run     ask for the slice, wait, run, take up again after preemption; the same command goes on, from any machine
    state   what the slice and its hosts are doing
    log     follow the log of process 0
    stop    have the run save and end; the slice stays
    delete  the slice, with whatever runs there

README.md beside this file is the way through it. Needs Python 3.11 and gcloud, nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from cluster.tpu import follow
from cluster.tpu.gcloud import Slice, call
from espalier.__main__ import commands
from espalier.errors import MachineError, UserError
from espalier.exits import one_line_errors

BUCKET = "/mnt/bucket"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: that of the run, 2 where something given is wrong, 1 where something failed too often, 130 Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    given = _parser().parse_args(words[:cut])
    with one_line_errors(False):
        if given.what != "run":
            return _other(given, _slice(given))
        run = _run(given, tuple(words[cut + 1 :]))
        if given.dry_run:
            for purpose, each in follow.commands(run, given.delete_after):
                print(f"# {purpose}", *map(shlex.join, each), sep="\n")
            return 0
        check(run.arguments)
        try:
            code = follow.follow(run)
        except KeyboardInterrupt:
            print(
                f"\nno longer watched; what {given.name} does goes on, and costs. The same command watches it again; "
                f"`python -m cluster.tpu delete {given.name} --project {given.project} --zone {given.zone}` ends it",
                file=sys.stderr,
            )
            raise
        if given.delete_after and code == 0:
            follow.delete(run.slice)
        return code


def _parser() -> argparse.ArgumentParser:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("name", help="of the slice and of its request")
    where.add_argument("--project", required=True)
    where.add_argument("--zone", required=True)
    where.add_argument(
        "--internal-ip", action="store_true", help="reach the hosts by their addresses inside the network"
    )
    where.add_argument("--dry-run", action="store_true", help="print every command that would be run, run none")
    parser = argparse.ArgumentParser(
        prog="python -m cluster.tpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="what", required=True)
    run = kinds.add_parser("run", parents=[where], usage="%(prog)s NAME [flags] -- ARGUMENTS OF ./launch.sh")
    run.add_argument(
        "--accelerator", required=True, help="v4-N, v5e-N, v5p-N, v6e-N; what N counts is the zone's to say"
    )
    tier = run.add_mutually_exclusive_group()
    for name, meaning in (("spot", "cheaper; may be taken away at any time"), ("reserved", "from your reservation")):
        tier.add_argument(f"--{name}", dest="tier", action="store_const", const=name, default="on-demand", help=meaning)
    run.add_argument("--runtime-version", default="", help="the image of the hosts; unset, the one of the generation")
    run.add_argument("--create-with", action="append", default=[], metavar="=--FLAG", help="further flags of `create`")
    run.add_argument("--bucket", default="", help=f"a bucket of Cloud Storage that each host mounts at {BUCKET}")
    run.add_argument("--before", default="", help="shell text that each host runs first, for instance a mount")
    run.add_argument("--poll", type=float, default=30.0, help="seconds between two looks")
    run.add_argument("--tries", type=int, default=12, help="failures in a row, after which it is given up")
    run.add_argument("--delete-after", action="store_true", help="delete the slice once the run has ended with 0")
    for name, meaning in (
        ("state", "what the slice and its hosts are doing"),
        ("log", "follow the log of process 0"),
        ("stop", "have the run save and end; the slice stays"),
        ("delete", "the slice, with whatever runs there"),
    ):
        kinds.add_parser(name, parents=[where], help=meaning)
    return parser


def _slice(given: argparse.Namespace) -> Slice:
    return Slice(given.name, given.project, given.zone, internal_ip=given.internal_ip)


def _run(given: argparse.Namespace, arguments: tuple[str, ...]) -> follow.Run:
    slice = Slice(
        given.name,
        given.project,
        given.zone,
        given.accelerator,
        given.tier,
        given.runtime_version,
        tuple(given.create_with),
        given.internal_ip,
    )
    training = [command.name for command in commands() if command.training]
    if not arguments or arguments[0] not in training:
        said = f"{arguments[0]!r} after --" if arguments else "nothing after --"
        raise UserError(
            f"{said}; there stand the arguments of ./launch.sh, beginning with one of {', '.join(training)}"
        )
    if given.poll <= 0 or given.tries < 1:
        raise UserError(f"--poll {given.poll:g} --tries {given.tries}: both must be above 0")
    folder = _run_directory(arguments)
    if not folder.startswith(f"{BUCKET}/" if given.bucket else "/"):
        kept = (
            f"below {BUCKET}, where --bucket is"
            if given.bucket
            else f"on a shared disk, or below {BUCKET} with --bucket"
        )
        raise UserError(
            f"--run-dir {folder or 'is not given'}; it must be {kept}, for the disks of the hosts go with the slice"
        )
    return follow.Run(slice, arguments, given.bucket, given.before, given.poll, given.tries)


def _run_directory(arguments: Sequence[str]) -> str:
    found = ""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--run-dir", "--run_dir"):
            found = value if equals else after
    return found


def check(arguments: Sequence[str]) -> None:
    """UserError where the command line is wrong: better now than once the slice is there. Needs the environment."""
    if not importlib.util.find_spec("tyro"):
        print(
            "the arguments are not checked, for Espalier's environment is not here (`./launch.sh setup`)",
            file=sys.stderr,
        )
        return
    words = [sys.executable, "-P", "-m", "espalier", *arguments, "--print-config"]
    environment = os.environ | {"PYTHONPATH": str(follow.ROOT), "JAX_PLATFORMS": "cpu"}
    asked = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    if asked.returncode:
        raise UserError(asked.stderr.strip().removeprefix("error: ") or f"{shlex.join(arguments)} is not understood")


def _other(given: argparse.Namespace, slice: Slice) -> int:
    script = ["bash", follow.HOST_SCRIPT]
    asked = {
        "state": follow.state_of(slice),
        "log": slice.on_hosts(["tail", "-n", "100", "-F", "espalier-run/log"], worker="0"),
        "stop": slice.on_hosts([*script, "stop"]),
        "delete": slice.delete(),
    }[given.what]
    if given.dry_run:
        print(shlex.join(slice.describe()), shlex.join(asked), sep="\n")
        return 0
    if given.what == "delete":
        follow.delete(slice)
        return 0
    state, answer = follow.look(slice)
    if state != "ACTIVE":
        print(f"{slice.name}: {state if state != 'UNKNOWN' else answer.reason}")
        return 0 if given.what == "state" else 1
    if given.what == "log":
        return subprocess.run(asked).returncode
    answer = call(asked, follow.REACH)
    if answer.code:
        raise MachineError(f"a host does not answer: {answer.reason}")
    said = "the run was asked to save and end" if given.what == "stop" else state
    print(f"{slice.name}: {said}", *answer.out.splitlines(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
