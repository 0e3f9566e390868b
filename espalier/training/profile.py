"""A trace of a few steps (`--profile A:B`), which XProf and Perfetto show: where the time of a step goes.

Process 0 writes it, of its own devices. Losses are those of a run without it, and a trace that cannot be written ends
no run.
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
        self._made = 0
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
            self._begin()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, state: Any, step: int) -> None:
        """Once this step has been called: after the last one wait for the device and write the trace."""
        if not self._tracing or self._window is None:
            return
        self._made = step
        if step >= self._window[1]:
            jax.block_until_ready(state)
            self.close()

    def _begin(self) -> None:
        options = jax.profiler.ProfileOptions()
        # Every call of Python would be in it, which slows down the steps and hides the device behind the host.
        options.python_tracer_level = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True, profiler_options=options)
            self._tracing = True
        except (OSError, RuntimeError) as error:
            self._window = None
            self._say(f"no profile is written to {self._folder}: {' '.join(str(error).split())[:300]}")

    def close(self) -> None:
        """End a trace that is still open, and say where it is."""
        if not self._tracing or self._window is None:
            return
        first, self._tracing, self._window = self._window[0], False, None
        try:
            jax.profiler.stop_trace()
            trace = max(self._folder.rglob("*perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        # ValueError: there is none.
        except (OSError, RuntimeError, ValueError) as error:
            self._say(f"the profile could not be written to {self._folder}: {' '.join(str(error).split())[:300]}")
            return
        # What a signal or an error ended has fewer than were asked for.
        end = max(first, self._made)
        self._say(
            f"profile of steps {first} to {end}: open {trace} at https://ui.perfetto.dev, or `pip install xprof` and "
            f"xprof --logdir {self._folder}"
        )
