"""A run on a slice of Cloud TPU (cluster/tpu): what the command does in each state that a slice can come into.

Google Cloud is played by tests/played_gcloud.py, which keeps a slice of two hosts in a folder. What the hosts are told
really runs, in bash; only launch.sh is a stand-in there, which notes its arguments and ends as it is told.
"""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from cluster.tpu import follow
from cluster.tpu import gcloud as gcloud_commands
from cluster.tpu.__main__ import check, main
from cluster.tpu.gcloud import RUNTIMES, Slice, call
from espalier.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
WHERE = ("--project", "mine", "--zone", "us-east5-b")
ASKED = ("run", "a", *WHERE, "--accelerator", "v5e-16", "--spot", "--poll", "0.02", "--tries", "4")
ARGUMENTS = ("mlm", "bert-base", "--data.files", "/data/te xt/*.gz", "--run-dir", '/disk/runs/$HOME it\'s "一"')
STAND_IN = r"""#!/usr/bin/env bash
[[ $1 != setup ]] || { echo "$PYTHON" >>"$HOME/setups"; exit; }
number=$(($(find "$WORLD/started" -name "${HOME##*/}-*" | wc -l) + 1))
printf '%s\0' "$@" >"$WORLD/started/${HOME##*/}-$number"
read -r seconds code said <"$WORLD/run-$number" || { seconds=0 code=0; }
trap 'echo saved; exit 143' TERM
echo "step 1"
sleep "$seconds" &
wait
echo "$said"
exit "$code"
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The folder of the played cloud, with its gcloud on the PATH; all that still runs there ends with the test."""
    there = tmp_path / "world"
    for folder in ("bin", "started", "checkout/cluster/tpu"):
        (there / folder).mkdir(parents=True)
    (there / "bin" / "gcloud").symlink_to(ROOT / "tests" / "played_gcloud.py")
    (ROOT / "tests" / "played_gcloud.py").chmod(0o755)
    (there / "checkout" / "launch.sh").write_text(STAND_IN)
    (there / "checkout" / "launch.sh").chmod(0o755)
    host = (ROOT / "cluster" / "tpu" / "host.sh").read_text()
    (there / "checkout" / "cluster" / "tpu" / "host.sh").write_text(host)
    with tarfile.open(there / "checkout.tar.gz", "w:gz") as archive:
        archive.add(there / "checkout", arcname=".")
    (there / "calls").touch()
    plan(there, 1, "ACTIVE")
    monkeypatch.setenv("WORLD", str(there))
    monkeypatch.setenv("PATH", f"{there / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("cluster.tpu.__main__.check", lambda arguments: None)
    yield there
    for process in there.glob("host-*/espalier-run/process"):
        subprocess.run(["kill", "-9", process.read_text().strip()], stderr=subprocess.DEVNULL)


def plan(world, number, *states):
    (world / f"plan-{number}").write_text("\n".join(states))


def run_as(world, number, seconds, code, said=""):
    (world / f"run-{number}").write_text(f"{seconds} {code} {said}\n")


def started(world):
    """Arguments of ./launch.sh, by host and the number of its start."""
    found = sorted((world / "started").iterdir())
    return {path.name: tuple(path.read_bytes().decode().split("\0")[:-1]) for path in found}


def calls(world, *verbs):
    lines = [json.loads(line) for line in (world / "calls").read_text().splitlines()]
    return [line for line in lines if not verbs or line[4] in verbs]


def go(*more, arguments=ARGUMENTS):
    try:
        return main([*ASKED, *more, "--", *arguments])
    except SystemExit as end:
        return end.code


def apart(*more):
    """The command as a process, in a folder of its own."""
    words = [sys.executable, "-P", "-m", "cluster.tpu", *ASKED, *more, "--", *ARGUMENTS]
    # Without Espalier's libraries in sight, as on a machine that has only Python.
    words[1:1] = ["-S"]
    return subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_from_the_request_to_the_end_with_exactly_the_commands_of_dry_run(world, capsys):
    plan(world, 1, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    run_as(world, 1, 0.2, 0)
    assert go("--dry-run", "--delete-after") == 0
    shown = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert not calls(world), "--dry-run runs nothing"
    assert go("--delete-after") == 0
    assert started(world) == {"host-0-1": ARGUMENTS, "host-1-1": ARGUMENTS}
    archive = [word for words in calls(world, "scp") for word in words if word.endswith("tar.gz") and "/" in word][0]
    ran = [[word.replace(archive, "espalier.tar.gz") for word in words] for words in calls(world)]
    assert all(words in shown for words in ran)
    never = [words for words in shown if words not in ran and words[0] == "gcloud"]
    assert [words[3:5] for words in never] == [["tpu-vm", "describe"]], "all but the question after lost machines"
    create = calls(world, "create")[0]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    assert {"--project=mine", "--zone=us-east5-b", "--labels=espalier=a", "--async"} <= set(create)
    assert not (world / "slice.json").exists()


def test_a_preempted_run_goes_on_with_the_same_command(world, capsys):
    plan(world, 1, "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED")
    plan(world, 2, "WAITING_FOR_RESOURCES", "ACTIVE")
    run_as(world, 1, 60, 0)
    run_as(world, 2, 0.1, 0)
    assert go() == 0
    assert started(world) == {f"host-{host}-{number}": ARGUMENTS for host in (0, 1) for number in (1, 2)}
    assert len(calls(world, "create")) == 2 and len(calls(world, "delete")) == 1, "the second slice stays"
    assert len({tuple(words) for words in calls(world, "create")}) == 1
    assert (world / "slice.json").exists()


def test_machines_that_go_while_the_request_is_active_are_asked_for_again(world):
    plan(world, 2, "ACTIVE")
    labels = {"labels": {"espalier": "a"}, "type": "v5litepod-16", "states": ["ACTIVE"], "node": "PREEMPTED"}
    (world / "slice.json").write_text(json.dumps(labels))
    (world / "failures").write_text("ssh|TPU is in state PREEMPTED\n")
    (world / "requests").write_text("the first\n")
    assert go() == 0
    assert [words[4] for words in calls(world, "create", "delete")] == ["delete", "create"]


def test_what_fails_is_tried_again_later_and_not_for_ever(world, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(follow.time, "sleep", waits.append)
    (world / "failures").write_text(
        "describe|Connection reset\ncreate|RESOURCE_EXHAUSTED: quota\ncreate|INTERNAL\ncreate|ALREADY_EXISTS\n"
        "scp|Connection refused\nssh|exit status 255\nssh|exit status 255\n"
    )
    assert go() == 0
    said = capsys.readouterr().out
    for what in ("Connection reset", "RESOURCE_EXHAUSTED", "INTERNAL", "Connection refused", "exit status 255"):
        assert what in said
    assert 0.04 in waits and 0.08 in waits, "longer the second time"
    for number in range(2, 6):
        plan(world, number, "PROVISIONING", "FAILED")
    (world / "slice.json").unlink()
    assert go() == 1
    captured = capsys.readouterr()
    assert "not given, 4 times: There is no more capacity in the zone" in captured.err


def test_a_refusal_of_gcloud_ends_at_once(world, capsys):
    (world / "failures").write_text("create|PERMISSION_DENIED: tpu.nodes.create\n")
    assert go() == 1
    assert "PERMISSION_DENIED" in capsys.readouterr().err and len(calls(world, "create")) == 1


def test_a_run_that_ends_early_is_started_again_and_one_that_refuses_its_arguments_is_not(world, capsys, monkeypatch):
    run_as(world, 1, 0, 1, "error: process 1 is gone")
    run_as(world, 2, 0, 143, "saved")
    run_as(world, 3, 0, 0)
    assert go() == 0
    assert set(started(world)) == {f"host-{host}-{number}" for host in (0, 1) for number in (1, 2, 3)}
    assert "process 1 is gone" in capsys.readouterr().out
    assert go() == 0 and len(started(world)) == 6, "what has ended is not run again"
    monkeypatch.setattr(follow, "REFUSED", 2)
    for number in (4, 5):
        run_as(world, number, 0, 2, "error: no such file")
    assert go(arguments=(*ARGUMENTS, "--seed", "1")) == 2, "another command is another run"
    assert "error: no such file" in capsys.readouterr().err and len(started(world)) == 10


def test_the_machine_that_started_it_may_go(world):
    run_as(world, 1, 2, 0)
    first = apart()
    wait_for(world / "started" / "host-1-1")
    first.kill()
    first.communicate()
    second = apart()
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert set(started(world)) == {"host-0-1", "host-1-1"}, "it was taken up, not started again"
    assert len(calls(world, "create")) == 1


def test_ctrl_c_leaves_the_run_alone_and_says_so(world):
    run_as(world, 1, 60, 0)
    watching = apart()
    wait_for(world / "started" / "host-1-1")
    watching.send_signal(signal.SIGINT)
    said, _ = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert "python -m cluster.tpu delete a --project mine --zone us-east5-b" in said and "Traceback" not in said
    assert not calls(world, "delete")
    assert (
        "running"
        in subprocess.run(
            ["bash", "espalier/cluster/tpu/host.sh", "state"],
            cwd=world / "host-0",
            env=os.environ | {"HOME": str(world / "host-0")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_stop_saves_and_is_not_taken_for_an_accident(world, capsys):
    run_as(world, 1, 60, 0)
    watching = apart()
    wait_for(world / "started" / "host-1-1")
    assert main(["state", "a", *WHERE]) == 0
    assert capsys.readouterr().out.count(" running ") == 2
    assert main(["stop", "a", *WHERE]) == 0
    said, _ = watching.communicate(timeout=60)
    assert watching.returncode == 143 and "was stopped" in said
    assert set(started(world)) == {"host-0-1", "host-1-1"}
    assert go() == 0, "asked again, it goes on"
    assert set(started(world)) == {"host-0-1", "host-1-1", "host-0-2", "host-1-2"}


def test_a_start_that_reached_one_host_only_is_completed(world):
    run_as(world, 1, 60, 0)
    asked = follow.Run(Slice("a", "mine", "us-east5-b", "v5e-16"), ARGUMENTS, poll=0.02)
    started_on_one = [word.replace("--worker=all", "--worker=0") for word in asked.start()]
    for words in (asked.slice.create(), asked.slice.copy("any"), asked.install(), started_on_one):
        assert call(words, 60).code == 0
    watching = apart()
    wait_for(world / "started" / "host-1-1")
    watching.kill()
    watching.communicate()
    assert set(started(world)) == {"host-0-1", "host-1-1"}


def test_what_others_made_is_never_touched(world, capsys):
    theirs = json.dumps({"labels": {"team": "x"}, "type": "v5litepod-16", "states": ["ACTIVE"]})
    (world / "slice.json").write_text(theirs)
    for words in (["delete", "a", *WHERE], [*ASKED, "--", *ARGUMENTS], ["stop", "a", *WHERE]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2 and "not made by this command" in capsys.readouterr().err
    (world / "slice.json").write_text(theirs.replace('"team": "x"', '"espalier": "a"').replace("pod-16", "pod-8"))
    assert go() == 2 and "is a v5litepod-8" in capsys.readouterr().err
    assert {words[4] for words in calls(world)} == {"describe"}
    assert main(["delete", "a", *WHERE]) == 0 and main(["delete", "a", *WHERE]) == 0, "the second finds none"
    assert len(calls(world, "delete")) == 1


def test_another_run_on_the_slice_is_not_disturbed(world, capsys):
    run_as(world, 1, 60, 0)
    watching = apart()
    wait_for(world / "started" / "host-1-1")
    assert go(arguments=(*ARGUMENTS, "--seed", "1")) == 2
    assert "busy with another run" in capsys.readouterr().err
    watching.kill()
    watching.communicate()
    assert len(started(world)) == 2


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "A b", *ASKED[2:], "--", *ARGUMENTS], "the name 'A b'"),
        (["run", "a", *WHERE, "--accelerator", "tpu7x-8", "--", *ARGUMENTS], "GKE only"),
        (["run", "a", *WHERE, "--accelerator", "h100-8", "--", *ARGUMENTS], "take one of v4-N"),
        ([*ASKED], "nothing after --"),
        ([*ASKED, "--", "pretrain"], "beginning with one of demo, mlm, clm"),
        ([*ASKED, "--", "mlm", "demo"], "--run-dir is not given"),
        ([*ASKED, "--", "mlm", "demo", "--run-dir", "runs/a"], "--run-dir runs/a; it must be on a shared disk"),
        ([*ASKED, "--", "mlm", "demo", "--run-dir=gs://b/a"], "must be on a shared disk"),
        ([*ASKED, "--bucket", "b", "--", "mlm", "demo", "--run-dir", "/home/a"], "below /mnt/bucket"),
        ([*ASKED[:-1], "0", "--", *ARGUMENTS], "above 0"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_asked_for(words, said, world, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and said in capsys.readouterr().err
    assert not calls(world)


def test_the_arguments_of_the_run_are_tried_before_a_slice_is_waited_for():
    with pytest.raises(UserError, match="epochs"):
        check(["mlm", "demo", "--epochs", "3", "--run-dir", "/disk/a"])


def test_each_generation_has_its_image_and_no_answer_is_waited_for_long():
    for name, image in RUNTIMES.items():
        assert f"--runtime-version={image}" in Slice("a", "p", "z", f"{name}-8").create()
    assert "--runtime-version=x" in Slice("a", "p", "z", "v4-8", runtime_version="x").create()
    began = time.monotonic()
    assert call(["bash", "-c", "sleep 60 & sleep 60"], 0.1).code == 124
    assert time.monotonic() - began < 5
    with pytest.raises(UserError, match="not on the PATH"):
        gcloud_commands.call(["no-such-gcloud"], 1)
