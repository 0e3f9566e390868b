"""Pages show text of models, data and runs as text: nothing of it runs in a real browser, and a server of ours answers
nobody but its own page and programs."""

import asyncio
import contextlib
import html.parser
import json
import pathlib
import re
import socket
import threading
import types
from typing import Any, cast

import aiohttp
import numpy as np
import pytest
import uvicorn
from browser import page as browser_page

from espalier import progress
from espalier.errors import UserError
from espalier.exits import one_line_errors
from espalier.look.attention import Attention
from espalier.look.attribution import Attribution
from espalier.look.lens import Lens
from espalier.look.sections import attention, attribution, drawn, lens
from espalier.page_policy import content_policy, guarded, meta
from espalier.predict.use import Use
from espalier.report import page
from espalier.report.card import model_card
from espalier.report.inline import Page
from espalier.report.page import Section
from espalier.report.render import write_report
from espalier.runs.app import Watched
from espalier.runs.app import application as runs_application
from espalier.runs.folder import Folder
from espalier.runs.page import write
from espalier.serve.app import Limits
from espalier.serve.app import application as serve_application
from espalier.serve.batching import Batcher

RUN = "document.documentElement.dataset.ran=1"
EVIL = "".join((
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"\"><img src=x onerror=\"{RUN}\">",
    f"'><svg onload='{RUN}'>",
    f"</title></style></textarea></noscript><img src=x onerror={RUN}>",
    f"\u2028{RUN}\u2029{RUN}//",
    f"*/{RUN};/*`${{{RUN}}}`",
    f"<a href=javascript:{RUN}>x</a>",
    f"<!--<script>{RUN}",
))  # fmt: skip
"""Whatever context it stands in, one of these would run there."""
LINK = f"javascript:{RUN}"
METRICS = {"accuracy": 0.5, "f1": 0.5, EVIL: 0.5}
PREDICTIONS = {
    "sequence_classification": [{"text": EVIL, "text_b": EVIL, "label": EVIL, "prediction": LINK, "probability": 0.9}],
    "rationale": [{"text": EVIL, "label": EVIL, "prediction": LINK, "probability": 0.9,
                   "words": [{"text": EVIL[:9], "begin": 0, "end": 9}]}],
    "concepts": [{"text": EVIL, "label": EVIL, "prediction": LINK, "probability": 0.9, "concepts": {EVIL: 0.5}}],
    "token_classification": [{"tokens": [EVIL, LINK], "tags": ["O", f"B-{EVIL}"], "prediction": [f"B-{EVIL}", "O"],
                              "spans": [{"type": EVIL, "begin": 0, "end": 1, "text": EVIL, "score": 0.9}]}],
    "multiple_choice": [{"question": EVIL, "choices": [EVIL, LINK], "label": 0, "prediction": 1, "probability": 0.9,
                         "log_likelihoods": [-1.0, -2.0]}],
    "ranking": [{"query_id": EVIL, "query": EVIL, "ndcg@10": 0.5,
                 "ranking": [{"text_id": EVIL, "text": EVIL, "score": 0.5, "relevance": 1}]}],
    "preference": [{"prompt": EVIL, "chosen": EVIL, "rejected": LINK, "logprob_chosen": -1.0,
                    "logprob_rejected": -2.0}],
    "reward": [{"prompt": EVIL, "chosen": EVIL, "rejected": LINK, "score_chosen": 1.0, "score_rejected": 0.5}],
    "sentence_embedding": [{"query": EVIL, "positive": EVIL, "nearest": EVIL, "rank": 3, "cosine": 0.5,
                            "nearest_cosine": 0.5}],
    "question_answering": [{"id": EVIL, "question": EVIL, "context": EVIL, "answers": [EVIL[9:12]], "begins": [9],
                            "answer": EVIL[:5], "score": 0.5, "begin": 0, "end": 5, "n_best": [], "em": 0, "f1": 0}],
    "instruction_tuning": [{"prompt": EVIL, "reference": EVIL, "prediction": EVIL}],
    "reinforcement": [{"prompt": EVIL, "answer": EVIL, "prediction": EVIL, "rewards": [0.5, 1.0], "solved": 1}],
}  # fmt: skip
ROLLOUTS = [{"step": 1, "which": EVIL, "prompt": EVIL, "completion": LINK, "reward": 0.5, "tokens": 3, "ended": False}]
FILES = {
    "masked_lm": {"samples": {"samples": [{"tokens": [EVIL, LINK], "masked": [
        {"index": 1, "truth": EVIL, "guesses": [[EVIL, 0.5], [LINK, 0.1]]}]}]}},
    "causal_lm": {"samples": {"texts": [EVIL, LINK]}},
    "sequence_classification": {"confusion": {"labels": [EVIL, LINK], "matrix": [[1, 2], [3, 4]]}},
    "concepts": {"concepts": {"concepts": [EVIL], "classes": [EVIL, LINK], "weights": [[0.5, -0.5]]}},
    "token_classification": {"types": {"scheme": EVIL, "types": [
        {"name": EVIL, "precision": 0.5, "recall": 0.5, "f1": 0.5, "right": 1, "predicted": 2}]}},
    "multiple_choice": {"paradigms": {EVIL: 0.5}},
}  # fmt: skip
FEATURES = [{"feature": 1, "density": 0.1, "mean": 0.5, "greatest": 1.0, "words": [[EVIL, 0.5]], "texts": [
    {"tokens": [EVIL, LINK], "values": [0.5, 1.0]}]}]  # fmt: skip
