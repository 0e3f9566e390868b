"""Rendezvous of the processes of a run, and a watchdog: when one process ends or stalls, the others end too.

Before JAX listens on the coordinator's port, each process connects to process 0 there, so that a process that is
missing, started twice or given a different count is named in one line. The connections stay open. The kernel closes
those of a process that is killed, whatever it was doing, and process 0 informs the others. A process that is stopped,
or cut off from the network, is silent: each sends a heartbeat every BEAT seconds, and who hears none for SILENCE
seconds ends with the others. JAX would notice later, with a C++ stack trace; its heartbeats remain the fallback.

The connections also carry a request to stop (training.guard): process 0 asks all how far they are, and names the point
at which they stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from typing import NamedTuple

from espalier import library_log
from espalier.errors import UserError
from sharding.processes.discovery import Place

HELLO = "espalier 1"
GRACE = 1.0
"""Seconds that the main thread has to report the failure itself before the watchdog thread ends the process."""
LINGER = 5.0
"""Seconds that process 0 stays alive so that the others receive the reason of its end."""
BEAT = 5.0
"""Seconds between heartbeats."""
SILENCE = 60.0
"""Seconds without one after which a process counts as stalled; no native code holds Python's lock so long."""


SILENT = (
    f"no answer for {SILENCE:g} s: it is stopped, or its machine or the network hangs; start the same command in all "
    "processes to resume from the last checkpoint"
)


class Failure(NamedTuple):
    """Why a process ended, and with it the run."""

    process_id: int
    message: str | None
    """None: it died without reporting a reason."""
    code: int
    """Exit code."""


