"""A plan: the hardware, the layout asked for, one that fits instead, time and cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from espalier.commands.plan.compile.program import Compiled
from espalier.commands.plan.compile.slices import Slice, gathers_by_reducing
from espalier.commands.plan.time.roofline import Bill, StepTime
from espalier.models.config import ModelConfig
from espalier.models.memory import Memory
from sharding.advice import KEPT_FREE
from sharding.mesh import AXES, MeshConfig
from sharding.topology import Chip


@dataclass(frozen=True)
class Hardware:
    """The devices that are planned for."""

    chip: Chip
    devices: int
    """As JAX counts them."""
    slices: int = 1
    slice: Slice | None = None
    """Where there is a compiler for it."""

    @property
    def name(self) -> str:
        if self.slice is None:
            return f"{self.chips} × {self.chip.name}"
        return f"{self.slice.count} × {self.slice.name}" if self.slices > 1 else self.slice.name

    @property
    def chips(self) -> int:
        return self.devices // self.chip.devices_per_chip


@dataclass(frozen=True)
class Layout:
    """One way to run the training, with its memory and time."""

    mesh: MeshConfig
    accumulation: int
    remat: str
    attention: str
    memory: Memory
    """By analysis."""
    time: StepTime
    compiled: Compiled | None
    limit: float
    """Bytes that a device has for a program."""

    @property
    def peak(self) -> float:
        """Bytes of a device: the compiler's, or else the estimate."""
        return self.compiled.peak if self.compiled else self.memory.total

    @property
    def fits(self) -> bool:
        return self.compiled.fits if self.compiled else self.memory.total <= self.limit * (1 - KEPT_FREE)

    @property
    def flags(self) -> str:
        return f"{self.mesh.flags} --accumulation {self.accumulation} --execution.remat {self.remat}"


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a run."""

    hardware: Hardware
    model: ModelConfig
    params: int
    rows: int
    length: int
    tokens: float
    """To train on."""
    asked: Layout
    why_mesh: str | None
    """Why the mesh was chosen; None if the user chose it."""
    attention_reason: str
    found: Layout | None
    """A layout that fits, if the one asked for does not."""
    tried: int
    """Candidates that the search considered."""
    bill: Bill

    @property
    def layout(self) -> Layout:
        """The layout that times are given for: the one asked for, or one that fits instead."""
        return self.found or self.asked

    @property
    def hint(self) -> str | None:
        """A suggestion for a better mesh."""
        wanted, mesh = self.hardware.slice, self.layout.mesh
        if wanted is None or not gathers_by_reducing(wanted, mesh):
            return None
        return (
            "fsdp is the whole of a 3-D torus, where the compiler gathers weights by all-reduces (twice the bytes, and "
            f"without overlap); --mesh.data 2 --mesh.fsdp {mesh.fsdp // 2} gathers, if it fits"
        )

    def as_json(self) -> dict[str, Any]:
        """The `--json` object. Bytes, FLOPs and seconds; a chip is what is rented."""
        per_chip = self.hardware.chip.devices_per_chip
        asked, layout = self.asked, self.layout
        return {
            "fits": asked.fits,
            "peak_bytes_per_chip": asked.peak * per_chip,
            "chip_bytes": asked.limit * per_chip,
            "params": self.params,
            "model_flops_per_token": layout.time.model_flops_per_token,
            "step_seconds": layout.time.step,
            "step_seconds_range": [layout.time.low, layout.time.high],
            "tokens_per_second_per_chip": layout.time.tokens_per_second_per_chip,
            "tokens_per_second": layout.time.tokens_per_second,
            "mfu": layout.time.mfu,
            "compile_seconds": asked.compiled.seconds if asked.compiled else None,
            "mesh": {axis: getattr(asked.mesh, axis) for axis in AXES},
            "basis": "compiled" if asked.compiled else "estimate",
            "hardware": self.hardware.name,
            "chips": self.hardware.chips,
            "batch_size": self.rows,
            "sequence_length": self.length,
            "accumulation": asked.accumulation,
            "remat": asked.remat,
            "attention": asked.attention,
            "memory": dataclasses.asdict(asked.memory),
            "argument_bytes_per_chip": asked.compiled.arguments * per_chip if asked.compiled else None,
            "temporary_bytes_per_chip": asked.compiled.temporary * per_chip if asked.compiled else None,
            "largest": [dataclasses.asdict(tensor) for tensor in asked.compiled.largest] if asked.compiled else [],
            "collectives": asked.compiled.collectives if asked.compiled else {},
            "kernels": asked.compiled.kernels if asked.compiled else None,
            "hint": self.hint,
            "time": layout.time.parts,
            "tokens": self.tokens,
            "days": self.bill.days,
            "chip_hours": self.bill.chip_hours,
            "cost": self.bill.cost,
            "suggestion": None
            if self.found is None
            else {
                "mesh": {axis: getattr(self.found.mesh, axis) for axis in AXES},
                "accumulation": self.found.accumulation,
                "remat": self.found.remat,
                "peak_bytes_per_chip": self.found.peak * per_chip,
                "flags": self.found.flags,
            },
        }
