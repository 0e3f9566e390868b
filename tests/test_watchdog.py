"""The watchdog of several processes, with both ends of its connections in this process."""

import os
import socket
import threading

from espalier import library_log
from sharding.processes import watchdog
from sharding.processes.discovery import Place


def test_the_end_of_another_is_told_once_however_slow_the_machine(monkeypatch, tmp_path):
    """The main thread, which fails too, is silent while the watchdog has told it and not yet ended the process."""
    happened, telling, go_on = [], threading.Event(), threading.Event()
    ended = threading.Event()

    def slow():
        telling.set()
        assert go_on.wait(10)

    def exits(code):
        happened.append(f"exit {code}")
        ended.set()

    monkeypatch.setattr(watchdog, "GRACE", 0)
    monkeypatch.setattr(library_log, "ended", slow)
    monkeypatch.setattr(os, "_exit", exits)
    with (tmp_path / "terminal").open("w") as terminal:
        monkeypatch.setattr(library_log, "terminal", lambda number: terminal.fileno())
        with socket.create_server(("localhost", 0)) as server:
            other = socket.create_connection(server.getsockname())
            mine, _ = server.accept()
        watch = watchdog.Watch(Place("localhost", 1, processes=2, process_id=0), {1: mine})
        other.close()
        assert telling.wait(10)
        main = threading.Thread(target=lambda: happened.append(watch.failure(10)))
        main.start()
        main.join(0.3)
        assert main.is_alive() and happened == []
        go_on.set()
        main.join(10)
        assert ended.wait(10)
        watch._thread.join(10)
        for end in (mine, watch._asks, watch._asked):
            end.close()
    assert happened[0] == "exit 1" and "process 1 of 2 died" in happened[1]
    (line,) = (tmp_path / "terminal").read_text().splitlines()
    assert line.startswith("error: process 1 of 2 died without an error message")
