"""Remote text from a server that fails now and then, and sums that are taken once."""

import gzip
import hashlib
import http.server
import json
import os
import random
import sys
import threading
import time

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import espalier.data.remote
import espalier.data.storage
from espalier.data.config import DataConfig
from espalier.data.documents import Document
from espalier.data.prepare import prepare
from espalier.data.sources import FileSource
from espalier.data.storage import digest, open_file
from espalier.errors import MachineError, UserError

# The file systems that fsspec has opened, by protocol.
KNOWN = sys.modules["fsspec.registry"]._registry


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, and fails a share of the requests: 429, 503, a connection cut in the middle, silence."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], share: float, ranges: bool = True, status: int | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.share, self.ranges, self.status = files, share, ranges, status
        self.random, self.asked, self.failed = random.Random(0), 0, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        with server.lock:
            server.asked += 1
            failure = server.random.choice([429, 503, "cut", "silence"]) if server.random.random() < server.share else 0
            server.failed += bool(failure)
        content = server.files.get(self.path.lstrip("/"))
        if server.status or isinstance(failure, int) and failure or content is None:
            self.send_error(server.status or failure or 404)
            return
        if failure == "silence":
            time.sleep(3)
            return
        start, end = 0, len(content)
        wanted = self.headers.get("Range")
        if wanted and server.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start : start + (end - start) // 2] if failure == "cut" else content[start:end])


@pytest.fixture
def quick(monkeypatch):
    """Small blocks, short pauses, and a second of silence is too long."""
    monkeypatch.setattr(espalier.data.remote, "BLOCK", 20_000)
    monkeypatch.setattr(espalier.data.remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(espalier.data.remote, "SILENCE", 0.5)
    espalier.data.remote._http_options.cache_clear()
    yield
    espalier.data.remote._http_options.cache_clear()


def shakespeare(shared_data) -> dict[str, bytes]:
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:200_000]
    scenes = [scene for scene in text.split("\n\n") if scene.strip()]
    lines = "".join(json.dumps({"text": scene}) + "\n" for scene in scenes).encode()
    half = lines.index(b"\n", len(lines) // 2) + 1
    return {"a.jsonl": lines[:half], "b.jsonl.gz": gzip.compress(lines[half:], mtime=0)}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_failing_server_changes_nothing(shared_data, tmp_path, quick, ranges):
    """One request in five fails; the tokens are those of the same files on the disk."""
    files = shakespeare(shared_data)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    settings = {"tokenizer_kind": "bpe", "cache": str(tmp_path / "cache")}
    local = prepare(DataConfig(files=(f"{tmp_path}/*.jsonl*",), **settings), 400, for_masked_lm=False)
    server = Server(files, share=0.2, ranges=ranges)
    urls = tuple(server.url(name) for name in files)
    settings["cache"] = str(tmp_path / "other")
    remote = prepare(DataConfig(files=urls, **settings), 400, for_masked_lm=False)
    assert server.failed > 3, "nothing failed"
    for side in ("train", "validation"):
        here, there = getattr(local, side)["text"], getattr(remote, side)["text"]
        np.testing.assert_array_equal(here.offsets, there.offsets)
        every = np.arange(here.offsets[-1])
        np.testing.assert_array_equal(here.take(every), there.take(every))
        assert there.manifest["rejected"] == {}


def test_a_url_may_ask_for_something(quick):
    server = Server({"a.jsonl.gz?download=1": gzip.compress(b'{"text": "asked for"}')}, share=0.0)
    (document,) = FileSource((server.url("a.jsonl.gz?download=1"),))
    assert isinstance(document, Document) and document.text == "asked for"


def test_attempts_are_bounded_and_nothing_is_left_out(tmp_path, quick):
    server = Server({"a.txt": b"text"}, share=0.0, status=503)
    with pytest.raises(MachineError, match="8 attempts failed") as error:
        list(FileSource((server.url("a.txt"),)))
    assert "\n" not in str(error.value) and server.asked <= 2 * 8


def test_a_refused_connection_is_told_of_at_once_with_its_cause(quick, capsys):
    server = Server({}, share=0.0)
    url = server.url("a.txt")
    server.shutdown()
    server.server_close()
    with pytest.raises(MachineError, match=r"8 attempts failed, the last with .*Connect call failed") as error:
        list(FileSource((url,)))
    assert "\n" not in str(error.value)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{url}: Cannot connect to host") and line.endswith("trying again, up to 8 times")


class NoCredentialsError(Exception):
    """As botocore's, which is known by its name."""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ImportError("Please install s3fs"), UserError, "Please install s3fs; try `.* pip install s3fs`"),
        (
            NoCredentialsError("Unable to locate credentials"),
            UserError,
            r"no credentials \(.*Unable.*AWS_ACCESS_KEY_ID",
        ),
        (PermissionError("Forbidden"), OSError, "Forbidden"),
        (FileNotFoundError("no such key"), OSError, "no such key"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_cannot_get_better_is_tried_once(error, kind, message, wrapped, capsys):
    tried = []

    def act():
        tried.append(1)
        if wrapped and isinstance(error, NoCredentialsError):
            raise OSError("cannot list the bucket") from error
        raise error

    with pytest.raises(kind, match=message) as caught:
        espalier.data.remote.persistently(act, "s3://bucket/a.txt")
    assert tried == [1] and not capsys.readouterr().out and "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_not_there_is_not_asked_for_again(quick, status):
    server = Server({}, share=0.0, status=status)
    (reject,) = FileSource((server.url("a.txt"),))
    assert reject.kind == "unreadable" and server.asked <= 2


def test_a_remote_file_can_be_sought_in(quick):
    content = bytes(range(256)) * 400
    server = Server({"a.txt": content}, share=0.1)
    with open_file(server.url("a.txt")) as file:
        for at in (50_000, 3, 99_999, len(content)):
            file.seek(at)
            assert file.read(30_000) == content[at : at + 30_000]


def test_other_file_systems():
    with fsspec.open("memory://bucket/a.txt", "wb") as file:
        file.write(b"in memory")  # type: ignore[union-attr]
    (document,) = FileSource(("memory://bucket/*.txt",))
    assert document.text == "in memory"
    with pytest.raises(UserError, match="no file matches memory://bucket/nothing"):
        FileSource(("memory://bucket/nothing*.txt",))
    with pytest.raises(UserError, match="nosuch://.*gs://, s3://, https://"):
        list(FileSource(("nosuch://bucket/a.txt",)))


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("gcs", "gcsfs")])
def test_a_package_that_is_not_there(protocol, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(KNOWN, protocol, raising=False)
    for pattern in (f"{protocol}://bucket/*.txt", f"{protocol}://bucket/a.txt"):
        with pytest.raises(UserError, match=rf"{protocol}://bucket/.*`./launch.sh python -m pip install {package}`"):
            list(FileSource((pattern,)))


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_buckets(protocol, monkeypatch, tmp_path):
    """The way of s3:// and gs:// through fsspec, with its file system in memory in their place."""

    class Bucket(MemoryFileSystem):
        store: dict = {}
        pseudo_dirs = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix(f"{protocol}://"))

        def unstrip_protocol(self, name):
            return f"{protocol}:/{self._strip_protocol(name)}"

        def info(self, path, **options):
            found = super().info(path, **options)
            return found | ({"ETag": str(hash(self.cat_file(path)))} if found["type"] == "file" else {})

    Bucket.protocol = protocol
    monkeypatch.setitem(KNOWN, protocol, Bucket)
    lines = [f"record {number} of the bucket" for number in range(300)]
    content = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    system = Bucket()
    system.pipe({"/bucket/text/a.jsonl.gz": gzip.compress(content), "/bucket/text/b.jsonl": content})
    source = FileSource((f"{protocol}://bucket/text/*.jsonl*",))
    assert source.paths == [f"{protocol}://bucket/text/{name}" for name in ("a.jsonl.gz", "b.jsonl")]
    assert [item.text for item in source if isinstance(item, Document)] == lines * 2
    before = source.fingerprint()
    assert FileSource((f"{protocol}://bucket/text/*.jsonl*",)).fingerprint() == before
    system.pipe({"/bucket/text/b.jsonl": content + b'{"text": "more"}\n'})
    assert source.fingerprint() != before
    config = DataConfig(
        files=(f"{protocol}://bucket/text/*.jsonl*",), tokenizer_kind="bpe", cache=str(tmp_path / "cache")
    )
    stores = prepare(config, 400, for_masked_lm=False)
    assert sum(side["text"].manifest["documents"] for side in (stores.train, stores.validation)) == 601
    with pytest.raises(UserError, match=f"no file matches {protocol}://bucket/none"):
        FileSource((f"{protocol}://bucket/none*.txt",))
    (reject,) = FileSource((f"{protocol}://bucket/none.txt",))
    assert reject.kind == "unreadable"