class Watch:
    """The connections between process 0 and each other process; made by `rendezvous`."""

    def __init__(self, place: Place, peers: dict[int, socket.socket]):
        self._place, self._peers = place, peers
        self._gone: set[int] = set()
        self._leaving = threading.Event()
        self._last_word = threading.Lock()
        """Held by whoever decides that it is the one to print why this process ends."""
        self._failed = threading.Event()
        self._failure: Failure | None = None
        self._sending = threading.Lock()
        if place.process_id:
            # JAX notices the end of process 0 in the same millisecond, and aborts.
            library_log.orphaned(f"error: {self._message(Failure(0, None, 1))}")
        self._asks, self._asked = socket.socketpair()
        self._stopping = StoppingPoint()
        self._passed: dict[int, int] = {}
        """Process 0: how far each is."""
        self._thread = threading.Thread(target=self._listen, name="watching the other processes", daemon=True)
        for peer in peers.values():
            _keep_alive(peer)
        self._thread.start()

    def fail(self, message: str, code: int) -> None:
        """Tell all processes that this one ends, and why."""
        self._take_last_word()
        self._send({"failed": [self._place.process_id, message, code]})
        self._linger()

    def failure(self, seconds: float) -> str | None:
        """Why another process ended, as a message; None if no failure arrives within so many seconds."""
        self._take_last_word()
        return self._message(self._failure) if self._failed.wait(seconds) and self._failure else None

    def leave(self) -> None:
        """Graceful shutdown: from now on the end of another process is no failure."""
        self._take_last_word()
        self._send({"left": True})

    def stop(self) -> None:
        """Have all processes stop at the same point soon (`reached`). Returns at once; a signal handler may call it."""
        self._asks.send(b"!")

    def reached(self) -> bool:
        """Whether all stop here. All processes call it at the same points, in the same order."""
        return self._stopping.reached()

    def _send(self, message: dict, but: int | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for number, peer in self._peers.items():
                if number != but:
                    with contextlib.suppress(OSError):
                        peer.sendall(line)

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        unread: dict[int, bytes] = {}
        for number, peer in self._peers.items():
            selector.register(peer, selectors.EVENT_READ, number)
        selector.register(self._asked, selectors.EVENT_READ, self._place.process_id)
        now = beaten = time.monotonic()
        heard = dict.fromkeys(self._peers, now)
        while len(selector.get_map()) > 1:
            ready = selector.select(max(beaten + BEAT - now, 0))
            before, now = now, time.monotonic()
            if now - before > 2 * BEAT:
                # This process itself was suspended, perhaps with all the others.
                heard = dict.fromkeys(heard, now)
            if now >= beaten + BEAT:
                beaten = now
                self._send({})
            for key, _ in ready:
                number: int = key.data
                if key.fileobj is self._asked:
                    self._asked.recv(64)
                    self._ask()
                    continue
                try:
                    data = self._peers[number].recv(65536)
                except OSError:
                    data = b""
                heard[number] = now
                *lines, unread[number] = (unread.get(number, b"") + data).split(b"\n")
                for line in lines:
                    self._receive(number, json.loads(line))
                if not data:
                    selector.unregister(key.fileobj)
                    if number not in self._gone:
                        self._gone.add(number)
                        self._end(Failure(number, None, 1), number)
            silent = [number for number in heard if number not in self._gone and now - heard[number] > SILENCE]
            if silent:
                self._end(Failure(silent[0], SILENT, 1), None)

    def _receive(self, number: int, message: dict) -> None:
        if "failed" in message:
            self._gone.add(number)
            self._end(Failure(*message["failed"]), number)
        elif "left" in message:
            # It closes the connection next, which then is no failure.
            self._gone.add(number)
        elif "ask" in message:
            self._ask()
        elif "how far" in message:
            self._send({"passed": self._stopping.hold()})
        elif "passed" in message:
            self._told(number, message["passed"])
        elif "stop" in message:
            self._stopping.set(message["stop"])

    def _ask(self) -> None:
        """Begin to agree on where all stop; again, it changes nothing."""
        if self._place.process_id:
            self._send({"ask": True})
        elif not self._passed:
            self._send({"how far": True})
            self._told(0, self._stopping.hold())

    def _told(self, number: int, passed: int) -> None:
        self._passed[number] = passed
        if len(self._passed) == self._place.processes:
            # The first point that nobody has passed.
            point = max(self._passed.values())
            self._send({"stop": point})
            self._stopping.set(point)

    def _end(self, failure: Failure, source: int | None) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        self._failed.set()
        if self._place.process_id == 0 or source is None:
            self._send({"failed": failure}, but=source)
        threading.Thread(target=self._leave_with, args=(failure,), daemon=True).start()

    def _take_last_word(self) -> None:
        """From now on the main thread says why this process ends. Waits for that end where the watchdog has said it."""
        with self._last_word:
            self._leaving.set()

    def _leave_with(self, failure: Failure) -> None:
        # JAX aborts this process as soon as it notices that process 0 is gone.
        orphaned = failure.message is None and failure.process_id == 0
        self._leaving.wait(0 if orphaned else GRACE)
        with self._last_word:
            if self._leaving.is_set():
                return
            os.write(library_log.terminal(2), f"error: {self._message(failure)}\n".encode())
            # JAX may abort before `os._exit`: the reason is on the terminal already.
            library_log.ended()
            self._linger()
            os._exit(failure.code)

    def _linger(self) -> None:
        if self._place.process_id == 0:
            # JAX's coordination service ends with this process, and JAX would abort the others before they can report.
            end = time.monotonic() + LINGER
            while len(self._gone) < len(self._peers) and time.monotonic() < end:
                time.sleep(0.05)

    def _message(self, failure: Failure) -> str:
        who = f"process {failure.process_id} of {self._place.processes}"
        if failure.message is not None:
            return f"{who}: {failure.message}"
        return (
            f"{who} died without an error message: it was killed, ran out of memory, or its machine failed; start the "
            "same command in all processes to resume from the last checkpoint"
        )


class StoppingPoint:
    """How many points this process has passed, and the one at which all stop once that is agreed."""

    def __init__(self):
        self._changed = threading.Condition()
        self._passed = 0
        self._held = False
        self._point: int | None = None

    def reached(self) -> bool:
        """Whether to stop at this point; waits while it is being agreed on. TimeoutError if that takes too long."""
        with self._changed:
            # The watching threads agree, wherever the main threads are; a process that does not answer ends all.
            if not self._changed.wait_for(lambda: self._point is not None or not self._held, 2 * SILENCE):
                raise TimeoutError("the processes did not agree on where to stop")
            here, self._passed = self._passed, self._passed + 1
            return self._point is not None and here >= self._point

    def hold(self) -> int:
        """Pass no further point until `set`; returns how many were passed."""
        with self._changed:
            self._held = True
            return self._passed

    def set(self, point: int) -> None:
        """point: the number of points that are passed before that at which all stop."""
        with self._changed:
            self._point = point
            self._changed.notify_all()


def rendezvous(place: Place, timeout: float) -> Watch:
    """Wait until all processes are connected. UserError in every process that can know that they will not be."""
    end = time.monotonic() + timeout
    if place.process_id == 0:
        return Watch(place, _accept_all(place, end, timeout))
    return Watch(place, {0: _connect(place, end, timeout)})


def _accept_all(place: Place, end: float, timeout: float) -> dict[int, socket.socket]:
    """Process 0: the connections of all other processes."""
    peers: dict[int, socket.socket] = {}
    try:
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", place.port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {place.port} ({error.strerror}); give all processes another port"
        ) from None
    told = time.monotonic() + 5
    with server:
        while len(peers) < place.processes - 1:
            server.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                peer, _ = server.accept()
                fault = _admit(peer, place, peers)
                if fault:
                    for waiting in (peer, *peers.values()):
                        _reply(waiting, fault)
                    raise UserError(fault)
            missing = [number for number in range(1, place.processes) if number not in peers]
            if missing and time.monotonic() > end:
                fault = (
                    f"{_listed(missing)} of {place.processes} did not connect within {timeout:g} s: see their "
                    "output, or wait longer with --distributed.timeout"
                )
                for waiting in peers.values():
                    _reply(waiting, fault)
                raise UserError(fault)
            if missing and time.monotonic() > told:
                told = end
                print(f"waiting for {_listed(missing)} of {place.processes}", flush=True)
    for peer in peers.values():
        _reply(peer, "")
    return peers


