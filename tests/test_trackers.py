"""Who is told of a run: trackers behind their protocol, a webhook; and that none of them delays or ends anything."""

import dataclasses
import http.server
import importlib.machinery
import json
import sys
import threading
import time
import types

import pytest

from espalier import assembly, cli, saved_config
from espalier.errors import UserError
from espalier.trackers import notify as notify_module
from espalier.trackers.aside import Aside
from espalier.trackers.contract import TRACKERS, Boards, Session, check
from espalier.trackers.notify import Notifier
from espalier.training.config import TrainConfig
from espalier.training.introduction import ending_words
from espalier.training.run import RunDirectory, settings
from espalier.training.tracker import Tracker
from mlm.presets import debug


class Fake:
    """A tracker as somebody might add it."""

    background = False
    told: list = []

    def __init__(self, session):
        self.told.append(("open", session.folder.name, session.start, dict(session.config)))

    @classmethod
    def check(cls):
        raise UserError("trackers=fake needs the package fake")

    def log(self, step, metrics):
        self.told.append((step, dict(metrics)))

    def close(self, how):
        self.told.append(how)


class Failing(Fake):
    background = True

    def log(self, step, metrics):
        raise OSError("the service is away,\nreally")


class Hanging(Fake):
    background = True

    def __init__(self, session):
        time.sleep(60)


@pytest.fixture
def fake(monkeypatch):
    for kind in (Fake, Failing, Hanging):
        monkeypatch.setitem(TRACKERS, kind.__name__.lower(), f"{__name__}:{kind.__name__}")
    monkeypatch.setattr(Fake, "told", [])
    return Fake


def tracked(path, start=0, **more):
    return Tracker(RunDirectory(path), total_steps=20, start_step=start, last_step=20, log_every=2, **more)


def test_a_tracker_gets_what_the_log_gets_also_after_a_rollback(tmp_path, fake):
    with tracked(tmp_path, trackers=["fake"], config={"seed": 1}) as tracker:
        for step in range(1, 7):
            tracker.log(step, {"loss": float(step)}, 10)
        tracker.evaluation(6, {"loss": 0.5})
    with pytest.raises(ZeroDivisionError), tracked(tmp_path, 4, trackers=["fake"]) as tracker:
        tracker.log(5, {"loss": 9.0}, 10)
        tracker.log(6, {"loss": 9.0}, 10)
        raise ZeroDivisionError
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = fake.told
    assert told[0] == ("open", tmp_path.name, 0, {"seed": 1})
    assert [entry[0] for entry in told[1:6]] == [1, 2, 4, 6, 6] and told[5][1] == {"eval/loss": 0.5}
    assert told[6:8] == ["ended", ("open", tmp_path.name, 4, {})] and told[-1] == "failed"
    assert told[8] == (6, {key: value for key, value in written[-1].items() if key != "step"})
    assert not (tmp_path / "tensorboard").exists()


def test_what_is_missing_is_said_before_anything_is_written(tmp_path, fake, monkeypatch):
    with pytest.raises(UserError, match="needs the package fake"):
        check(["tensorboard", "fake"])
    for name in ("wandb", "mlflow"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=f"trackers={name} needs the package {name}; pip install"):
            assembly.train(TrainConfig(run_dir=str(tmp_path / "run"), trackers=(name,)))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_fails_or_hangs_is_told_once_and_delays_nothing(tmp_path, fake):
    said: list[str] = []
    began = time.monotonic()
    boards = Boards(["failing", "hanging"], Session(tmp_path, {}, 0), said.append)
    for step in range(100):
        boards.log(step, {"loss": 1.0})
    assert time.monotonic() - began < 5
    boards.close("ended", patience=0.5)
    assert time.monotonic() - began < 10
    assert said == [
        "warning: failing: OSError: the service is away, really; the run goes on",
        "warning: hanging: does not answer, what it was told last may be missing there; the run goes on",
    ]


