"""The pages of docs/: their commands are understood by the commands' own parsers, their paths exist, and the site holds
every page and every public name."""

import contextlib
import functools
import http.server
import importlib
import importlib.util
import inspect
import io
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import threading
import tomllib

import pytest

import espalier
from espalier import cli, library_log
from espalier.__main__ import commands
from espalier.commands import evaluate
from espalier.task import TASKS, find

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
MODULES = {command.name: command for command in commands()}


def commands_of(page: str) -> list[list[str]]:
    """Names of commands with their arguments, from blocks of code and from code in lines; those with `…` are parts."""
    blocks = re.findall(r"^ *```(?:bash|sh|text|console)?\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(
        r"`(\./launch\.sh [^`]+)`", re.sub(r"^ *```.*?^ *```$", "", page, flags=re.DOTALL | re.MULTILINE)
    )
    # In a line, a command without flags is only spoken of.
    lines += [line for line in inline if "--" in line]
    found = []
    for line in lines:
        line = re.sub(r"\$seed\b|\$\{seed\}", "0", line.strip())
        # What starts a run on other machines has the arguments of launch.sh behind its own.
        started = re.match(
            r"(?:\$ )?(?:\w+=\S+ )*"
            r"(?:\./launch\.sh|espalier|sbatch \S+/run\.sh|python3 -m cluster\.\w+ run .* --)(?: (.*))?$",
            line,
        )
        if not started:
            continue
        words = shlex.split(started[1] or "", comments=True)
        for end in ("|", ">", "&&", ">>", "&", "2>&1", ";"):
            words = words[: words.index(end)] if end in words else words
        if words and "…" not in " ".join(words) and words[0] in MODULES:
            found.append(words)
    return found


COMMANDS = {name: found for name, page in PAGES.items() if (found := commands_of(page))}


class Understood(Exception):
    """The arguments are a configuration."""


def understand(words: list[str], monkeypatch) -> None:
    """Parse a command as its program does, and run nothing."""
    name, *arguments = words
    # A function of the user's, which is not here, and a word that stands for any preset.
    if arguments and (arguments[0] in ("PRESET", "TASK") or re.fullmatch(r"[\w/]+\.py:\w+", arguments[0])):
        arguments[0] = {"plan": "mlm-debug", "finetune": "classify"}.get(name, "debug")
    if "--from-config" in arguments or arguments[:1] in (["--help"], ["-h"]):
        return
    command = MODULES[name]
    found = importlib.util.find_spec(command.module)
    assert found
    if found.submodule_search_locations:
        found = importlib.util.find_spec(f"{command.module}.__main__")
    monkeypatch.setattr(sys, "argv", [name, *command.before, *arguments])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if name == "evaluate":
                evaluate.command(arguments)  # the module whose `described` is replaced
            else:
                runpy.run_path(str(found.origin), run_name="__main__")
    except Understood:
        return
    except SystemExit as end:
        # --print-config and --help end well.
        assert not end.code, f"{shlex.join(words)}: {said.getvalue()}"


@pytest.mark.parametrize("page", COMMANDS)
def test_every_command_is_understood(page, monkeypatch, tmp_path):
    """By the parser of the command itself; no model is loaded and nothing is trained."""

    def understood(*arguments):
        raise Understood

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_take_the_terminal", lambda: None)
    monkeypatch.setattr(library_log, "begin", lambda: None)
    monkeypatch.setattr(cli, "_call", understood)
    for words in COMMANDS[page]:
        if words[0] in ("evaluate", "look"):
            # Which flags there are may depend on the model: those of one of the tasks must fit.
            assert any(fits(words, task, monkeypatch) for task in TASKS), words
        else:
            understand(words, monkeypatch)


def fits(words: list[str], task: str, monkeypatch) -> bool:
    """Whether a command takes these arguments for a model of this task."""
    monkeypatch.setattr(evaluate, "described", lambda config: ({"task": task}, find(task).head))
    try:
        understand(words, monkeypatch)
    except AssertionError:
        return False
    return True


def test_there_are_commands():
    assert {"cookbook/clinical-notes.md", "cookbook/v5e-weekend.md", "start.md"} <= COMMANDS.keys()
    assert sum(map(len, COMMANDS.values())) > 60


def test_flags_in_the_tables_of_the_cookbook_exist():
    """What a table names as ours is a flag of a training command."""
    from espalier.flags import flags_of

    accepted = set()
    for name in ("mlm.pretrain", "clm.pretrain", "finetune.train", "espalier.commands.plan.settings"):
        for preset in importlib.import_module(name).PRESETS.values():
            accepted |= flags_of(type(preset())).keys()
    groups = {flag.rsplit(".", 1)[0] + ".*" for flag in accepted if "." in flag}
    for name, page in PAGES.items():
        if not name.startswith("cookbook/"):
            continue
        theirs = 0 if "from-" in name else None
        for line in re.findall(r"^\|.*\|$", page, re.MULTILINE):
            cells = line.strip("|").split(" | ")
            ours = cells[1:] if theirs == 0 else cells
            for flag in re.findall(r"`(--[a-z][\w.*-]*[\w*])", " ".join(ours)):
                known = accepted | groups | {"--mesh", "--model", "--print-config", "--output"}
                assert flag in known, f"{name}: {flag}"


