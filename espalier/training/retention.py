"""Which checkpoints of a run may go once a newer one is complete: the newest stay, multiples of a step, the best, and
what a budget of bytes allows. A leaf that reads no files, so that every case can be tried.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from espalier.errors import UserError

if TYPE_CHECKING:
    from espalier.training.config import CheckpointConfig

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Removal(NamedTuple):
    """What may be deleted now."""

    steps: list[int]
    """In the order in which they go: oldest first."""
    over: int = 0
    """Bytes by which what stays and one more checkpoint exceed the budget; 0 where they fit."""


def removal(sizes: Mapping[int, int], config: CheckpointConfig, best: Collection[int] = ()) -> Removal:
    """The steps that may go, once the newest of them is complete.

    sizes: step → bytes of each complete checkpoint. best: steps that stay however old they are. The budget asks for
    room for one more checkpoint as large as the newest, because an old one goes only when the next is complete: the
    oldest of what the other rules keep go for it. Neither the newest nor one of the best ever goes.
    """
    steps = sorted(sizes)
    newest, best = steps[-1], set(best)
    recent = set(steps[-config.keep :])

    def stays(step: int) -> bool:
        forever = config.keep_every is not None and step % config.keep_every == 0
        return step in recent or step in best or forever

    gone = [step for step in steps if not stays(step)]
    if config.budget is None:
        return Removal(gone)
    over = sum(sizes[step] for step in steps if stays(step)) + sizes[newest] - bytes_of(config.budget)
    for step in steps:
        if over > 0 and stays(step) and step != newest and step not in best:
            gone.append(step)
            over -= sizes[step]
    return Removal(sorted(gone), max(0, over))


def bytes_of(given: str) -> int:
    """`20GB`, `1.5 TiB`, `800000000` → bytes. UserError for anything else, and for less than 1 byte."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt]i?)?b?)", given.strip(), re.IGNORECASE)
    number = int(float(found[1]) * UNITS[(found[2] or "").lower()]) if found else 0
    if number < 1:
        raise UserError(f"checkpoint.budget={given} is no amount of bytes; give one as 20GB, 500MB, 1.5TB or 20GiB")
    return number
