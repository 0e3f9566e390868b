"""Files behind a URL: whatever fsspec knows (gs://, s3://, https://), read in blocks.

Remote storage fails occasionally: each request is retried with exponential backoff, a bounded number of times. Retries
never change what is read, and nothing is skipped because a server was busy.
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from espalier.errors import MachineError, UserError
from espalier.redaction import is_redacted, without_secrets

T = TypeVar("T")
BLOCK = 8 * 2**20
"""Bytes of one request."""
ATTEMPTS = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds: the pauses between attempts double from the first to the longest, drawn from their upper half."""
SILENCE = 20
"""Seconds without a byte after which an HTTP request counts as failed."""


def is_remote(path: str) -> bool:
    return "://" in path


def remote_paths(pattern: str) -> list[str]:
    if not any(sign in pattern for sign in "*[") or pattern.startswith(("http://", "https://")):
        return [pattern]
    system, path = _system(pattern)
    found = persistently(lambda: system.glob(path), pattern)
    if not found:
        raise UserError(f"no file matches {pattern}; check the bucket and quote globs")
    return [system.unstrip_protocol(str(name)) for name in found]


def persistently(act: Callable[[], T], what: str) -> T:
    """act(), retried while storage fails. OSError for a permanent refusal, MachineError where storage never recovers.

    UserError where retrying cannot help: a package or credentials are missing.
    """
    error: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            longest = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
            if attempt == 1:
                _tell_once(f"{what}: {_words(error, what)}; trying again, up to {ATTEMPTS} times")
            # Hosts that failed together should not retry together.
            time.sleep(random.uniform(longest / 2, longest))
        try:
            return act()
        except Exception as caught:  # every file system behind fsspec has errors of its own
            final = _final(caught, what)
            if final:
                raise final from caught
            error = caught
    raise MachineError(
        f"{what} cannot be read: {ATTEMPTS} attempts failed, the last with {_words(error, what)}; "
        "finished work is kept, and the same command continues"
    )


@functools.lru_cache(1000)
def _tell_once(line: str) -> None:
    """A file has thousands of blocks: the same message is printed once."""
    print(without_secrets(line), flush=True)


class RemoteFile(io.RawIOBase):
    """A remote file as a seekable one, read in blocks, each of which is requested until it arrives."""

    def __init__(self, url: str):
        self._url = url
        self._size, _ = remote_stat(url)
        self._at = 0
        self._block: tuple[int, bytes] = (-1, b"")
        self._whole: IO[bytes] | None = None
        if self._size is None:
            self._fetch_whole()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert self._size is not None
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        assert self._size is not None
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        number, within = divmod(self._at, BLOCK)
        data = self._read_block(number)[within : within + wanted]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if self._whole:
            self._whole.close()
        super().close()

    def _read_block(self, number: int) -> bytes:
        assert self._size is not None
        start, end = number * BLOCK, min((number + 1) * BLOCK, self._size)
        if self._whole:
            self._whole.seek(start)
            return self._whole.read(end - start)
        if self._block[0] != number:
            data = persistently(lambda: self._ask(start, end), self._url)
            if len(data) != end - start:
                self._fetch_whole()
                return self._read_block(number)
            self._block = number, data
        return self._block[1]

    def _ask(self, start: int, end: int) -> bytes:
        system, path = _system(self._url)
        data = system.cat_file(path, start=start, end=end)
        if len(data) not in (end - start, self._size):
            raise OSError(f"{len(data)} bytes came where {end - start} were asked for")
        return data

    def _fetch_whole(self) -> None:
        """Where a server supports no range requests (or gives no size): the whole file, into a temporary one."""
        system, path = _system(self._url)

        def fetch() -> IO[bytes]:
            file = tempfile.TemporaryFile()  # noqa: SIM115 (the reader closes it)
            try:
                system.get_file(path, file)
                found = file.tell()
                if self._size is not None and found != self._size:
                    raise OSError(f"{found} bytes came where there are {self._size}")
            except BaseException:
                file.close()
                raise
            return file

        self._whole = persistently(fetch, self._url)
        self._size = self._whole.seek(0, io.SEEK_END)


def remote_digest(url: str) -> str:
    try:
        known, info = remote_stat(url)
        kept = next((info[name] for name in ("md5Hash", "ETag", "etag", "Content-MD5") if info.get(name)), None)
        if kept:
            return f"{known} {kept}"
        whole = hashlib.sha256()
        with io.BufferedReader(RemoteFile(url), 2**20) as file:
            while block := file.read(2**20):
                whole.update(block)
        return whole.hexdigest()
    except OSError as error:
        return f"unreadable {error.errno}"


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    options = {}
    if is_redacted(url):
        raise UserError(
            f"{url} had a secret, which no file of a run keeps; give the whole URL again, for instance with "
            "--data.files"
        )
    if url.startswith(("http://", "https://")):
        options = _http_options()
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, **options)
    except ImportError as error:
        raise _missing_package(url, error) from error
    except ValueError as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}; known are gs://, s3://, https:// and paths") from error


@functools.cache
def _http_options() -> dict[str, Any]:
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}}


def remote_stat(url: str) -> tuple[int | None, dict]:
    system, path = _system(url)
    info = persistently(lambda: system.info(path), url)
    return info.get("size"), info


def _final(error: BaseException, what: str) -> OSError | UserError | None:
    """The error where retrying is of no use: not found, not allowed, or no credentials; else None."""
    if isinstance(error, MachineError | UserError):
        raise error
    if isinstance(error, ImportError):
        return _missing_package(what, error)
    if any(cause.__class__.__name__ in NO_CREDENTIALS for cause in _causes(error)):
        variables = "GOOGLE_APPLICATION_CREDENTIALS" if what.startswith(("gs://", "gcs://")) else "AWS_ACCESS_KEY_ID …"
        return UserError(f"{what}: no credentials ({_words(error, what)}); log in, or set {variables}")
    # fsspec turns whatever a server answered into "not found" and keeps the answer as the cause.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = getattr(cause, "status", None) or getattr(cause, "code", None)
    if isinstance(status, int):
        if status in (408, 425, 429) or status >= 500:
            return None
        return OSError(None, f"the server answers {status}")
    if isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError):
        return cause
    return None


NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"),  # botocore, s3fs
    *("DefaultCredentialsError", "RefreshError", "ReauthFailError"),  # google.auth, gcsfs
}
"""Names of exceptions of libraries that need not be installed."""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _words(error: BaseException | None, what: str) -> str:
    """An error in one line, with what is behind it where that says more: the URL alone, `what`, is no reason."""
    assert error is not None
    found: list[str] = []
    for cause in _causes(error):
        text = " ".join(str(cause).split())[:200] or type(cause).__name__
        if text != what and not any(text in other for other in found):
            found.append(text)
    return ": ".join(found[:2]) or type(error).__name__


def _missing_package(url: str, error: ImportError) -> UserError:
    package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}.get(url.split("://")[0])
    advice = f"`./launch.sh python -m pip install {package}`" if package else "install the package that it names"
    return UserError(f"{url}: {' '.join(str(error).split())}; try {advice}")
