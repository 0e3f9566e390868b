"""The page of `runs`: one file, in a real browser, and one that follows runs."""

import asyncio
import contextlib
import html.parser
import json
import os
import pathlib
import re
import signal
import socket
import threading
import time

import aiohttp
import pytest
import uvicorn
from test_runs import CONFIG, lines, made

from espalier.report.render import all_runs_section
from espalier.runs.app import Watched, application
from espalier.runs.folder import Folder
from espalier.runs.page import write
from espalier.training.run import RunDirectory
from tests.browser import page

EVIL = "<script>evil('</script>')<img src=x onerror=evil()>&amp;<!--"


def hostile(folder: pathlib.Path) -> pathlib.Path:
    """A run whose name and settings, metrics, samples and error are HTML and scripts."""
    name = EVIL.replace("/", "\u2215")
    config = {"text": EVIL, EVIL: EVIL, "task": EVIL, "command": EVIL, "closing": "</script><script>evil()</script>"}
    path = made(folder / name, config=config, summary={"metrics": {EVIL: 0.5}})
    (path / "samples.json").write_text(json.dumps({"texts": ["</script><script>evil()</script>" + EVIL]}))
    (path / "failure.json").write_text(json.dumps({"error": EVIL}))
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, EVIL: 1.0, "</script>": 2.0}) + "\n")
    (path / "report.html").write_text('<a href="../runs.html">all</a>')
    return path


