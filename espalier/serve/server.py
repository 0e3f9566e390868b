"""An application on a socket, until Ctrl-C or SIGTERM: what `serve` and `runs --serve` have in common."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

from espalier.errors import UserError


def check_installed(command: str, otherwise: str = "") -> None:
    """UserError where the libraries are missing. otherwise: what the command can do without them."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{command} needs {error.name}, which is not installed; `./launch.sh python -m pip install starlette "
            f"uvicorn` (or espalier[serve]){otherwise}"
        ) from None


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there; UserError where that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}; try --port 0") from None
    with listener:
        yield listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def until_ended(application: Any, listener: socket.socket, patience: int) -> None:
    """patience: seconds that requests at hand get at the end."""
    import uvicorn

    class Server(uvicorn.Server):
        """Signals end it after the requests at hand, and are not raised again."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    how: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False, "lifespan": "off"}
    Server(uvicorn.Config(application, timeout_graceful_shutdown=patience, **how)).run(sockets=[listener])
