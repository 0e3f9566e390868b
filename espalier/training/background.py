"""What lets a checkpoint be written beside the training steps: a copy that stays as it is, and threads that give way.

Where training uses every core (on CPUs), threads of equal priority that compress and hash took a fifth to a third of
it from each step meanwhile. With a lower one they take what steps leave idle, and the write takes as much longer.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

NICENESS = 15
"""Of the threads that write: under 4 % of a core that a step wants too (`sched(7)`: a level is worth 1.25)."""
LARGE = 2**24
"""Bytes of a state from which on its writing is noticed; below, it should be over soon on a busy machine too."""
TASKS = Path("/proc/self/task")
WRITERS = "ts_pool"
"""How the names of TensorStore's threads begin."""


def held(state: Any) -> Any:
    """The arrays of a state that is about to be donated, to be written meanwhile.

    On CPUs a copy: Orbax would hold the buffers themselves, and a step that cannot have them makes new ones, which
    takes longer. Elsewhere Orbax copies them to the host before it returns.
    """
    return jax.tree.map(_copy, state) if jax.default_backend() == "cpu" else state


def threads() -> set[int]:
    """The threads of this process, by the numbers that Linux gives them; none elsewhere."""
    return {int(folder.name) for folder in TASKS.glob("*")}


def give_way(before: set[int]) -> None:
    """Lower the priority of all threads that have begun since, and of TensorStore's, for as long as they live.

    before: the threads that were there when the save began. What those that are lowered start inherits it.
    """
    lowered: set[int] = set()
    # Again, until none was started meanwhile by one that was not lowered yet.
    while new := {number for number in threads() if number not in before or _writes(number)} - lowered:
        for number in new:
            lower(number)
        lowered |= new


def lower(thread: int) -> None:
    """Lower the priority of one thread."""
    # It has ended; a container forbids it; elsewhere than on Linux a thread has none of its own.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, NICENESS)


def _writes(thread: int) -> bool:
    try:
        return (TASKS / str(thread) / "comm").read_text().startswith(WRITERS)
    except OSError:
        return False


def _copy(array: jax.Array) -> jax.Array:
    if not isinstance(array, jax.Array):
        return np.array(array)
    parts = [jax.device_put(part.data, part.device, may_alias=False) for part in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
