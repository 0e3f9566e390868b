"""A small HTTP server for a model: `./launch.sh serve RUN|hf:ID`, a page in the browser, POST /predict for programs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier import cli, progress
from espalier.commands.asked_model import AskedModel, stopping
from espalier.errors import UserError
from espalier.serve.server import address_of, check_installed, listening, until_ended

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
    stop: tuple[str, ...] = ()
    """Of a model that writes: texts at which its text ends, which are no part of it. A field `stop` of a row goes
    before."""
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
    check_installed("serve")
    from espalier.serve.app import Limits, application

    with listening(config.host, config.port) as listener:
        with progress.waiting(f"loading {config.model}"):
            model, use = config.opened(config.use, config.max_length)
            use = stopping(use, config.stop)
        batcher, shapes = batcher_of(model, use, config.delay)
        with progress.waiting(f"compiling {len(shapes.all())} programs, for rows of up to {shapes.lengths[-1]} tokens"):
            example = example_of(model, use)
            warm_up(batcher, use, example)
        progress.say(f"{use.name}: {address_of(listener)} (Ctrl-C ends)")
        about = {"use": use.name, "model": config.model, "takes": use.takes, "example": example}
        limits = Limits(config.limit_bytes, config.limit_rows, config.limit_seconds)
        until_ended(
            application(use, batcher, limits, about, config.host), listener, max(1, round(config.limit_seconds))
        )
        batcher.close()
    progress.say(f"ended; {batcher.answered:,} rows were answered in {batcher.batches:,} batches")
    return {"use": use.name, "rows": batcher.answered, "batches": batcher.batches}


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


if __name__ == "__main__":
    cli.run_config(main, ServeConfig, prog="serve")
