"""The page of all runs, served: GET / is the page, /data?since=N what has changed, /report/NAME a run's report.

The folder is looked at when somebody asks, at most every second and so that looking takes a fifth of the time.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import uuid
from typing import Any

from espalier import progress
from espalier.errors import UserError
from espalier.files import inside
from espalier.page_policy import REPORT, Application, guarded
from espalier.runs.folder import Folder
from espalier.runs.page import described, page_of, points_of_each, policy, snapshot
from espalier.serve.server import address_of, check_installed, listening, until_ended

AT_LEAST = 1.0
"""Seconds between two looks."""


class Watched:
    """A folder that several threads ask about."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self.identity = uuid.uuid4().hex
        """Of this server: to another one, all is new."""
        self._lock = threading.Lock()
        self._next = 0.0
        self._version = 0
        self._changed: dict[str, tuple[int, int]] = {}
        """Name of a run → (its version, ours when that was first seen)."""

    def look(self) -> None:
        began = time.monotonic()
        if began < self._next:
            return
        self.folder.look()
        self._version += 1
        changed = {}
        for name, run in self.folder.runs.items():
            known = self._changed.get(name)
            changed[name] = known if known and known[0] == run.version else (run.version, self._version)
        self._changed = changed
        took = time.monotonic() - began
        self._next = time.monotonic() + max(AT_LEAST, 4 * took)

    def data(self, since: int | None = None) -> dict[str, Any]:
        """The snapshot; with `since`, only the runs that changed after that version. `order` names all."""
        with self._lock:
            self.look()
            if since is None:
                found = snapshot(self.folder)
            else:
                now, runs = time.time(), list(self.folder.runs.values())
                most = points_of_each(runs)
                new = [described(run, now, most) for run in runs if self._changed[run.name][1] > since]
                found = {"live": True, "time": now, "problems": self.folder.problems, "runs": new}
            brief = ("name", "age", "left", "state", "note")
            found["order"] = [{key: row[key] for key in brief} for row in self.folder.rows()]
            return found | {"version": self._version, "server": self.identity}

    def report(self, name: str) -> str | None:
        """report.html of a run that is known, None where there is none."""
        with self._lock:
            run = self.folder.runs.get(name)
        if run is None:
            return None
        with contextlib.suppress(OSError, UserError):
            return inside(run.path, "report.html", run.path).read_text(encoding="utf-8", errors="replace")
        return None


def application(watched: Watched, host: str = "127.0.0.1") -> Application:
    """The routes. host: the address on which it listens (page_policy.guarded)."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    async def page(request: Request) -> Response:
        headers = {"Content-Security-Policy": f"{policy()}; frame-ancestors 'none'", "Cache-Control": "no-store"}
        return HTMLResponse(page_of(await run_in_threadpool(watched.data)), headers=headers)

    async def data(request: Request) -> Response:
        given = request.query_params.get("since", "")
        same = request.query_params.get("server") == watched.identity
        found = await run_in_threadpool(watched.data, int(given[:18]) if given.isdecimal() and same else None)
        text = json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})

    async def report(request: Request) -> Response:
        found = await run_in_threadpool(watched.report, request.path_params["name"])
        if found is None:
            return PlainTextResponse("this run has no report yet\n", 404)
        shown = re.sub(r'href="(\.\./)+runs\.html"', 'href="/"', found)
        return HTMLResponse(shown, headers={"Content-Security-Policy": REPORT})

    routes = [Route("/", page), Route("/data", data), Route("/report/{name:path}", report)]
    return guarded(Starlette(routes=routes), host)


def serve(folder: Folder, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM. UserError where the libraries are missing or the address is taken."""
    check_installed("runs --serve", "; --html needs neither")
    watched = Watched(folder)
    with listening(host, port) as listener:
        with progress.waiting(f"reading {folder.path}"):
            watched.data()
        progress.say(f"{len(folder.runs)} runs of {folder.path}: {address_of(listener)} (Ctrl-C ends)")
        for line in folder.problems:
            progress.say(f"warning: {line}")
        until_ended(application(watched, host), listener, 2)
    progress.say("ended")
