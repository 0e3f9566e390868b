"""The processes of a run find each other, and the end of one is known to all at once.

Each process connects to process 0 at the coordinator's port before JAX listens there, so that one that does not come,
comes twice or was told other numbers is named in one line. The connections stay: the kernel closes those of a process
that is killed, whatever it was doing, and process 0 passes the word on. JAX would notice by its heartbeats, a minute
later and with a stack of C++; it still does where a connection is no more than silent.
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
"""Seconds in which the main thread of a process may tell itself why it ends, before the watching one ends it."""
LINGER = 5.0
"""Seconds that process 0 stays for the others to hear why it ends."""
SILENCE = 30
"""Seconds after which a machine that no longer answers counts as gone."""


class Failure(NamedTuple):
    """Why the run ends."""

    process_id: int
    message: str | None
    """None: it ended without a word."""
    code: int
    """Exit code."""


class Watch:
    """Connections between process 0 and each of the others; made by `rendezvous`."""

    def __init__(self, place: Place, peers: dict[int, socket.socket]):
        self._place, self._peers = place, peers
        self._gone: set[int] = set()
        self._leaving = threading.Event()
        self._failed = threading.Event()
        self._failure: Failure | None = None
        self._thread = threading.Thread(target=self._listen, name="watching the other processes", daemon=True)
        for peer in peers.values():
            _keep_alive(peer)
        self._thread.start()

    def fail(self, message: str, code: int) -> None:
        """Tell all that this process ends, and why."""
        self._leaving.set()
        self._send({"failed": [self._place.process_id, message, code]})
        self._linger()

    def failure(self, seconds: float) -> str | None:
        """What another process ended of, in words, if that is known within so many seconds."""
        self._leaving.set()
        return self._words(self._failure) if self._failed.wait(seconds) and self._failure else None

    def leave(self) -> None:
        """End well: from now on, others may go."""
        self._leaving.set()
        self._send({"left": True})

    def _send(self, message: dict, but: int | None = None) -> None:
        for number, peer in self._peers.items():
            if number != but:
                with contextlib.suppress(OSError):
                    peer.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        unread: dict[int, bytes] = {}
        for number, peer in self._peers.items():
            selector.register(peer, selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select():
                number: int = key.data
                try:
                    data = self._peers[number].recv(65536)
                except OSError:
                    data = b""
                *lines, unread[number] = (unread.get(number, b"") + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    # Either way it will close, and that says no more.
                    self._gone.add(number)
                    if "failed" in message:
                        self._end(Failure(*message["failed"]), number)
                if not data:
                    selector.unregister(key.fileobj)
                    if number not in self._gone:
                        self._gone.add(number)
                        self._end(Failure(number, None, 1), number)

    def _end(self, failure: Failure, source: int) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        self._failed.set()
        if self._place.process_id == 0:
            self._send({"failed": failure}, but=source)
        threading.Thread(target=self._leave_with, args=(failure,), daemon=True).start()

    def _leave_with(self, failure: Failure) -> None:
        # Without process 0, JAX is about to abort this one.
        orphaned = failure.message is None and failure.process_id == 0
        if not self._leaving.wait(0 if orphaned else GRACE):
            os.write(library_log.terminal(2), f"error: {self._words(failure)}\n".encode())
            # JAX may still abort before the end; why this process ends is told.
            library_log.ended()
            self._linger()
            os._exit(failure.code)

    def _linger(self) -> None:
        if self._place.process_id == 0:
            # With this process ends JAX's service, and without it the others would not live to tell.
            end = time.monotonic() + LINGER
            while len(self._gone) < len(self._peers) and time.monotonic() < end:
                time.sleep(0.05)

    def _words(self, failure: Failure) -> str:
        who = f"process {failure.process_id} of {self._place.processes}"
        if failure.message is not None:
            return f"{who}: {failure.message}"
        return (
            f"{who} ended without a word: it was killed, ran out of memory, or its machine is gone; the same command "
            "in all processes goes on from the last checkpoint"
        )


def rendezvous(place: Place, timeout: float) -> Watch:
    """Wait until all processes are there; UserError, in every process that can know it, where they will not be."""
    end = time.monotonic() + timeout
    if place.process_id == 0:
        return Watch(place, _gather(place, end, timeout))
    return Watch(place, {0: _call(place, end, timeout)})


def _gather(place: Place, end: float, timeout: float) -> dict[int, socket.socket]:
    """Connections of all the others, at process 0."""
    peers: dict[int, socket.socket] = {}
    try:
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", place.port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {place.port} ({error.strerror}); give all processes another one"
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
                        _answer(waiting, fault)
                    raise UserError(fault)
            missing = [number for number in range(1, place.processes) if number not in peers]
            if missing and time.monotonic() > end:
                fault = (
                    f"{_listed(missing)} of {place.processes} did not come within {timeout:g} s: see their output, or "
                    "wait longer with --distributed.timeout"
                )
                for waiting in peers.values():
                    _answer(waiting, fault)
                raise UserError(fault)
            if missing and time.monotonic() > told:
                told = end
                print(f"waiting for {_listed(missing)} of {place.processes}", flush=True)
    for peer in peers.values():
        _answer(peer, "")
    return peers


def _admit(peer: socket.socket, place: Place, peers: dict[int, socket.socket]) -> str | None:
    """Take up a connection that speaks for a process; a fault that no waiting mends, in words."""
    try:
        hello = json.loads(_line(peer, 5))
        assert hello["hello"] == HELLO
        number, processes = int(hello["process_id"]), int(hello["processes"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        # Something else that came by; a process would come again.
        peer.close()
        return None
    if processes != place.processes:
        return f"process 0 was told of {place.processes} processes and process {number} of {processes}"
    if number in peers and not _closed(peers[number]):
        return f"two processes were told to be process {number} of {processes}"
    peers[number] = peer
    return None


def _call(place: Place, end: float, timeout: float) -> socket.socket:
    """The connection to process 0, which says that all are there."""
    hello = {"hello": HELLO, "process_id": place.process_id, "processes": place.processes}
    reason = "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((place.host, place.port), timeout=min(left, 5))
            peer.sendall(json.dumps(hello).encode() + b"\n")
            # It may hear of the end a little later than this process would give up.
            answer = json.loads(_line(peer, left + 5))
            if answer["fault"]:
                raise UserError(answer["fault"])
            peer.settimeout(None)
            return peer
        except UserError:
            raise
        except (ValueError, KeyError, TypeError):
            reason = "what answers there is no process 0 of this run"
        except OSError as error:
            reason = error.strerror or str(error) or reason
        time.sleep(min(0.5, max(end - time.monotonic(), 0)))
    raise UserError(
        f"the coordinator {place.host}:{place.port} did not answer within {timeout:g} s ({reason}): process 0 must run "
        "there and this machine must reach it; --distributed.timeout waits longer"
    )


def _answer(peer: socket.socket, fault: str) -> None:
    with contextlib.suppress(OSError):
        peer.settimeout(None)
        peer.sendall(json.dumps({"fault": fault}).encode() + b"\n")


def _line(peer: socket.socket, seconds: float) -> bytes:
    """One line, read byte by byte so that nothing behind it is taken."""
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
    """Let the kernel ask whether the other machine is still there."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Names that not every system knows.
    for name, seconds in (("TCP_KEEPIDLE", SILENCE // 3), ("TCP_KEEPINTVL", SILENCE // 6), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _listed(numbers: list[int], most: int = 8) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:most]))}{more}"