def test_a_full_queue_drops_and_does_not_wait(monkeypatch):
    monkeypatch.setattr("espalier.trackers.aside.MANY", 3)
    said: list[str] = []
    gate = threading.Event()
    aside = Aside("slow", said.append)
    for _ in range(10):
        aside.do(gate.wait)
    assert said == ["warning: slow: takes nothing any more, what is further said is lost to it; the run goes on"]
    gate.set()
    aside.close(5)


def library(monkeypatch, name, **parts):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for part, value in parts.items():
        setattr(module, part, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    """Against a stand-in for the package; tests/real_trackers.py does the same with the real one."""
    calls: list = []

    class Run:
        def define_metric(self, name, step_metric):
            calls.append((name, step_metric))

        def log(self, values):
            calls.append(values)

        def finish(self, exit_code):
            calls.append(exit_code)

    def init(**options):
        calls.append(options)
        sys.excepthook = print
        return Run()

    library(monkeypatch, "wandb", init=init, Settings=lambda **more: more, login=lambda prompt, verify: False)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="finds no account; run `wandb login`"):
        check(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    check(["wandb"])
    hook = sys.excepthook
    for start, how in ((0, "failed"), (4, "ended")):
        boards = Boards(["wandb"], Session(tmp_path, {"seed": 1, "published": {"a": 1}}, start), pytest.fail)
        boards.log(start + 1, {"loss": 2.0})
        boards.close(how)
    first, second = calls[0], calls[4]
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"] == {"seed": 1}
    assert (first["name"], first["project"], first["dir"]) == (tmp_path.name, "espalier", str(tmp_path))
    assert first["settings"]["console"] == "off" and first["settings"]["silent"]
    assert calls[1:4] == [("*", "step"), {"step": 1, "loss": 2.0}, 1] and calls[6:] == [{"step": 5, "loss": 2.0}, 0]
    assert sys.excepthook is hook


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    calls: list = []

    class Client:
        def __init__(self, tracking_uri):
            calls.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            calls.append(name)
            return "7"

        def create_run(self, experiment, run_name):
            calls.append((experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        def log_batch(self, run, metrics=(), params=()):
            calls.append((run, list(metrics) or list(params)))

        def update_run(self, run, status):
            calls.append((run, status))

        def set_terminated(self, run, status):
            calls.append((run, status))

    library(monkeypatch, "mlflow")
    library(monkeypatch, "mlflow.tracking", MlflowClient=Client)
    entities = {"Metric": lambda name, value, at, step: (name, value, step), "Param": lambda name, value: (name, value)}
    library(monkeypatch, "mlflow.entities", **entities)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    check(["mlflow"])
    config = {"seed": 1, "model": {"layers": [1, 2], "long": "x" * 900}, "published": {}}
    for start, how in ((0, "failed"), (4, "ended")):
        boards = Boards(["mlflow"], Session(tmp_path, config, start), pytest.fail)
        boards.log(start + 1, {"eval/ndcg@10": 0.5})
        boards.close(how)
    assert calls == [
        "http://here",
        "espalier",
        ("7", tmp_path.name),
        ("abc", [("seed", "1"), ("model.layers", "[1, 2]"), ("model.long", "x" * 500)]),
        ("abc", [("eval/ndcg_10", 0.5, 1)]),
        ("abc", "FAILED"),
        "http://here",
        ("abc", "RUNNING"),
        ("abc", [("eval/ndcg_10", 0.5, 5)]),
        ("abc", "FINISHED"),
    ]


@pytest.fixture
def webhook():
    """A server on this machine: what it was sent, as (path, headers, body); `status` is what it answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.sent.append((self.path, self.headers, json.loads(body)))
            server.gate.wait(30)
            self.send_response(server.status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sent, server.status, server.gate = [], 200, threading.Event()  # type: ignore[attr-defined]
    server.gate.set()  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.gate.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_gets_plain_json(webhook, monkeypatch):
    notify = Notifier(webhook.url.replace("//", "//user:p%40ss@") + "/a?key=b", "runs/x")
    notify.tell("finished", "finished at step 20", step=20, eval={"loss": float("nan")})
    notify.close()
    ((path, headers, event),) = webhook.sent
    assert path == "/a?key=b" and headers["Content-Type"].startswith("application/json")
    assert headers["Authorization"] == "Basic dXNlcjpwQHNz"
    assert event["text"] == "Espalier runs/x: finished at step 20" and event["event"] == "finished"
    assert event["step"] == 20 and event["eval"] == {"loss": None} and event["run"] == "runs/x"
    # Services of which each takes one shape alone.
    shapes = notify_module.SHAPES
    assert shapes["qyapi.weixin.qq.com"]("好") == {"msgtype": "text", "text": {"content": "好"}}
    monkeypatch.setitem(shapes, "127.0.0.1", shapes["open.feishu.cn"])
    monkeypatch.setenv(notify_module.VARIABLE, webhook.url)
    notify = Notifier(None, "runs/x")
    notify.tell("started", "started")
    notify.close()
    assert webhook.sent[1][2] == {"msg_type": "text", "content": {"text": "Espalier runs/x: started"}}


def test_a_webhook_that_fails_or_hangs_is_ignored(webhook, capsys):
    webhook.status = 500
    notify = Notifier(f"{webhook.url}/sEcReT", "runs/x")
    for _ in range(3):
        notify.tell("started", "started")
    notify.close()
    webhook.gate.clear()
    began = time.monotonic()
    notify = Notifier(f"{webhook.url}/sEcReT", "runs/x")
    notify.tell("started", "started")
    notify.close(0.3)
    assert time.monotonic() - began < 5
    notify = Notifier("http://127.0.0.1:1/sEcReT bad", "runs/x")
    notify.tell("started", "started")
    notify.close()
    assert capsys.readouterr().out.splitlines() == [
        "warning: --notify: the webhook did not take a message (HTTPError 500); the run goes on",
        "warning: --notify: does not answer, what it was told last may be missing there; the run goes on",
        "warning: --notify: the webhook did not take a message (InvalidURL); the run goes on",
    ]
    Notifier(None, "runs/x").tell("started", "started")


def test_an_error_before_the_first_step_is_told_too(webhook):
    config = dataclasses.replace(debug(), run_dir="gs://no/where", notify=webhook.url)
    with pytest.raises(UserError, match="a run directory is a local path"):
        assembly.train(config)
    ((_, _, event),) = webhook.sent
    assert event["event"] == "failed" and "a run directory is a local path" in event["error"]


def test_the_url_is_written_nowhere():
    config = TrainConfig(notify="https://hooks.example/sEcReT")
    for values in (*settings(config, config.mesh), json.loads(saved_config.as_json(config, "./launch.sh mlm debug"))):
        assert "notify" not in values and "sEcReT" not in json.dumps(values) + repr(config)
    words = ["debug", "--notify", "https://sEcReT", "--steps", "3", "--notify=https://sEcReT", "--json"]
    assert cli._unrecorded(words) == ["debug", "--steps", "3", "--json"]
    with pytest.raises(UserError) as caught:
        TrainConfig(notify="sEcReT")
    assert "sEcReT" not in str(caught.value)


def test_how_a_session_ended_in_words():
    summary = {"step": 300, "finished": False, "stopped_by": 15, "goodput": {"fraction": 0.931}}
    assert ending_words(summary, 1000) == ("stopped", "stopped at step 300 of 1,000 by SIGTERM, saved; goodput 93.1 %")
    summary |= {"stopped_by": None, "eval": {"loss": 2.0}}
    assert ending_words(summary, 1000)[0] == "paused"
    assert ending_words(summary | {"finished": True}, 300) == (
        "finished",
        "finished at step 300; held-out loss 2.000; goodput 93.1 %",
    )