def _admit(peer: socket.socket, place: Place, peers: dict[int, socket.socket]) -> str | None:
    """Add the connection of a process to `peers`; returns an error that waiting cannot mend, as a message."""
    try:
        hello = json.loads(_line(peer, 5))
        assert hello["hello"] == HELLO
        number, processes = int(hello["process_id"]), int(hello["processes"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        # Not one of ours (a port scanner, say); a process of ours would try again.
        peer.close()
        return None
    if processes != place.processes:
        return f"process 0 was started as one of {place.processes} processes and process {number} as one of {processes}"
    if number in peers and not _closed(peers[number]):
        return f"process {number} of {processes} was started twice"
    peers[number] = peer
    return None


def _connect(place: Place, end: float, timeout: float) -> socket.socket:
    """The connection to process 0, once all processes are connected."""
    hello = {"hello": HELLO, "process_id": place.process_id, "processes": place.processes}
    reason = "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((place.host, place.port), timeout=min(left, 5))
            peer.sendall(json.dumps(hello).encode() + b"\n")
            # Process 0 reports its time-out a little later than this process would give up.
            answer = json.loads(_line(peer, left + 5))
            if answer["fault"]:
                raise UserError(answer["fault"])
            peer.settimeout(None)
            return peer
        except UserError:
            raise
        except (ValueError, KeyError, TypeError):
            reason = "something else answers there"
        except OSError as error:
            reason = error.strerror or str(error) or reason
        time.sleep(min(0.5, max(end - time.monotonic(), 0)))
    raise UserError(
        f"the coordinator {place.host}:{place.port} did not answer within {timeout:g} s ({reason}): process 0 must run "
        "there and this machine must reach it; --distributed.timeout waits longer"
    )


def _reply(peer: socket.socket, fault: str) -> None:
    with contextlib.suppress(OSError):
        peer.settimeout(None)
        peer.sendall(json.dumps({"fault": fault}).encode() + b"\n")


def _line(peer: socket.socket, seconds: float) -> bytes:
    """One line, read byte by byte so that nothing after it is consumed."""
    peer.settimeout(seconds)
    line = b""
    while not line.endswith(b"\n") and len(line) < 10_000:
        data = peer.recv(1)
        if not data:
            raise ConnectionError("the connection was closed")
        line += data
    return line


def _closed(peer: socket.socket) -> bool:
    peer.settimeout(0)
    try:
        return peer.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _keep_alive(peer: socket.socket) -> None:
    """Let the kernel probe whether the other machine is still alive."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not every operating system has these.
    for name, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _listed(numbers: list[int], most: int = 8) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:most]))}{more}"
