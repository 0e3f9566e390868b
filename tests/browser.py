"""A page in headless Chromium, driven through its debugging protocol (https://chromedevtools.github.io)."""

import base64
import contextlib
import itertools
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A page with a window of the size of a phone's."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._numbers = socket, itertools.count(1)
        self.errors: list[str] = []
        """What its scripts did not catch."""

    async def call(self, method: str, **parameters: Any) -> dict:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript; of a promise, what it gives."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until an expression is true."""
        promise = f"new Promise(done => {{ const look = () => ({script}) ? done(1) : setTimeout(look, 20); look(); }})"
        await self.evaluate(promise)

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    async def type(self, selector: str, text: str) -> None:
        """In the place of what stands in a field, as from a keyboard."""
        await self.evaluate(f"(field => (field.focus(), field.select()))(document.querySelector({selector!r}))")
        await self.call("Input.insertText", text=text)

    async def click(self, selector: str) -> None:
        """With the pointer, where it is on the screen."""
        found = f"document.querySelector({selector!r})"
        await self.evaluate(f"{found}.scrollIntoView()")
        box = await self.evaluate(f"{found}.getBoundingClientRect().toJSON()")
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    async def picture(self, path: pathlib.Path) -> None:
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@contextlib.asynccontextmanager
async def page(folder: pathlib.Path, width: int = 390, height: int = 844) -> AsyncIterator[Page]:
    """folder: for what the browser keeps."""
    assert CHROMIUM, "no chromium in the PATH: apt-get install chromium"
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-port=0"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            address = next(
                found[1] for line in process.stderr if (found := re.search(r"listening on ws://([^/]+)", line))
            )
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{address}/json/list") as answer:
                    targets = await answer.json()
                (target,) = (one for one in targets if one["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                    found = Page(socket)
                    await found.call("Runtime.enable")
                    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=True)
                    await found.call("Emulation.setDeviceMetricsOverride", **size)
                    yield found
        finally:
            process.kill()