TASKS = sorted({*PREDICTIONS, *FILES, "masked_lm_autoencoder"})


def hostile_run(folder: pathlib.Path, task: str) -> pathlib.Path:
    """A run of a task, every text of which is an attack: names, settings, labels, metrics, predictions."""
    folder.mkdir(parents=True)
    config = {
        "task": task, "head": task, "model": {"model_type": EVIL, EVIL: EVIL}, "data": {"files": [EVIL, LINK]},
        "labels": [EVIL, LINK], "command": f"a\n```\nSECOND {EVIL}", "init_from": LINK, "steps": 2,
        EVIL: LINK, "long": EVIL * 9,
        "user_code": {"objective": {"name": EVIL, "file": EVIL, "sha256": "0"}}, "fingerprints": {EVIL: EVIL},
    }  # fmt: skip
    summary = {"step": 2, "finished": True, "eval": METRICS, "metrics": METRICS, "data": {EVIL: EVIL},
               "environment": {EVIL: EVIL}, "best": {"metric": EVIL, "step": 1, "ended": False}}  # fmt: skip
    rows = [{"name": EVIL, "value": 0.5, "note": EVIL}, {"name": LINK, "value": 0.4}]
    files = {"config": config, "summary": summary, "comparison": {"title": EVIL, "note": EVIL, "rows": rows}}
    for name, value in (files | FILES.get(task, {})).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    lines = {"predictions.jsonl": PREDICTIONS.get(task, []), "features.jsonl": FEATURES if "auto" in task else []}
    lines["rollouts.jsonl"] = ROLLOUTS if task == "reinforcement" else []
    lines["metrics.jsonl"] = [{"step": 1, "loss": 2.0, EVIL: 1.0, f"eval/{EVIL}": 1.0}, {"step": 2, "loss": 1.0}]
    for name, values in lines.items():
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    (folder / "failure.json").write_text(json.dumps({"error": EVIL}))
    return folder


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def harmless(text: str) -> None:
    """No element, attribute or address that an attack has brought."""
    for tag, attributes in Elements(text).found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src", "action", "formaction"):
            assert not (attributes.get(name) or "").strip().lower().startswith("javascript:")
        assert attributes.get("src") != "x"
        assert tag not in ("iframe", "object", "embed", "base", "form", "link", "textarea")


def looked_into() -> str:
    """The page of `look` with hostile tokens."""
    tokens = [EVIL, LINK, "a"]
    words = [(at, at + 1) for at in range(len(tokens))]
    asked = cast(Any, types.SimpleNamespace(tokens=tokens, words=words, texts=tokens, name=EVIL))
    maps = Attention(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)), np.ones((3, 3)))
    each = {name: np.array([0.5, -0.5, 0.1]) for name in attribution.METHODS}
    kept = {name: np.linspace(0, 1, 4) for name in ("integrated_gradients", "occlusion", "gradient_x_input", "random")}
    why = Attribution(each, kept, kept, EVIL, 1.0, 0.0, 8, 0.001)
    tokenizer = cast(Any, types.SimpleNamespace(decode=lambda ids: EVIL))
    ones = np.ones((2, 3))
    read = Lens(np.array([0.1, 0.9]), np.arange(3), np.zeros((2, 3, 2), int), np.ones((2, 3, 2)) / 2, ones, ones, False)
    body = drawn.heat(np.ones((1, 2)), [EVIL], [EVIL, LINK], ("{:.1f}",)) + drawn.lines(
        EVIL, {EVIL: np.ones(3)}, (EVIL, EVIL)
    )
    return page.page_of(EVIL, EVIL, [
        attention.section(asked, maps), *attribution.sections(asked, why), lens.section(asked, read, tokenizer),
        Section(EVIL, body, EVIL),
    ])  # fmt: skip


