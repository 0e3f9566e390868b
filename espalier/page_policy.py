"""What a page of ours may do in a browser, and whom a server of ours answers. A leaf.

Text of models, data and runs is escaped where it is put into a page. Should that ever fail, a browser still runs no
script but ours, which the page's policy names by its SHA-256 (Content Security Policy Level 3), and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)
"""Of every answer: it is what it says it is, and no page from elsewhere shows or loads it."""
NOTHING = "default-src 'none'; frame-ancestors 'none'"
"""The policy of an answer that is no page."""
REPORT = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
"""Of a page that a run brings: it may be anyone's, and neither runs scripts nor asks this server for anything."""

Application = Callable[[dict[str, Any], Callable[..., Awaitable[Any]], Callable[..., Awaitable[None]]], Awaitable[None]]


def content_policy(scripts: Iterable[str] = (), asks: bool = False) -> str:
    """The policy of a page with these inline scripts, as they stand between their tags; it may load nothing.

    asks: whether they ask the server that the page comes from.
    """
    # Browsers read line ends as \n.
    sums = [hashlib.sha256(script.replace("\r\n", "\n").encode()).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in sums) or "'none'"
    connect = "'self'" if asks else "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )


def meta(policy: str) -> str:
    """The policy as an element of a page's head."""
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'


def guarded(application: Any, host: str) -> Application:
    """An ASGI application that answers only those who may ask. host: the address on which it listens.

    On this machine alone, a request must name it: a page from elsewhere that has its own name point here (DNS
    rebinding) is refused. A request that changes or costs something must not come from another page. An answer without
    a policy of its own gets the strictest.
    """

    async def answered(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await application(scope, receive, send)
        given = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if why := _refused(host, scope["method"], given):
            body = f"{why}\n".encode()
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": [*headers, *HEADERS]})
            return await send({"type": "http.response.body", "body": body})

        async def safer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                there = list(message.get("headers", ()))
                policy = [] if any(name == b"content-security-policy" for name, _ in there) else [NOTHING]
                added = [(b"content-security-policy", one.encode()) for one in policy]
                message = {**message, "headers": [*there, *HEADERS, *added]}
            await send(message)

        await application(scope, receive, safer)

    return answered


def _refused(host: str, method: str, given: dict[bytes, str]) -> str | None:
    """Why a request is not answered, None where it is."""
    named = given.get(b"host", "")
    if host in LOCAL and _name(named) not in LOCAL:
        return "this server answers on its own machine only; open http://127.0.0.1"
    if method not in ("GET", "HEAD"):
        origin = given.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != named:
            return "this server answers its own page and programs, not the pages of others"
        if given.get(b"sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "this server answers its own page and programs, not the pages of others"
    return None


def _name(host: str) -> str:
    """Without the port."""
    return (host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]).lower().rstrip(".")
