"""A trace of a few steps (`--profile A:B`), which XProf and Perfetto show: where the time of a step goes.

Process 0 writes it, of its own devices. Losses are those of a run without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from espalier.errors import UserError
from espalier.training.config import steps_of


class Profile:
    """Around each step `step`, behind it `after`; `close` ends a trace that a signal or an error left open.

    window: the first and the last step, counted from 1, as A:B; None = nothing is traced. start, last: steps done
    before this session, and the one that it ends with. UserError where all of the window lies beyond that.
    """

    def __init__(self, window: str | None, folder: Path, start: int, last: int, say: Callable[[str], object]):
        self._folder, self._say, self._tracing = folder, say, False
        self._window: tuple[int, int] | None = None
        if window is None:
            return
        first, end = steps_of(window)
        if first > last:
            raise UserError(f"profile={window}: this run ends at step {last}; name steps from {start + 1} to {last}")
        if jax.process_index():
            return
        if end <= start:
            say(f"no profile: steps {first} to {end} are done; this session makes {start + 1} to {last}")
        else:
            self._window = max(first, start + 1), min(end, last)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the call of this step."""
        if self._window is None:
            yield
            return
        if step == self._window[0] and not self._tracing:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, state: Any, step: int) -> None:
        """Once this step has been called: after the last one wait for the device and write the trace."""
        if self._tracing and self._window is not None and step >= self._window[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if not self._tracing or self._window is None:
            return
        self._tracing = False
        jax.profiler.stop_trace()
        first, end = self._window
        self._window = None
        trace = max(self._folder.rglob("*perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        self._say(
            f"profile of steps {first} to {end}: open {trace} at https://ui.perfetto.dev, or `pip install xprof` and "
            f"xprof --logdir {self._folder}"
        )
