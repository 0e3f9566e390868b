"""What a tracker is, and the table of those there are. A new one is a module and a line here."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from espalier.files import write_json
from espalier.trackers.aside import Aside

TRACKERS = {
    "tensorboard": "espalier.trackers.tensorboard:TensorBoard",
    "wandb": "espalier.trackers.wandb:WeightsAndBiases",
    "mlflow": "espalier.trackers.mlflow:MLflow",
}
PATIENCE = 10.0
"""Seconds for which the end of a run waits for all trackers together to have taken what they were told."""


class Session(NamedTuple):
    """What a tracker knows of a session when it is opened."""

    folder: Path
    """The run directory. The run has its name."""
    config: Mapping[str, Any]
    """What config.json holds: JSON values."""
    start: int
    """The step that the session goes on from; what an earlier one told of later steps no longer holds."""

    @property
    def ids(self) -> Path:
        """The file with the names that services gave to the run."""
        return self.folder / "trackers.json"

    def known_id(self, service: str) -> str | None:
        """What the service calls this run since an earlier session."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.ids.read_text(encoding="utf-8"))
            return str(found[service]) if isinstance(found, dict) and service in found else None
        return None

    def keep_id(self, service: str, name: str) -> None:
        """So that the next session goes on with the same run there."""
        found: Any = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.ids.read_text(encoding="utf-8"))
        write_json(self.ids, (found if isinstance(found, dict) else {}) | {service: name})


class Board(Protocol):
    """A place where the figures of a run are shown. It is made with a Session, and raises what it likes."""

    background: bool
    """Whether it may be slow or absent: it is then spoken to on a thread of its own, and may fail."""

    def __init__(self, session: Session): ...

    @classmethod
    def check(cls) -> None:
        """UserError where it cannot be had: its package or an account is missing. Nothing is written."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step, of training or (as eval/…) of an evaluation."""
        ...

    def close(self, how: str) -> None:
        """how: ended or failed."""
        ...


def board_class(name: str) -> type[Board]:
    """The tracker of this name in TRACKERS."""
    module, _, attribute = TRACKERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check(names: Sequence[str]) -> None:
    """UserError where one of these trackers cannot be had."""
    for name in names:
        board_class(name).check()


class Boards:
    """The trackers of a session. None that works on a network delays the run or ends it.

    say: takes a line for people, also from other threads.
    """

    def __init__(self, names: Sequence[str], session: Session, say: Callable[[str], None]):
        kinds = [(name, board_class(name)) for name in dict.fromkeys(names)]
        self._near = [kind(session) for _, kind in kinds if not kind.background]
        self._far = [_Far(name, kind, session, say) for name, kind in kinds if kind.background]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for board in (*self._near, *self._far):
            board.log(step, metrics)

    def close(self, how: str, patience: float = PATIENCE) -> None:
        end = time.monotonic() + patience
        for board in (*self._near, *self._far):
            board.close(how)
        for board in self._far:
            board.aside.close(max(0.0, end - time.monotonic()))


class _Far:
    """A tracker on a thread of its own."""

    def __init__(self, name: str, kind: type[Board], session: Session, say: Callable[[str], None]):
        self.aside = Aside(name, say)
        self._board: Board | None = None
        self.aside.do(lambda: self._open(kind, session))

    def _open(self, kind: type[Board], session: Session) -> None:
        self._board = kind(session)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.aside.do(lambda: self._board and self._board.log(step, metrics))

    def close(self, how: str) -> None:
        self.aside.do(lambda: self._board and self._board.close(how))