def test_a_change_that_hides_itself(tmp_path, monkeypatch):
    """Of the same size, in the same file, with the time of change turned back."""
    monkeypatch.setattr(espalier.data.storage, "SUMS_KEPT_AFTER", -1)
    path = tmp_path / "a.txt"
    path.write_text("text")
    status = path.stat()
    first = digest(str(path), tmp_path)
    time.sleep(0.02)
    with path.open("r+") as file:
        file.write("t3xt")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and digest(str(path), tmp_path) != first


@pytest.mark.parametrize("kept", [b"", b"[]", b"{}", b'{"key": 1}'])
def test_a_damaged_note_of_a_sum_counts_as_none(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(espalier.data.storage, "SUMS_KEPT_AFTER", -1)
    path = tmp_path / "a.txt"
    path.write_text("text")
    first = digest(str(path), tmp_path)
    for note in (tmp_path / "sums").iterdir():
        note.write_bytes(kept)
    assert digest(str(path), tmp_path) == first == hashlib.sha256(b"text").hexdigest()


def test_a_sum_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.setattr(espalier.data.storage, "SUMS_KEPT_AFTER", -1)
    path = tmp_path / "a.txt"
    path.write_text("text")
    first = digest(str(path), tmp_path)
    monkeypatch.setattr(espalier.data.storage, "sha256_of_file", lambda _: pytest.fail("read again"))
    assert digest(str(path), tmp_path) == first
    monkeypatch.undo()
    path.write_text("texT")
    assert digest(str(path), tmp_path) != first
