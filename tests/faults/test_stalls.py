"""A process that is killed, stopped or cut off from the network ends all others soon, and they say which it was."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from command import Command, free_port, write_text

from sharding.processes import watchdog
from sharding.processes.discovery import Place

LIMIT = 120
"""Seconds within which all have ended."""


@pytest.fixture
def together():
    """together(3): the watches of three processes, all in this one."""
    watches: dict[int, watchdog.Watch] = {}

    def meet(count: int) -> list[watchdog.Watch]:
        port = free_port()

        def come(number):
            watches[number] = watchdog.rendezvous(Place("127.0.0.1", port, count, number), 30)

        threads = [threading.Thread(target=come, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [watches[number] for number in range(count)]

    yield meet
    for watch in watches.values():
        watch.leave()
    for watch in watches.values():
        for peer in watch._peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(2)
        watch._thread.join(5)
        for peer in (*watch._peers.values(), watch._asks, watch._asked):
            peer.close()


@pytest.mark.parametrize("silent, hears", [(1, 0), (0, 1)])
def test_silence_is_a_failure_that_names_the_process(together, monkeypatch, silent, hears):
    monkeypatch.setattr(watchdog, "BEAT", 0.1)
    monkeypatch.setattr(watchdog, "SILENCE", 0.8)
    watches = together(3)
    # Its connections stay open, as those of a process that is stopped.
    watches[silent]._send = lambda *rest, **more: None
    # Whoever asks for a failure is not ended by it.
    found = [watch.failure(5) for number, watch in enumerate(watches) if number != silent]
    assert found[0] and found[0].startswith(f"process {silent} of 3: no answer for")
    assert found[1] and found[1].startswith(f"process {silent} of 3: ")


def test_all_stop_at_the_first_point_that_none_has_passed(together):
    watches, ended = together(3), {}

    def run(number):
        draw, passed = random.Random(number), 0
        while not watches[number].reached():
            passed += 1
            # One runs ahead, as devices let it.
            time.sleep(draw.uniform(0, (0.001, 0.004, 0.01)[number]))
        ended[number] = passed
        assert watches[number].reached()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    for number in (2, 1, 2):
        watches[number].stop()
    for thread in threads:
        thread.join(10)
    assert len(ended) == 3 and len(set(ended.values())) == 1 and ended[0] > 2, ended


PLACES = {
    "start": lambda line: "loading JAX" in line,
    "step": lambda line: line.startswith("step 2/"),
    "save": lambda line: line.startswith("step 4/"),
    "evaluation": lambda line: line.startswith("step 6/"),
}


def all_end(started, victim: int, fault) -> float:
    """Seconds until all but the victim have ended, non-zero, each with one line that names it."""
    fault()
    began = time.monotonic()
    others = [number for number in range(len(started.processes)) if number != victim]
    for number in others:
        code = started.processes[number].wait(max(began + LIMIT - time.monotonic(), 0.1))
        assert code, started.told()
    seconds = time.monotonic() - began
    for number in others:
        lines = [line for line in started.err[number] if line.strip()]
        # One that is cut off sees only that process 0 is silent, and so do all if it is process 0.
        assert len(lines) == 1 and f"process {victim} of {len(started.processes)}" in lines[0], started.told()
    return seconds


FAULTS = [(2, signal.SIGSTOP), (0, signal.SIGSTOP), (3, signal.SIGKILL)]
OFTEN = {(0, signal.SIGSTOP, "save"), (3, signal.SIGKILL, "save")}
"""Those that .ci/run tries; each takes about a minute."""


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "victim, number, place",
    [
        pytest.param(*fault, place, marks=pytest.mark.slow if (*fault, place) in OFTEN else pytest.mark.soak)
        for fault in FAULTS
        for place in PLACES
    ],
)
def test_one_of_four_is_killed_or_stopped(tmp_path, victim, number, place):
    started = Command(tmp_path, write_text(tmp_path / "text.txt"), 4).start()
    try:
        assert started.line(PLACES[place]), started.told()
        seconds = all_end(started, victim, lambda: started.send(number, victim))
        print(f"{number.name} to {victim} of 4 in {place}: {seconds:.1f} s")
        if number == signal.SIGSTOP:
            # Once it goes on, it sees what has happened, and ends too.
            started.send(signal.SIGCONT, victim)
            assert started.processes[victim].wait(60)
    finally:
        started.kill()


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, (here, there): what another machine is to a process."""
    assert os.getuid() == 0 and shutil.which("ip"), "network namespaces need root and iproute2"
    here, there = (f"{name}-{os.getpid()}" for name in ("here", "there"))
    ends = {here: "10.77.0.1", there: "10.77.0.2"}

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in ends:
            ip("netns", "add", name)
            # `ip netns exec` lays this over /etc/hosts: collectives listen where the host's own name leads.
            hosts = pathlib.Path("/etc/netns", name, "hosts")
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n{ends[name]} {socket.gethostname()}\n")
        ip("link", "add", "cable", "netns", here, "type", "veth", "peer", "name", "cable", "netns", there)
        for name, address in ends.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield here, there
    finally:
        for name in ends:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "place", [pytest.param("start", marks=pytest.mark.soak), pytest.param("step", marks=pytest.mark.slow)]
)
def test_the_network_to_one_of_four_is_dropped(tmp_path, namespaces, place):
    here, there = namespaces
    command = Command(tmp_path, write_text(tmp_path / "text.txt"), 4, host="10.77.0.1")
    started = command.start(each=lambda number: ["ip", "netns", "exec", there if number == 3 else here])
    try:
        assert started.line(PLACES[place]), started.told()
        pull = ["ip", "-n", here, "link", "set", "cable", "down"]
        seconds = all_end(started, 3, lambda: subprocess.run(pull, check=True))
        print(f"the network to 3 of 4 dropped in {place}: {seconds:.1f} s")
        # On the other side, process 0 is the silent one.
        assert started.processes[3].wait(LIMIT)
        (line,) = [line for line in started.err[3] if line.strip()]
        assert "process 0 of 4: no answer" in line
    finally:
        started.kill()
