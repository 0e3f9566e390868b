"""Dynamic batching: one thread asks the model about all requests that wait, so that they share its programs."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NamedTuple


class FullError(Exception):
    """So many requests wait that a further one would not be answered in time."""


class Waiting(NamedTuple):
    inputs: Sequence[Any]
    found: Future
    """A list, a result for each input."""


class Batcher:
    """Inputs of many requests → results, by calls of `answer` with up to `most` inputs (more if one request has more).

    delay: seconds that an input waits for others at most; while a batch is computed, all that come wait for the next.
    within: entered by the thread that calls `answer`, for what belongs to a thread. places: requests that may wait.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        most: int,
        delay: float,
        places: int,
        within: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        self._answer, self._most, self._delay, self._within = answer, most, delay, within
        self._waiting: queue.Queue[Waiting | None] = queue.Queue(places)
        self.batches = self.answered = 0
        """Calls of `answer`, and inputs that they held."""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def ask(self, inputs: Sequence[Any]) -> Future:
        """The results, when they are there; cancelled before, nothing is computed. FullError where too many wait."""
        found: Future = Future()
        try:
            self._waiting.put_nowait(Waiting(inputs, found))
        except queue.Full:
            raise FullError from None
        return found

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        with self._within():
            while batch := self._next():
                batch = [one for one in batch if one.found.set_running_or_notify_cancel()]
                inputs = [item for one in batch for item in one.inputs]
                try:
                    results = list(self._answer(inputs)) if inputs else []
                except Exception as error:  # of whatever kind, it belongs to those who asked
                    for one in batch:
                        one.found.set_exception(error)
                    continue
                self.batches, self.answered = self.batches + 1, self.answered + len(inputs)
                begin = 0
                for one in batch:
                    one.found.set_result(results[begin : begin + len(one.inputs)])
                    begin += len(one.inputs)

    def _next(self) -> list[Waiting]:
        """The requests of a batch; nothing when it is the end."""
        first = self._waiting.get()
        batch: list[Waiting] = [first] if first else []
        end = time.monotonic() + self._delay
        while batch and sum(len(one.inputs) for one in batch) < self._most:
            try:
                following = self._waiting.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if following is None:
                self._waiting.put(None)
                break
            batch.append(following)
        return batch
