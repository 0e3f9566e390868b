"""Secrets of URLs and of the environment: used, and written nowhere."""

import base64
import http.server
import json
import os
import threading
import urllib.parse

import pytest

from espalier.errors import UserError
from espalier.redaction import GONE, is_redacted, recorded, without_secrets
from espalier.report.card import model_card

USER, PASSWORD, QUERY, SIGNED = "scraper", "pw-in-the-URL-9", "token/in+the=query", "5igned"
PLANTED = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "THEIR_DB_PASSWORD": "correct horse battery",
    "SOME_CLIENT_SECRET": "c1ient-5ecret",
}
SECRETS = (PASSWORD, "token%2Fin", QUERY, SIGNED, *PLANTED.values())


class Guarded(http.server.BaseHTTPRequestHandler):
    """Gives its text to those alone who name the user, the password and the token."""

    text = b""
    refused = 0

    def _answer(self, body: bool) -> None:
        wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        given, path = self.headers.get("Authorization"), urllib.parse.unquote(self.path)
        if given != f"Basic {wanted}" or f"token={QUERY}&" not in path:
            type(self).refused += 1
            self.send_error(403)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.text)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if body:
            self.wfile.write(self.text)

    def do_GET(self):
        self._answer(True)

    def do_HEAD(self):
        self._answer(False)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url(shared_data):
    Guarded.text = (shared_data / "tinyshakespeare" / "input.txt").read_bytes()[:40_000]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        yield f"http://{USER}:{PASSWORD}@127.0.0.1:{port}/a.txt?token=token%2Fin%2Bthe%3Dquery&sig={SIGNED}&page=2"
        server.shutdown()


def found_in(folder) -> list[str]:
    """Each file in which a secret stands, and which."""
    bad = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            bad += [f"{path}: {secret}" for secret in SECRETS if secret.encode() in content]
    return bad


def test_no_file_of_a_run_nor_the_terminal_has_a_secret(tmp_path, url, run_cli, call_cli, monkeypatch):
    """Begun, gone on with, failed and shown: with a source whose URL has them, and with them in the environment."""
    cache = tmp_path / "cache"
    environment = PLANTED | {"ESPALIER_CACHE": str(cache), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    small = ("--model.hidden-size", 32, "--model.num-hidden-layers", 1, "--model.intermediate-size", 32)
    small += ("--data.sequence-length", 32, "--batch-size", 8, "--model.vocab-size", 300, "--log-every", 1)
    flags = ("debug", "--data.files", url, *small, "--steps", 3, "--run-dir", tmp_path / "run", "--eval-rows", 8)

    said = ""

    def call(module, *arguments, code=0, by=call_cli):
        nonlocal said
        ended = by(module, *arguments, code=code)
        said += ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    first = call("mlm.pretrain", *flags, "--stop-at", 2, "--json", by=run_cli)
    assert "step 2" in first
    # What it says to go on with is the command without what was secret.
    again = call("mlm.pretrain", *flags, "--export", tmp_path / "exported")
    assert "resumed at step 2" in again
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["files"] == [url.split("//")[0] + f"//{GONE}@" + url.split("@")[1].split("?")[0] +
                                       f"?token={GONE}&sig={GONE}&page=2"]  # fmt: skip
    assert GONE in config["command"] and f"token={GONE}" in (tmp_path / "exported" / "README.md").read_text()

    # A server that refuses, a setting that is wrong, a bug with its traceback: each names the URL.
    wrong = url.replace("token%2F", "nothing%2F")
    other = ("--run-dir", tmp_path / "other")
    assert "403" in call("mlm.pretrain", *flags[:2], wrong, *flags[3:], *other, code=2)
    unknown = url.replace("a.txt", "a.docx")
    assert "unknown kind of file" in call("mlm.pretrain", *flags[:2], unknown, *flags[3:], *other, "--debug", code=2)
    # The settings that were written have lost it, and say so.
    saved = call("mlm.pretrain", *flags, "--print-config")
    (tmp_path / "saved.json").write_text(saved)
    line = call("mlm.pretrain", "--from-config", tmp_path / "saved.json", *other, code=2)
    assert "had a secret, which no file of a run keeps" in line

    assert Guarded.refused, "the server asked for them"
    assert found_in(tmp_path) == []
    assert [secret for secret in SECRETS if secret in said] == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("https://me:pw@host/a.jsonl?sig=6yB%2B&page=2 failed", "https://***@host/a.jsonl?sig=***&page=2 failed"),
        ("(see https://u:p@ss@h/x?token=abc).", "(see https://***@h/x?token=***)."),
        ("'wiki=s3://KEY:SEC'RET@bucket/x'", "'wiki=s3://***@bucket/x'"),
        ("https://h/x#access_token=abc&download=true", "https://h/x#access_token=***&download=true"),
        ("hf:me/x?split=train&name=a", "hf:me/x?split=train&name=a"),
        ("--data.files a/*.txt someone@example.org", "--data.files a/*.txt someone@example.org"),
        ("https://huggingface.co/a/@b/c?download=true", "https://huggingface.co/a/@b/c?download=true"),
        ("--notify https://hooks.slack.com/services/T0/x --n 3", "--notify https://hooks.slack.com/*** --n 3"),
        ("--notify='https://discord.com/api/webhooks/1/x'", "--notify='https://discord.com/***'"),
        ("hf_ABCDEFGHIJKLMNOPQRST", "***"),
        ("ghp_0123456789abcdef0123 AKIAIOSFODNN7EXAMPLE xoxb-1234567890-abc", "*** *** ***"),
        ("sklearn risk-assessment-model-of-2025 hf_model", "sklearn risk-assessment-model-of-2025 hf_model"),
    ],
)  # fmt: skip
def test_what_is_secret_in_a_text(text, expected):
    assert without_secrets(text) == expected == without_secrets(expected)


def test_values_of_the_environment_go_by_their_names(monkeypatch):
    for name in [name for name in os.environ if "TOKEN" in name or "KEY" in name]:
        monkeypatch.delenv(name)
    for name, value in {
        "MY_TOKEN": "abc-defgh-1", "TOKENIZERS_PARALLELISM": "false-ish-1", "HF_TOKEN_PATH": "/root/.cache/token",
        "SHORT_KEY": "1234567", "WORD_SECRET": "training", "AWS_REGION": "eu-central-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    said = "abc-defgh-1 false-ish-1 /root/.cache/token 1234567 training eu-central-1"
    assert without_secrets(said) == said.replace("abc-defgh-1", "$MY_TOKEN")


def test_settings_and_the_card_of_an_older_run(tmp_path):
    """What earlier versions wrote down is not handed on."""
    url = "https://me:pw-of-mine@host/a.txt?t=abcdefgh"
    config = {
        "task": "masked_lm",
        "model": {"model_type": "bert"},
        "data": {"files": [url]},
        "notify": "https://hooks.slack.com/services/T/B/x",
        "command": f"./launch.sh mlm debug --data.files '{url}'",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = model_card(tmp_path)
    assert "pw-of-mine" not in card and "abcdefgh" not in card and f"https://{GONE}@host/a.txt" in card
    assert recorded(config)["notify"] == f"https://hooks.slack.com/{GONE}"
    assert is_redacted(recorded(config)["notify"]) and is_redacted(without_secrets(url)) and not is_redacted(url)
    with pytest.raises(UserError, match="had a secret"):
        from espalier.data.remote import RemoteFile

        RemoteFile(without_secrets(url))