@contextlib.contextmanager
def listening(application):
    """The address of a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(application, log_config=None, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def served_model(answer: dict, host: str = "127.0.0.1"):
    use = Use(name=EVIL, takes=EVIL, reads=lambda row: row, answers=lambda model, rows: [answer] * len(rows),
              example={"text": EVIL})  # fmt: skip
    batcher = Batcher(lambda rows: [answer] * len(rows), most=8, delay=0.0, places=10)
    about = {"use": EVIL, "model": EVIL, "takes": EVIL, "example": {"text": EVIL}}
    try:
        with listening(serve_application(use, batcher, Limits(10_000, 20, 20.0), about, host)) as url:
            yield url
    finally:
        batcher.close()


ANSWER = {
    "label": EVIL, "text": EVIL, "filled": EVIL, "answer": EVIL, "probabilities": {EVIL: 0.5, LINK: 0.5},
    "masks": [[{"token": EVIL, "id": 1, "probability": 0.5}]], "ranking": [{"index": 0, "text": EVIL, "score": 0.5}],
    "tokens": [EVIL], "tags": [EVIL], "spans": [{"type": EVIL, "begin": 0, "end": 3}], EVIL: EVIL,
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_report_and_a_card_hold_what_a_run_says_as_text(tmp_path, task):
    run = hostile_run(tmp_path / "run", task)
    text = write_report(run).read_text(encoding="utf-8")
    harmless(text)
    assert text.count("<script") == 0 and "sandbox=allow-scripts" in Page(text)._repr_html_()
    # In a card, which others render, an attack is text too: escaped, or in a block of code that it cannot end.
    front, card = model_card(run).removeprefix("---\n").split("---\n", 1)
    assert all(re.fullmatch(r"\w+: [\w-]+|tags:|- \w+", line) for line in front.splitlines())
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1\n", "", card)
    assert EVIL[:9] in card and "<" not in outside and "SECOND" not in outside


def test_the_page_of_a_look_holds_words_as_text():
    text = looked_into()
    harmless(re.sub(r"<script type=application/json.*?</script>", "", text, flags=re.S))
    assert text.count("<script") == 2 and text.count("</script>") == 2


@pytest.mark.browser
def test_nothing_of_a_run_a_model_or_its_data_runs_in_a_browser(tmp_path):
    """Every page with every text an attack, while the policies that would stop what got through are switched off."""
    runs = tmp_path / "runs"
    reports = [write_report(hostile_run(runs / task, task)) for task in TASKS]
    (tmp_path / "look.html").write_text(looked_into(), encoding="utf-8")
    # A name of the file system: no slash.
    hostile_run(runs / EVIL[:200].replace("/", "\u2215"), "masked_lm")
    folder = Folder(runs)
    folder.look()
    pages = [*reports, tmp_path / "look.html", write(folder, tmp_path / "runs.html")]
    # Does the test see a script that runs?
    (tmp_path / "open.html").write_text(f"<!doctype html>{meta(content_policy())}<p>{EVIL}")
    (theirs := hostile_run(runs / "theirs", "masked_lm") / "report.html").write_text(f"<!doctype html><p>{EVIL}")
    assert theirs.exists()

    async def visit():
        async with browser_page(tmp_path / "profile") as browser:

            async def ran(url: str) -> bool:
                await browser.open(url)
                await browser.evaluate("new Promise(done => setTimeout(done, 60))")
                return await browser.evaluate("document.documentElement.dataset.ran === '1'")

            await browser.call("Page.enable")
            # With its policy, a page runs no script of others, even if it were not escaped.
            assert not await ran((tmp_path / "open.html").as_uri())
            with listening(runs_application(Watched(Folder(runs)))) as url:
                assert not await ran(f"{url}/report/theirs")
                await browser.call("Page.setBypassCSP", enabled=True)
                assert await ran((tmp_path / "open.html").as_uri()), "what is not escaped is seen to run"
                for path in pages:
                    assert not await ran(path.as_uri()), path
                assert await browser.evaluate("document.body.dataset.rendered") == "1"
                await browser.click("#all")
                await browser.evaluate("[...document.querySelectorAll('details')].forEach(one => one.open = true)")
                assert not await browser.evaluate("document.documentElement.dataset.ran === '1'")
                assert not await ran(url)
                assert EVIL[:9] in await browser.evaluate("document.body.textContent")
            with served_model(ANSWER) as url:
                for address in (
                    url,
                    f"{url}/?text=%3Cscript%3E{RUN}%3C/script%3E%22%3E%3Cimg%20src=x%20onerror={RUN}%3E",
                ):
                    assert not await ran(address)
                    await browser.click("button")
                    await browser.until("document.querySelector('#result').dataset.done")
                    await browser.evaluate("new Promise(done => setTimeout(done, 60))")
                    assert not await browser.evaluate("document.documentElement.dataset.ran === '1'")
                assert EVIL[:9] in await browser.evaluate("document.querySelector('#result').textContent")
            with served_model({"error": EVIL}) as url:
                assert not await ran(f"{url}/?text=a")
            # Our own scripts are the ones that the policies name.
            await browser.call("Page.setBypassCSP", enabled=False)
            for path in (tmp_path / "look.html", tmp_path / "runs.html"):
                await browser.open(path.as_uri())
            assert await browser.evaluate("document.body.dataset.rendered") == "1" and not browser.errors

    asyncio.run(visit())


def asked(url: str, method: str = "GET", data: bytes | None = None, **headers: str) -> tuple[int, str, dict]:
    async def ask():
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, url, headers=given, data=data, allow_redirects=False) as answer,
        ):
            return answer.status, await answer.text(), dict(answer.headers)

    return asyncio.run(ask())


def test_a_server_answers_its_own_page_and_programs_alone(tmp_path):
    row = json.dumps({"text": "a"}).encode()
    hostile_run(tmp_path / "runs" / "a", "masked_lm")
    write_report(tmp_path / "runs" / "a")
    with served_model({"size": 1}) as model, listening(runs_application(Watched(Folder(tmp_path / "runs")))) as runs:
        own = model.removeprefix("http://")
        for address in (model, f"{model}/health", runs, f"{runs}/data", f"{runs}/report/a", f"{runs}/nothing"):
            status, _, headers = asked(address)
            assert status == (404 if "nothing" in address else 200)
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            assert (
                "unsafe-inline" not in policy.replace("style-src 'unsafe-inline'", "") and "unsafe-eval" not in policy
            )
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
            assert "Access-Control-Allow-Origin" not in headers
            # A name that someone else has pointed here.
            for name in ("evil.example", f"evil.example:{own.partition(':')[2]}", "127.0.0.1.evil.example", ""):
                status, text, headers = asked(address, Host=name)
                assert status == 403 and "on its own machine only" in text and "Content-Security-Policy" not in text
            assert asked(address, Host="LOCALHOST:1")[0] == asked(address)[0]
        assert "sandbox;" in asked(f"{runs}/report/a")[2]["Content-Security-Policy"]
        # A form or script of another page; a program has no origin.
        assert asked(f"{model}/predict", "POST", row)[0] == 200
        assert asked(f"{model}/predict", "POST", row, Origin=model)[0] == 200
        for headers in (
            {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"},
            {"Origin": "http://127.0.0.1:1"}, {"Sec_Fetch_Site": "same-site"},
        ):  # fmt: skip
            assert asked(f"{model}/predict", "POST", row, **headers)[0] == 403, headers
        assert asked(f"{model}/predict", "OPTIONS", Origin="https://evil.example")[0] == 403
        # Paths and sizes.
        secret = tmp_path / "secret"
        secret.write_text("secret")
        (tmp_path / "runs" / "b").mkdir()
        for name in ("config.json", "metrics.jsonl"):
            (tmp_path / "runs" / "b" / name).write_text("{}")
        (tmp_path / "runs" / "b" / "report.html").symlink_to(secret)
        for name in (
            "b",
            "..%2F..%2Fsecret",
            "../secret",
            "%2e%2e/secret",
            "a%2F..%2F..%2Fsecret",
            "%2Fetc%2Fpasswd",
            "a%00",
        ):
            status, text, _ = asked(f"{runs}/report/{name}")
            assert status == 404 and "secret" not in text and "root:" not in text
        assert asked(f"{model}/predict", "POST", b'"' + b"a" * 20_000 + b'"')[0] == 413
        assert asked(f"{model}/predict", "POST", b"[" * 9_000)[0] == 400
        assert asked(f"{model}/?x=" + "a" * 200_000)[0] in (400, 414, 431)


def test_on_all_networks_any_name_is_answered_and_other_pages_are_not():
    with served_model({"size": 1}, host="0.0.0.0") as model:
        row = json.dumps({"text": "a"}).encode()
        assert asked(f"{model}/health", Host="gpu-box.example")[0] == 200
        assert asked(f"{model}/predict", "POST", row, Host="gpu-box.example", Origin="http://gpu-box.example")[0] == 200
        assert asked(f"{model}/predict", "POST", row, Host="gpu-box.example", Origin="http://evil.example")[0] == 403


def test_a_terminal_is_steered_by_no_text(capsys):
    """Labels, names of files and what a model writes may hold the sequences that move a cursor or type for the user."""
    for line in ("\x1b]0;title\x07 \x1b[2J\x9b31m\x7f", "one\r\x08two"):
        progress.say(line)
        with pytest.raises(SystemExit), one_line_errors(False):
            raise UserError(f"{line} is wrong")
    said = capsys.readouterr()
    assert "\\x1b]0;title\\x07" in said.out and "\\x9b31m" in said.err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said.out + said.err)


def test_by_default_a_server_listens_on_this_machine_alone():
    from espalier.commands.runs import RunsConfig
    from espalier.commands.serve import ServeConfig

    assert ServeConfig("run").host == RunsConfig("runs").host == "127.0.0.1"
    assert guarded(None, "127.0.0.1")
