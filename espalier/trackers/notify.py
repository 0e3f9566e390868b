"""A webhook that is told how a run fares (`--notify URL`): started, rolled back, failed, paused, finished.

Each event is one POST of a JSON object on a thread of its own, with a time-out; what fails is told once and otherwise
ignored. The URL may be a secret in itself: it is in no file of the run and in no line that is printed.
"""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from espalier import progress
from espalier.trackers.aside import Aside

VARIABLE = "ESPALIER_NOTIFY"
"""The environment variable that names the URL where --notify does not; other users of the machine do not see it."""
TIMEOUT = 10.0
"""Seconds that a webhook may take."""
PATIENCE = 5.0
"""Seconds for which the end of a command waits for what is under way."""
SHAPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "oapi.dingtalk.com": lambda text: {"msgtype": "text", "text": {"content": text}},
    "qyapi.weixin.qq.com": lambda text: {"msgtype": "text", "text": {"content": text}},
    "open.feishu.cn": lambda text: {"msg_type": "text", "content": {"text": text}},
    "open.larksuite.com": lambda text: {"msg_type": "text", "content": {"text": text}},
    "discord.com": lambda text: {"content": text},
}
"""Services that take one shape of their own alone → that shape. All others, Slack among them, get the whole event: its
`text` says it in words."""


class Notifier:
    """Tells a webhook of the events of a run; does nothing where there is no URL.

    url: of --notify. run: the run directory, as people call it. quiet: whether another process of the run tells.
    """

    def __init__(self, url: str | None, run: str, quiet: Callable[[], bool] = lambda: False):
        self._run, self._url, self._quiet = run, url or os.environ.get(VARIABLE), quiet
        self._aside = Aside("--notify", progress.say, _said) if self._url else None

    def tell(self, event: str, words: str, **more: Any) -> None:
        """Send an event; returns at once.

        event: one word for programs. words: for people, what follows the name of the run. more: JSON values.
        """
        url = self._url
        if self._aside is None or url is None or self._quiet():
            return
        value = {"event": event, "text": f"Espalier {self._run}: {words}", "run": self._run}
        value |= {"host": platform.node(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | _finite(more)
        self._aside.do(lambda: post(url, value))

    def close(self, patience: float = PATIENCE) -> None:
        """Wait a little for what is under way."""
        if self._aside is not None:
            self._aside.close(patience)


def post(url: str, event: Mapping[str, Any]) -> None:
    """Send the event in the shape that this service takes; raises where it is not taken."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    shape = SHAPES.get(host)
    body = json.dumps(shape(event["text"]) if shape else event, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "espalier"}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=TIMEOUT) as answer:
        answer.read(1000)


def _said(error: Exception) -> str:
    """Without the words of the error, which may hold the URL."""
    code = f" {error.code}" if isinstance(error, urllib.error.HTTPError) else ""
    reason = getattr(error, "reason", None)
    kind = type(reason if isinstance(reason, OSError) else error).__name__
    return f"the webhook did not take a message ({kind}{code})"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
