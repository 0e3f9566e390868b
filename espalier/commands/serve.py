"""A small HTTP server for a model: `./launch.sh serve RUN|hf:ID`, a page in the browser, POST /predict for programs."""

from __future__ import annotations

import contextlib
import functools
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier import cli, progress
from espalier.commands.asked_model import AskedModel
from espalier.errors import UserError

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel
    from espalier.predict.outputs import Shapes
    from espalier.predict.use import Use
    from espalier.serve.batching import Batcher

ROWS = (1, 8, 32)
"""Rows of a batch: so many programs for each length of row."""
WAITING = 10_000
"""Requests that may wait."""


@dataclass(frozen=True)
class ServeConfig(AskedModel):
    """Serve a model by HTTP: `serve RUN`, then open http://127.0.0.1:8000 or POST rows as JSON to /predict.

    Needs Starlette and uvicorn: `./launch.sh python -m pip install starlette uvicorn`. Whoever reaches the address may
    ask; there is no password and no encryption.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = of all networks of this machine."""
    port: int = 8000
    """0 = any that is free."""
    use: str | None = None
    """What to ask, where it is not what the model was trained for: embed."""
    max_length: int | None = None
    """Tokens of an input at most; unset = as in the fine-tuning, else the model's positions, but at most 512."""
    delay: float = 0.005
    """Seconds that a request waits for others, to be answered with them; while the model is busy all wait anyway."""
    limit_bytes: int = 2**20
    """A larger request is refused (413)."""
    limit_rows: int = 1000
    """Rows of a request, likewise."""
    limit_seconds: float = 30.0
    """A request that is not answered within is given up (504)."""

    def __post_init__(self):
        if not 0 <= self.port < 2**16:
            raise UserError(f"port={self.port} must lie between 0 and {2**16 - 1}")
        if self.delay < 0 or self.limit_seconds <= 0 or self.limit_bytes < 1 or self.limit_rows < 1:
            raise UserError("delay is at least 0, limit_seconds above 0, limit_bytes and limit_rows at least 1")


def main(config: ServeConfig) -> dict[str, Any]:
    """Serve until Ctrl-C; returns the `--json` object."""
    check_installed()
    with listening(config.host, config.port) as listener:
        with progress.waiting(f"loading {config.model}"):
            model, use = config.opened(config.use, config.max_length)
        batcher, shapes = batcher_of(model, use, config.delay)
        with progress.waiting(f"compiling {len(shapes.all())} programs, for rows of up to {shapes.lengths[-1]} tokens"):
            example = example_of(model, use)
            warm_up(batcher, use, example)
        host, port = listener.getsockname()[:2]
        progress.say(f"{use.name}: http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends)")
        about = {"use": use.name, "model": config.model, "takes": use.takes, "example": example}
        _run(config, listener, use, batcher, about)
        batcher.close()
    progress.say(f"ended; {batcher.answered:,} rows were answered in {batcher.batches:,} batches")
    return {"use": use.name, "rows": batcher.answered, "batches": batcher.batches}


def check_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serve needs {error.name}, which is not installed; `./launch.sh python -m pip install starlette uvicorn` "
            "(or espalier[serve])"
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


def batcher_of(model: LoadedModel, use: Use, delay: float) -> tuple[Batcher, Shapes]:
    """What answers requests, and the only shapes of batches that it has compiled."""
    from espalier.predict.outputs import SHORTEST, Shapes, fixed_shapes
    from espalier.predict.use import checked
    from espalier.serve.batching import Batcher

    lengths, length = [model.longest], SHORTEST
    while length < model.longest:
        lengths.append(length)
        length *= 2
    shapes = Shapes(lengths, ROWS)
    answer = functools.partial(checked, use, model)
    within = functools.partial(fixed_shapes, shapes)
    return Batcher(answer, most=ROWS[-1], delay=delay, places=WAITING, within=within), shapes


def example_of(model: LoadedModel, use: Use) -> dict[str, Any]:
    """That of the use; where a decoder was tuned by a template, its fields."""
    template = (model.saved.get("data") or {}).get("template") if use.name == "generate" else None
    if template is None:
        return dict(use.example)
    from espalier.data.text_template import template_fields

    (text,) = use.example.values()
    return dict.fromkeys(template_fields(template)[:-1], text)


def warm_up(batcher: Batcher, use: Use, example: Mapping[str, Any]) -> None:
    """Ask the example of the use, so that everything is compiled; what is wrong with it is no matter here."""
    if example:
        row = {name: value for name, value in example.items() if value != ""}
        batcher.ask([use.reads(row)]).result()
        batcher.batches = batcher.answered = 0


def _run(config: ServeConfig, listener: socket.socket, use: Use, batcher: Batcher, about: dict[str, Any]) -> None:
    import uvicorn

    from espalier.serve.app import Limits, application

    class Server(uvicorn.Server):
        """Ctrl-C and SIGTERM end it after the requests at hand, and are not raised again."""

        @contextlib.contextmanager
        def capture_signals(self):
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    limits = Limits(config.limit_bytes, config.limit_rows, config.limit_seconds)
    server = Server(
        uvicorn.Config(
            application(use, batcher, limits, about),
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=max(1, round(config.limit_seconds)),
        )
    )
    server.run(sockets=[listener])


if __name__ == "__main__":
    cli.run_config(main, ServeConfig, prog="serve")