@pytest.mark.parametrize("name", PAGES)
def test_every_path_and_link_exists(name):
    page = PAGES[name]
    for path in re.findall(r"`((?:mlm|clm|finetune|espalier|sharding|cluster|tests|docs)/[\w/.-]*\w)`", page):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"(?<!!)\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)", page):
        assert ((DOCS / name).parent / link).exists(), f"{name}: {link}"


def test_every_task_has_a_page():
    overview = PAGES["tasks/index.md"]
    for path in (DOCS / "tasks").glob("*.md"):
        assert path.name == "index.md" or f"({path.name})" in overview, path.name
    from finetune.train import PRESETS

    # `translate` and its like are presets of `instruct`, and stand there.
    pages = "".join(page for name, page in PAGES.items() if name.startswith("tasks/"))
    toys = {"demo", "classify-debug"}
    assert not [
        preset for preset in PRESETS.keys() - toys if f"`{preset}`" not in pages and f"finetune {preset}" not in pages
    ]


@pytest.fixture(scope="module")
def site_tools():
    """docs/site/build.py and api.py, which are no package."""
    sys.path.insert(0, str(DOCS / "site"))
    yield importlib.import_module("build"), importlib.import_module("api")
    sys.path.remove(str(DOCS / "site"))


def test_the_api_page_holds_every_public_name(site_tools):
    page = site_tools[1].api_page()
    for name in espalier.__all__:
        assert f"\n## {name}\n" in page, name
    methods = [name for name, found in vars(espalier.LoadedModel).items() if not name.startswith("_")]
    fields = {name for name in methods if not callable(getattr(espalier.LoadedModel, name)) and name != "longest"}
    assert len(methods) > 10
    for name in methods:
        assert f"### LoadedModel.{name}\n" in page or name in fields and f"| `{name}` |" in page, name
    first = inspect.getdoc(espalier.LoadedModel.embed)
    assert first and first.splitlines()[0].split("[")[0] in page


def test_every_page_is_in_the_navigation(site_tools, tmp_path):
    build = site_tools[0]
    assert build.stage(tmp_path) == []
    settings = tomllib.loads((tmp_path / "zensical.toml").read_text())
    listed = [page for section in settings["project"]["nav"] for pages in section.values() for page in pages]
    assert sorted(listed) == sorted([*PAGES, "api.md"]) and listed[:2] == ["index.md", "start.md"]
    # Links out of docs/ are paths there, and nothing else is changed.
    for name in PAGES:
        assert not re.search(
            r"\]\((?:\.\./)+(?:README|AGENTS|espalier|cluster)", (tmp_path / "pages" / name).read_text()
        )


def test_what_github_and_the_site_read_differently_is_found(site_tools):
    page = "A list:\n- one\n- two\n\nand\n| a |\n|---|\n\n$x^2$ `$HOME` costs $5.\n```\n- $y$\n```\n```mermaid\n```\n"
    found = [line for line, _ in site_tools[0].read_differently(page)]
    assert found == [2, 6, 9, 10, 13]


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_the_site_finds_words_and_loads_nothing_from_elsewhere(tmp_path):
    """Built strictly; English and Chinese words are found by typing."""
    import asyncio

    import browser

    site = tmp_path / "site"
    command = [sys.executable, str(DOCS / "site" / "build.py"), "--output", str(site)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    assert len(list(site.rglob("*.html"))) >= len(PAGES) + 1
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", path.read_text())
        assert not loaded, (path, loaded)

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/index.html"
    links = "[...document.activeElement.shadowRoot.querySelectorAll('a')].map(a => a.href)"
    elsewhere = "performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.includes('//127.0.0.1:'))"

    async def look() -> None:
        async with browser.page(tmp_path / "profile", width=1280, height=900) as page:
            for words, target in (("preempted", "cookbook"), ("similarity", "api.html"), ("语料", "start.html")):
                await page.open("about:blank")
                await page.open(home)
                await page.evaluate("document.querySelector('.md-search__button').click()")
                await page.until("document.activeElement.shadowRoot?.activeElement?.matches('input')")
                await page.call("Input.insertText", text=words)
                await page.until(f"{links}.some(h => h.includes({target!r}))")
            assert await page.evaluate(elsewhere) == []
            assert page.errors == []

    try:
        asyncio.run(look())
    finally:
        server.shutdown()
        server.server_close()
