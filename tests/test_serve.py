"""`serve`: many clients at once, nothing compiled after the start, limits, and the page in a real browser."""

import asyncio
import contextlib
import dataclasses
import json
import signal
import socket
import threading
import time

import aiohttp
import jax
import numpy as np
import pytest
import uvicorn
from browser import page
from tiny_models import BERT, random_params

import espalier
from espalier import cli
from espalier.commands import serve
from espalier.commands.serve import ServeConfig, batcher_of, example_of, warm_up
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.hub import save_pretrained
from espalier.predict.outputs import Shapes
from espalier.predict.use import Use, find
from espalier.serve.app import Limits, application
from espalier.serve.batching import Batcher

TEXT = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun 巴黎是法国的首都 "
WORDS = TEXT.split()
LIMITS = Limits(10_000, 20, 20.0)
KINDS = {
    "classify": ("sequence_classification", ("cat", "dog", "fox")),
    "tag": ("token_classification", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")),
    "answer": ("question_answering", ()),
    "fill": ("masked_lm", ()),
    "embed": ("embedding", ()),
}
"""Name of a use → head and labels of its model."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of each kind in a folder of Hugging Face format, made when it is asked for."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([TEXT * 20], "wordpiece", 300)

    def made(kind: str) -> str:
        head, labels = KINDS[kind]
        if not (root / kind).exists():
            config = dataclasses.replace(BERT, vocab_size=vocabulary_size(tokenizer), labels=labels)
            params = random_params(config, (head,))
            save_pretrained(root / kind, config, params, tokenizer, head=head)
        return f"hf:{root / kind}"

    return made


@contextlib.contextmanager
def served(use: Use, batcher: Batcher, limits: Limits = LIMITS):
    """The address of a server in a thread."""
    app = application(use, batcher, limits, {"use": use.name, "model": "tiny", "example": use.example})
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            batcher.close()


async def post(url: str, body, session: aiohttp.ClientSession | None = None):
    """(status, JSON) of POST /predict. body: JSON values, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with contextlib.AsyncExitStack() as stack:
        session = session or await stack.enter_async_context(aiohttp.ClientSession())
        async with session.post(f"{url}/predict", data=data) as answer:
            return answer.status, await answer.json()


def canned(answers, name="canned", **example) -> Use:
    return Use(name=name, takes="text", reads=lambda row: row, answers=answers, example=example or {"text": "a"})


def test_64_clients_at_once_get_what_each_gets_alone(models):
    """Texts and pairs of many lengths, single rows and lists; together they are answered in fewer batches."""
    model = espalier.load(models("classify"))
    use = find("sequence_classification")
    generator = np.random.default_rng(0)

    def row() -> dict:
        texts = (" ".join(generator.choice(WORDS, generator.integers(1, 60))) for _ in range(2))
        return dict(zip(("text", "text_b"), texts, strict=True)) if generator.random() < 0.3 else {"text": next(texts)}

    asked = [[row() for _ in range(generator.integers(1, 5))] for _ in range(64)]
    batcher, _ = batcher_of(model, use, 0.01)
    warm_up(batcher, use, example_of(model, use))

    async def client(url, session, rows):
        return [await post(url, rows, session), *[await post(url, one, session) for one in rows]]

    async def clients(url):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(client(url, session, rows) for rows in asked))

    with served(use, batcher) as url:
        found = asyncio.run(clients(url))
    expected_of_all = iter(use.answers(model, [use.reads(one) for rows in asked for one in rows]))
    for rows, (whole, *single) in zip(asked, found, strict=True):
        want = [next(expected_of_all) for _ in rows]
        assert whole[0] == 200 and {status for status, _ in single} == {200}
        for one, alone, expected in zip(whole[1], [result for _, result in single], want, strict=True):
            assert one["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
            assert alone["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    rows = sum(map(len, asked))
    assert batcher.answered == 2 * rows and batcher.batches < rows


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_after_the_start(models, kind):
    """For rows of every length, alone and many together."""
    model = espalier.load(models(kind))
    use = find(KINDS[kind][0])
    compiled: list[str] = []
    batcher, shapes = batcher_of(model, use, 0.0)
    warm_up(batcher, use, example_of(model, use))

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        sizes = [1, 2, 7, 20, 33, 40] if kind == "fill" else [1, 2, 7, 20, 33, 60, 200]
        rows = []
        for size in sizes:
            text = " ".join((WORDS * 20)[:size])
            rows.append({"text": f"[MASK] {text}", "question": "the fox", "context": text, "top_k": 1 + size})
        for count in (1, 3, 9, 40):
            for found in batcher.ask([use.reads(row) for row in (rows * count)[: max(count, len(rows))]]).result():
                assert not isinstance(found, UserError), found
        for row in rows:
            batcher.ask([use.reads(row)]).result()
        assert not compiled
        jax.jit(lambda x: x * 3.5)(np.float32(len(kind)))
        assert compiled, "compilations are counted"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        batcher.close()
    assert len(shapes.all()) <= 20


def test_shapes_are_few_and_hold_what_they_must():
    shapes = Shapes([16, 32, 512], (1, 8, 32))
    assert shapes.all() == [(1, 16), (8, 16), (32, 16), (1, 32), (8, 32), (32, 32), (1, 512), (8, 512)]
    assert [shapes.length(tokens) for tokens in (1, 16, 17, 512, 513)] == [16, 16, 32, 512, None]
    assert [shapes.rows(count, 16) for count in (1, 2, 8, 9, 32)] == [1, 8, 8, 32, 32]


def test_what_waits_together_is_answered_together():
    """While a batch is computed the next ones gather; what was given up is not computed."""
    started, go, calls = threading.Event(), threading.Event(), []

    def answer(inputs):
        calls.append(list(inputs))
        started.set()
        go.wait(10)
        if "bad" in inputs:
            raise RuntimeError("broken")
        return [one.upper() for one in inputs]

    batcher = Batcher(answer, most=4, delay=0.0, places=10)
    first = batcher.ask(["a"])
    started.wait(10)
    second, given_up, third = batcher.ask(["b", "c"]), batcher.ask(["x"]), batcher.ask(["d"])
    assert given_up.cancel()
    late = batcher.ask(["bad"])
    go.set()
    assert [future.result(10) for future in (first, second, third)] == [["A"], ["B", "C"], ["D"]]
    with pytest.raises(RuntimeError):
        late.result(10)
    batcher.close()
    assert calls == [["a"], ["b", "c", "d"], ["bad"]]


def test_limits_and_bad_requests():
    """Each with its status and one line of JSON; the server goes on."""

    def slow(model, inputs):
        if any(one.get("text") == "slow" for one in inputs):
            time.sleep(1)
        if any(one.get("text") == "bug" for one in inputs):
            raise RuntimeError("a bug")
        if any(one.get("text") == "bad" for one in inputs):
            raise UserError("no such text")
        return [{"size": len(one["text"])} for one in inputs]

    def reads(row):
        if "text" not in row:
            raise UserError("no text")
        return row

    use = dataclasses.replace(canned(slow), reads=reads)
    batcher, _ = batcher_of(type("Model", (), {"longest": 16})(), use, 0.0)
    with served(use, batcher, Limits(1000, 3, 0.3)) as url:
        ask = lambda body: asyncio.run(post(url, body))  # noqa: E731
        assert ask({"text": "人们"}) == (200, {"size": 2})
        assert ask([]) == (200, [])
        assert ask([{"text": "a"}, {}, {"text": "bad"}, 3][:3]) == (
            200, [{"size": 1}, {"error": "no text"}, {"error": "no such text"}],
        )  # fmt: skip
        assert ask({}) == (422, {"error": "no text"})
        assert ask(3)[0] == 422 and ask("a")[0] == 422
        assert ask([{"text": "a"}] * 4)[0] == 413
        assert ask({"text": "a" * 2000})[0] == 413
        assert ask(b"\xff")[0] == 400 and ask(b"{")[0] == 400 and ask(b'{"text": "\\ud800"}')[0] == 400
        status, found = ask({"text": "slow"})
        assert status == 504 and "0.3 s" in found["error"]
        time.sleep(1)
        assert ask({"text": "abc"}) == (200, {"size": 3})

        async def others():
            async with aiohttp.ClientSession() as session:
                async with session.get(f"{url}/health") as answer:
                    health = await answer.json()
                async with session.get(f"{url}/none") as answer:
                    none = answer.status
                async with session.get(f"{url}/predict") as answer:
                    return health, none, answer.status

        health, *statuses = asyncio.run(others())
        assert health["status"] == "ok" and health["use"] == "canned" and statuses == [404, 405]
        status, found = ask({"text": "bug"})
        assert status == 500 and "RuntimeError" in found["error"]
        assert ask({"text": "abc"}) == (200, {"size": 3})


def test_the_command_starts_tells_where_and_ends_by_ctrl_c(models, start_cli):
    process = start_cli("espalier.commands.serve", models("fill"), "--port", 0, "--json")
    line = ""
    while "http://" not in line:
        line = process.stdout.readline()
        assert line, process.stderr.read()
    url = line.split()[1]
    status, found = asyncio.run(post(url, {"text": "the [MASK] dog", "top_k": 2}))
    assert status == 200 and len(found["masks"][0]) == 2
    port = url.rpartition(":")[2]
    other = start_cli("espalier.commands.serve", models("fill"), "--port", port)
    out, err = other.communicate(timeout=60)
    assert other.returncode == 2 and f"cannot listen on 127.0.0.1 port {port}" in err and "try --port 0" in err
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "1 rows were answered in 1 batches" in out and err == ""
    assert json.loads(out.splitlines()[-1]) == {"use": "fill", "rows": 1, "batches": 1}


def test_a_decoder_that_was_tuned_by_a_template_is_asked_for_its_fields():
    tuned = type("Model", (), {"saved": {"data": {"template": "{source} = {target}"}}})()
    other = type("Model", (), {"saved": {}})()
    assert [list(example_of(model, find("causal_lm"))) for model in (tuned, other)] == [["source"], ["prompt"]]


def test_what_is_missing_is_said_in_one_line(models, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    for arguments, words in [
        ([models("fill")], "serve needs uvicorn, which is not installed; `./launch.sh python -m pip install"),
        ([models("fill"), "--port", "70000"], "port=70000 must lie between 0 and 65535"),
    ]:
        with pytest.raises(SystemExit) as ended:
            cli.run_config(serve.main, ServeConfig, prog="serve", argv=arguments)
        assert ended.value.code == 2 and words in capsys.readouterr().err


EMOJI = "😀 Anna 去了巴黎"
SPANS = [{"type": "PER", "begin": 2, "end": 6}, {"type": "LOC", "begin": 9, "end": 11}]
RESULTS = {
    "classify": ({"text": "a"}, {"label": "<b>cat</b>", "probabilities": {"<b>cat</b>": 0.9, "dog": 0.1}}),
    "tag": ({"text": EMOJI}, {"tokens": [], "tags": [], "spans": SPANS}),
    "answer": ({"question": "谁?", "context": EMOJI}, {"answer": "Anna", "begin": 2, "end": 6, "score": 0.5}),
    "rank": ({"query": "q", "texts": ["one", "two"]}, {"ranking": [{"index": 1, "text": "two", "score": 0.75}]}),
    "score": ({"prompt": "p", "texts": ["one", "two"]}, {"ranking": [{"index": 1, "text": "two", "score": 0.75}]}),
    "embed": ({"text": "a"}, {"embedding": [0.5, -0.25]}),
    "fill": ({"text": "a"}, {"filled": "the cat", "masks": [[{"token": "cat", "id": 1, "probability": 0.5}]]}),
    "choose": (
        {"question": "a", "choices": ["one", "two"]},
        {"label": 1, "choice": "two", "probability": 0.75, "probabilities": [0.25, 0.75]},
    ),
    "generate": ({"prompt": "a"}, {"text": "once upon\na time"}),
}
"""Name of a use → an example of its rows, and a result."""
SHOWN = {
    "classify": ["<b>cat</b>", "90.0 %", "10.0 %"],
    "tag": [f"{EMOJI[:2]}AnnaPER 去了巴黎LOC"],
    "answer": ["Anna", EMOJI, "score 0.5000"],
    "rank": ["two0.7500"],
    "score": ["two0.7500"],
    "embed": ["2 numbers: 0.5000, -0.2500"],
    "fill": ["the cat", "50.0 %"],
    "choose": ["two75.0 %", "one25.0 %"],
    "generate": ["once upon\na time"],
}


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path):
    """Fields are typed into and a button is clicked, on a screen of a phone's size, for every kind of result."""

    async def look(name: str, url: str, asked: list, browser) -> None:
        await browser.open(url)
        width = await browser.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, "the page is no wider than the screen"
        example, result = RESULTS[name]
        field = next(iter(example))
        await browser.type(f"textarea[name={field}]", EMOJI)
        await browser.click("button")
        await browser.until("document.querySelector('#result').dataset.done")
        text = await browser.evaluate("document.querySelector('#result').textContent")
        for words in SHOWN[name]:
            assert words in text, (name, text)
        marks = await browser.evaluate(
            "[...document.querySelectorAll('mark')].map(mark => mark.firstChild.textContent)"
        )
        assert marks == {"tag": ["Anna", "巴黎"], "answer": ["Anna"]}.get(name, [])
        assert asked == [{**example, field: EMOJI}]
        details = await browser.evaluate("JSON.parse(document.querySelector('pre').textContent)")
        assert details == result and not browser.errors
        await browser.picture(tmp_path / f"{name}.png")

    async def all_of_them() -> None:
        async with page(tmp_path / "profile") as browser:
            for name, (example, result) in RESULTS.items():
                asked: list = []
                use = canned(
                    lambda model, inputs, r=result, a=asked: a.extend(inputs) or [r] * len(inputs), name, **example
                )
                batcher, _ = batcher_of(type("Model", (), {"longest": 16})(), use, 0.0)
                with served(use, batcher) as url:
                    await look(name, url, asked, browser)
            # An address that holds what to ask; and what cannot be answered.
            refuse = canned(lambda model, inputs: (_ for _ in ()).throw(UserError("too <i>bad")))
            batcher, _ = batcher_of(type("Model", (), {"longest": 16})(), refuse, 0.0)
            with served(refuse, batcher) as url:
                await browser.open(f"{url}/?text=b")
                await browser.until("document.querySelector('.error')")
                assert await browser.evaluate("document.querySelector('.error').textContent") == "too <i>bad"

    asyncio.run(all_of_them())
