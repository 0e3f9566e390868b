"""The routes: POST /predict (a row, or a list of rows, as JSON), GET / (a page to type into), GET /health."""

from __future__ import annotations

import asyncio
import json
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from espalier.errors import UserError
from espalier.page_policy import Application, content_policy, guarded
from espalier.predict.use import Use
from espalier.serve.batching import Batcher, FullError

PAGE = Path(__file__).with_name("page.html")


class Limits(NamedTuple):
    """Of a request: above, it is refused (413), or given up (504)."""

    bytes: int
    rows: int
    seconds: float


def application(
    use: Use, batcher: Batcher, limits: Limits, about: Mapping[str, Any], host: str = "127.0.0.1"
) -> Application:
    """about: what /health and the page say of the model, JSON values: `use` and `model`, by their names, and `example`,
    a row, whose fields the page has. host: the address on which it listens (page_policy.guarded)."""

    async def predict(request: Request) -> Response:
        rows = _parsed(await _body(request, limits.bytes))
        single = not isinstance(rows, list)
        rows = [rows] if single else rows
        if len(rows) > limits.rows:
            raise HTTPException(413, f"{len(rows):,} rows in a request; at most {limits.rows:,}: send several requests")
        results: list[dict[str, Any] | None] = [None] * len(rows)
        inputs, at = [], []
        for number, row in enumerate(rows):
            try:
                one = _input(use, row)
                inputs.append(use.numbered(one, number) if use.numbered else one)
                at.append(number)
            except UserError as error:
                results[number] = {"error": str(error)}
        try:
            found = await asyncio.wait_for(asyncio.wrap_future(batcher.ask(inputs)), limits.seconds)
        except FullError:
            raise HTTPException(503, "too many requests wait; try again", {"Retry-After": "1"}) from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {limits.seconds:g} s; send fewer or shorter rows") from None
        for number, result in zip(at, found, strict=True):
            results[number] = {"error": str(result)} if isinstance(result, UserError) else result
        if single:
            (result,) = results
            return _json(result, 422 if result and result.keys() == {"error"} else 200)
        return _json(results)

    async def page(request: Request) -> Response:
        facts = json.dumps(about, ensure_ascii=False).replace("<", "\\u003c").encode("utf-8", "replace").decode()
        before, script, after = re.split("(?<=<script>)|(?=</script>)", PAGE.read_text(encoding="utf-8"))
        script = script.replace("/*ABOUT*/null", facts, 1)
        policy = content_policy([script], asks=True) + "; frame-ancestors 'none'"
        return HTMLResponse(before + script + after, headers={"Content-Security-Policy": policy})

    async def health(request: Request) -> Response:
        return _json({"status": "ok", **about, "rows": batcher.answered, "batches": batcher.batches})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))

    async def failed(request: Request, error: Exception) -> Response:
        traceback.print_exception(error)
        return _json({"error": f"{type(error).__name__} in the server; its log says more"}, 500)

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/predict", predict, methods=["POST"]),
    ]
    return guarded(Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: failed}), host)


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    if int(request.headers.get("content-length") or 0) <= most:
        async for part in request.stream():
            body += part
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise HTTPException(413, f"a request of more than {most:,} bytes; send several", {"Connection": "close"})


def _parsed(body: bytes) -> Any:
    try:
        rows = json.loads(body)
        # Half a surrogate pair is no text, and a bare number no row.
        json.dumps(rows, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"no JSON ({error}); send a row as an object, or a list of rows") from None
    return rows


def _input(use: Use, row: Any) -> Any:
    if not isinstance(row, dict):
        raise UserError(f"a row is an object with {use.takes}, and this one is a {type(row).__name__}")
    return use.reads(row)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    content = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    return Response(content, status, dict(headers or {}), media_type="application/json")