class Elements(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_one_file_and_text_of_runs_stays_text(tmp_path):
    plain = made(tmp_path / "runs" / "plain")
    folder = Folder(tmp_path / "runs")
    folder.look()
    without = Elements(write(folder, tmp_path / "runs.html").read_text()).tags
    hostile(tmp_path / "runs")
    folder.look()
    text = write(folder, tmp_path / "runs.html").read_text()
    assert Elements(text).tags == without, "a run adds no element to the page"
    for _, attributes in without:
        assert "src" not in attributes and attributes.get("href", "data:,") == "data:,"
    (data,) = re.findall(r'<script type="application/json" id=data>(.*?)</script>', text)
    runs = {run["name"]: run for run in json.loads(data)["runs"]}
    (evil,) = (run for name, run in runs.items() if name.startswith("<script>"))
    assert evil["settings"][EVIL] == EVIL and evil["report"].startswith("runs/%3Cscript%3E")
    assert runs["plain"]["curves"]["loss"] == [[10, 20, 30, 40], [4, 3, 2, 1]] and runs["plain"]["report"] is None
    assert "http://" not in re.sub("http://www.w3.org/2000/svg", "", text) and "https://" not in text
    # The report of a run leads back.
    (tmp_path / "runs" / "runs.html").write_text("")
    assert 'href="../runs.html"' in all_runs_section(plain).body
    (deep := tmp_path / "runs" / "glue" / "rte" / "seed").mkdir(parents=True)
    assert 'href="../../../runs.html"' in all_runs_section(deep).body


def test_hundreds_of_runs_make_a_page_of_a_few_megabytes(tmp_path):
    first = made(tmp_path / "0")
    lines(first / "metrics.jsonl", range(50, 800))
    for number in range(1, 300):
        other = tmp_path / f"group-{number % 7}" / str(number)
        other.mkdir(parents=True)
        for name in ("config.json", "metrics.jsonl", "summary.json", ".lock"):
            os.link(first / name, other / name)
    folder = Folder(tmp_path)
    folder.look()
    began = time.process_time()
    folder.look()
    assert time.process_time() - began < 2, "what has not changed is not read again"
    assert len(folder.runs) == 300 and all(run.log.bytes_read == run.log._offset for run in folder.runs.values())
    assert write(folder, tmp_path / "runs.html").stat().st_size < 12e6


@contextlib.contextmanager
def served(folder: pathlib.Path):
    """The address of a server in a thread."""
    watched = Watched(Folder(folder))
    server = uvicorn.Server(uvicorn.Config(application(watched), log_config=None, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", watched
        finally:
            server.should_exit = True
            thread.join()


async def get(url: str, **headers: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


def test_the_server_sends_what_changed_to_those_who_name_this_machine(tmp_path):
    made(tmp_path / "a")
    hostile(tmp_path)

    def ask(path: str, **headers: str) -> tuple[int, str]:
        return asyncio.run(get(url + path, **headers))

    with served(tmp_path) as (url, watched):
        assert ask("/")[0] == 200
        first = json.loads(ask("/data")[1])
        assert len(first["runs"]) == 2
        since = f"/data?since={first['version']}&server={first['server']}"
        watched._next = 0
        again = json.loads(ask(since)[1])
        assert again["runs"] == [] and len(again["order"]) == 2
        lines(tmp_path / "a" / "metrics.jsonl", [50])
        watched._next = 0
        (changed,) = json.loads(ask(since)[1])["runs"]
        assert changed["name"] == "a" and changed["curves"]["loss"][0][-1] == 50
        # Another server before: all is new.
        assert len(json.loads(ask(f"/data?since={first['version']}&server=x")[1])["runs"]) == 2
        (evil,) = (run for run in first["runs"] if run["report"])
        assert ask("/" + evil["report"]) == (200, '<a href="/">all</a>')
        for path in ("/report/a", "/report/..%2F..%2Fetc%2Fpasswd", "/report/a%2F..%2Fa"):
            assert ask(path)[0] == 404
        for path in ("/", "/data", "/" + evil["report"]):
            assert ask(path, Host="evil.example")[0] == 403
            assert ask(path, Host="evil.example:80")[0] == 403
            assert ask(path, Host="localhost:1")[0] == ask(path, Host="[::1]:1")[0] == 200


def test_serving_tells_where_and_ends_by_ctrl_c(tmp_path, start_cli):
    made(tmp_path / "a")
    process = start_cli("espalier.commands.runs", tmp_path, "--serve", "--port", 0)
    line = process.stdout.readline()
    assert line.startswith("1 runs of ") and "http://127.0.0.1:" in line, line
    (url,) = re.findall(r"http://\S+", line)

    async def while_asked() -> None:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/data") as answer:
            assert json.loads(await answer.text())["live"]
            # With the connection open.
            process.send_signal(signal.SIGINT)

    asyncio.run(while_asked())
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "ended\n", "")


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path):
    """The page of a file, on a phone: sort, filter, choose, log axes, values by keyboard; nothing of a run is run."""
    folder = tmp_path / "runs"
    for name, rate in (("low", 0.001), ("high", 0.01), ("中文", 0.003)):
        made(folder / name, config={"optimizer": {"learning_rate": rate}})
    made(folder / "tagger", config={"task": "token_classification"})
    evil = hostile(folder)
    found = Folder(folder)
    found.look()
    path = write(found, tmp_path / "runs.html")

    async def look() -> None:
        async with page(tmp_path / "profile", 380) as browser:
            texts = "(selector => [...document.querySelectorAll(selector)].map(node => node.textContent))"
            names = "[...document.querySelectorAll('#table tbody tr')].map(row => row.dataset.run)"
            await browser.open(path.as_uri())
            assert await browser.evaluate("document.documentElement.scrollWidth") <= 380
            await browser.evaluate("window.evil = () => { window.ran = true; }")
            await browser.click("[data-sort=name]")
            assert set(await browser.evaluate(names)) == {"high", "low", "tagger", "中文", evil.name}
            by_name = await browser.evaluate(names)
            await browser.click("[data-sort=name]")
            assert await browser.evaluate(names) == by_name[::-1]
            await browser.type("#filter", "learning_rate=0.01")
            assert await browser.evaluate(names) == ["high"]
            await browser.type("#filter", "masked_lm")
            assert set(await browser.evaluate(names)) == {"high", "low", "中文"}
            await browser.click("#all")
            assert await browser.evaluate("document.querySelectorAll('#charts figure path.curve').length >= 3")
            assert await browser.evaluate(f"{texts}('#legend li').sort()") == ["high", "low", "中文"]
            assert await browser.evaluate(f"{texts}('#differ tbody th')") == ["optimizer.learning_rate"]
            assert sorted(await browser.evaluate(f"{texts}('#differ tbody td')")) == ["0.001", "0.003", "0.01"]
            # Values by the keyboard: the last step, then the one before.
            values = "document.querySelector('#charts figure .values').textContent"
            await browser.evaluate("document.querySelector('#charts svg').focus()")
            for key, words in (("End", "step 40"), ("ArrowLeft", "step 30"), ("Home", "step 10")):
                for kind in ("keyDown", "keyUp"):
                    await browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
                assert (await browser.evaluate(values)).startswith(words)
            assert "中文 4" in await browser.evaluate(values)
            await browser.click("#logx")
            assert await browser.evaluate("document.querySelectorAll('#charts figure path.curve').length >= 3")
            await browser.evaluate(
                "document.querySelector('#smooth').value = 0.5; document.querySelector('#smooth').oninput()"
            )
            assert await browser.evaluate("document.querySelectorAll('path.pale').length") >= 3
            # The hostile one, drawn with everything open.
            await browser.type("#filter", "")
            await browser.click("#none")
            assert await browser.evaluate("document.querySelectorAll('#charts path').length") == 0
            box = (
                f"document.querySelector('#table tbody tr[data-run=' + CSS.escape({json.dumps(evil.name)}) + '] input')"
            )
            await browser.evaluate(f"{box}.click()")
            await browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
            await browser.until("document.querySelectorAll('#choices input').length")
            await browser.evaluate("document.querySelectorAll('#choices input').forEach(one => one.click())")
            assert await browser.evaluate("document.querySelector('blockquote').textContent") == (
                "</script><script>evil()</script>" + EVIL
            )
            assert EVIL in await browser.evaluate("document.querySelector('#table').textContent")
            assert await browser.evaluate("document.querySelectorAll('img').length + document.scripts.length") == 2
            assert not await browser.evaluate("window.ran") and not browser.errors
            assert await browser.evaluate("performance.getEntriesByType('resource').length") == 0
            assert await browser.evaluate("document.documentElement.scrollWidth") <= 380

    asyncio.run(look())


@pytest.mark.browser
def test_the_page_follows_a_run_that_goes_on(tmp_path):
    folder = tmp_path / "runs"
    made(folder / "before")

    async def look(url: str, watched: Watched) -> None:
        async with page(tmp_path / "profile", 1200) as browser:
            await browser.open(url + "/")
            assert await browser.evaluate("document.querySelectorAll('#going > div').length") == 0
            run = RunDirectory(folder / "now <b>")
            with run.writing(CONFIG):
                lines(run.metrics, [10])
                await browser.until("document.querySelector('#going > div')")
                card = "document.querySelector('#going > div').textContent"
                assert "now <b>step 10 of 40" in await browser.evaluate(card)
                curves = "document.querySelectorAll('#charts figure circle, #charts figure path.curve').length"
                assert await browser.evaluate(curves) > 0, "it is drawn as it appears"
                # The page stays as its reader has set it.
                await browser.evaluate("document.querySelector('#logy').click()")
                await browser.type("#filter", "now")
                lines(run.metrics, [20, 30])
                await browser.until(f"{card}.includes('step 30 of 40')")
                assert await browser.evaluate("document.activeElement.id") == "filter"
                assert await browser.evaluate("document.querySelectorAll('#table tbody tr').length") == 1
                assert await browser.evaluate("document.querySelector('progress').value") == 30
            run.summary.write_text(json.dumps({"step": 30, "finished": False, "stopped_by": 2}))
            await browser.until("!document.querySelector('#going > div')")
            assert "by Ctrl-C" in await browser.evaluate("document.querySelector('#table tbody').textContent")
            assert not browser.errors
            assert watched.folder.runs["now <b>"].log.bytes_read == run.metrics.stat().st_size

    with served(folder) as (url, watched):
        asyncio.run(look(url, watched))
