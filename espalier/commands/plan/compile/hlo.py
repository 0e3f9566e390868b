"""Reads the compiler's text: collectives and largest tensors of a program (HLO), or why it does not fit."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Tensor:
    """A tensor in the memory of one device."""

    name: str
    shape: str
    size: float
    """Bytes."""


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text: str) -> dict[str, int]:
    """Number of collectives of each kind in HLO text; an asynchronous pair of start and done counts once."""
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}


def shapes_of(text: str, operation: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, shape) of every result of an operation in HLO text, also within tuples."""
    found = []
    for result in re.findall(rf"= (.*?) {operation}(?:-start)?\(", text):
        found += [(kind, _shape(sizes)) for kind, sizes in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", result)]
    return found


BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


def temporaries(text: str) -> Iterator[Tensor]:
    """Temporary tensors: stacks that a loop fills layer by layer, and the largest single results."""
    stacks = re.findall(r"= ([a-z]+\d+)\[([\d,]+)\]\S* custom-call\(\).*AllocateBuffer", text)
    for (kind, sizes), count in Counter(stacks).items():
        yield _stacked(f"{kind}[{sizes}]", count, math.prod(_shape(sizes)) * BYTES.get(kind, 4))
    pattern = r"= ([a-z]+\d+)\[([\d,]+)\]\S* (?:fusion|convolution|custom-call)\(.*?op_name=\"([^\"]*)\""
    for kind, sizes, name in re.findall(pattern, text):
        if (kind, sizes) not in stacks:
            yield Tensor(_short_name(name), f"{kind}[{sizes}]", math.prod(_shape(sizes)) * BYTES.get(kind, 4))


class TooLarge(NamedTuple):
    """The compiler's refusal of a program; bytes of one device."""

    used: float
    limit: float
    allocations: list[Tensor]
    """The largest."""


def too_large(message: str) -> TooLarge | None:
    """The compiler's error message, parsed, if it is about insufficient memory."""
    said = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", message)
    if not said:
        return None
    found = re.findall(r"Size: (\S+)\s+Operator: op_name=\"([^\"]*)\".*?\n\s+Shape: (\S+?)\{.*?\n", message, flags=re.S)
    sizes = {shape: _bytes(size) for size, _, shape in found}
    times = Counter(shape for *_, shape in found)
    allocations = [
        _stacked(shape, times[shape], sizes[shape])
        if name.startswith("broadcast")
        else Tensor(_short_name(name), shape, sizes[shape])
        for _, name, shape in found
    ]
    return TooLarge(_bytes(said[1]), _bytes(said[2]), allocations)


def _bytes(text: str) -> float:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(text.rstrip("KMGT")) * units.get(text[-1], 1)


def _stacked(shape: str, count: int, size: float) -> Tensor:
    layers = _shape(shape[shape.index("[") + 1 : -1])[0]
    times = f", {count} of them" if count > 1 else ""
    return Tensor(f"kept for the backward pass by {layers} layers{times}", shape, count * size)


def _shape(sizes: str) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes.split(",") if size)


def _short_name(name: str) -> str:
    """The end of an operation's path in JAX, without transformations."""
    return "/".join(re.sub(r"\b(jit|jvp|transpose|checkpoint|rematted_computation)\b|[()]", "", name).split("/")[-4:])
