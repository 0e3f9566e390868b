"""Chooses a mesh for `--mesh auto`: the simplest layout that fits the memory of the chips.

Copies of the model cost one all-reduce a step, splitting it by ZeRO-3 an all-gather a layer, splitting tokens one of
keys and values a layer, splitting heads two exchanges of activations a layer (Rajbhandari et al. 2020; Grattafiori et
al. 2024, section 3.3.2; Shoeybi et al. 2019): they are tried in this order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from espalier.errors import UserError
from sharding.mesh import MeshConfig

KEPT_FREE = 0.1
"""Part of the memory, for what the estimate leaves out: fragmentation and buffers of the network."""
MOST_TENSOR = 8
"""Largest axis `tensor`: more devices are too far apart for its exchanges in each layer."""


class Task(NamedTuple):
    """The sizes that a mesh must divide evenly."""

    devices: int
    slices: int
    """Groups of devices with a slower network between them, which the axis replica crosses."""
    batch_size: int
    """Rows of a step."""
    accumulation: int
    """Micro-batches of a step."""
    length: int
    """Tokens of a row; 1 = rows must not be split."""
    heads: int
    """What tensor must divide: key/value heads and MLP width, as one number."""
    width: int
    """What fsdp must divide: the width D, and that of the embeddings."""


def layouts(task: Task) -> Iterator[MeshConfig]:
    """Every mesh over all devices that divides the task, the simplest first."""
    within = task.devices // task.slices
    tensors = [n for n in range(1, min(MOST_TENSOR, within) + 1) if within % n == task.heads % n == 0]
    splits = [n for n in _divisors(within) if task.length % (128 * n) == 0 or n == 1]
    for tensor, sequence in sorted(((t, s) for t in tensors for s in splits), key=lambda pair: (math.prod(pair), pair)):
        copies, rest = divmod(within, tensor * sequence)
        if rest or task.batch_size % (copies * task.slices * task.accumulation):
            continue
        for fsdp in _divisors(copies):
            if task.width % fsdp == 0:
                yield MeshConfig(copies // fsdp, fsdp, tensor, sequence, task.slices)


def advise(task: Task, need: Callable[[MeshConfig], float], limit: float | None) -> tuple[MeshConfig, str]:
    """(mesh, why): the first layout that fits the limit with KEPT_FREE of it left.

    need: bytes of a device. limit: of a device; None = unknown, then copies of the whole model. UserError where no mesh
    divides the task or holds it.
    """
    needs: list[tuple[float, MeshConfig]] = []
    for mesh in layouts(task):
        if limit is None:
            return mesh, "the simplest: the memory of these devices is not known"
        needs.append((need(mesh), mesh))
        if needs[-1][0] <= limit * (1 - KEPT_FREE):
            before = f"; {needs[0][1]} would need {_gigabytes(needs[0][0])}" if len(needs) > 1 else ""
            return mesh, f"it needs about {_gigabytes(needs[-1][0])} of the {_gigabytes(limit)} of a device{before}"
    if not needs:
        unit = task.devices * task.accumulation
        raise UserError(
            f"no mesh of {task.devices} devices divides batch_size={task.batch_size} in accumulation="
            f"{task.accumulation} evenly; try --batch-size {-(-task.batch_size // unit) * unit}"
        )
    assert limit is not None
    least, mesh = min(needs, key=lambda pair: pair[0])
    raise UserError(
        f"no mesh of {task.devices} devices holds this: {mesh} needs the least, about {_gigabytes(least)} of the "
        f"{_gigabytes(limit)} of a device; try --execution.remat full, a larger --accumulation, or more devices"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
