"""The plan of a run: does it fit, and how long does it take. Compiles for TPU slices, computes for everything else."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from espalier.commands.plan.amounts import Job
from espalier.commands.plan.compiled import (
    Compiled,
    Slice,
    compile_step,
    devices_of,
    gathers_by_reducing,
    parse_topology,
)
from espalier.commands.plan.roofline import Bill, StepTime, bill, step_time
from espalier.commands.plan.settings import as_tokens
from espalier.errors import UserError
from espalier.models.attention import choose_backend
from espalier.models.attention_backend import Use
from espalier.models.config import ModelConfig
from espalier.models.counts import count_params
from espalier.models.layout import memory_of, task_of
from espalier.models.memory import Memory
from espalier.models.transformer import scans
from sharding.advice import KEPT_FREE, Task, advise, layouts
from sharding.mesh import AXES, MeshConfig, build_mesh, check_batch
from sharding.topology import Chip, chip_named

COMPILATIONS = 4
"""How many candidates of a search are compiled at most."""
REMATS = ("none", "dots", "full")


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
    """How a run is carried out, and what comes of it."""

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
        """Bytes of a device: the compiler's word, or else the estimate."""
        return self.compiled.peak if self.compiled else self.memory.total

    @property
    def fits(self) -> bool:
        return self.compiled.fits if self.compiled else self.memory.total <= self.limit * (1 - KEPT_FREE)

    @property
    def flags(self) -> str:
        return f"{self.mesh.flags} --accumulation {self.accumulation} --execution.remat {self.remat}"


@dataclass(frozen=True)
class Plan:
    """All that is known before a run."""

    hardware: Hardware
    model: ModelConfig
    params: int
    rows: int
    length: int
    tokens: float
    """To train on."""
    asked: Layout
    why_mesh: str | None
    """Why the mesh was chosen, where it was."""
    attention_reason: str
    found: Layout | None
    """What fits instead, where what was asked for does not."""
    tried: int
    """Candidates that the search looked at."""
    bill: Bill

    @property
    def layout(self) -> Layout:
        """What the figures are for: what was asked for, or what fits instead."""
        return self.found or self.asked

    @property
    def hint(self) -> str | None:
        """What would be better about the mesh."""
        wanted, mesh = self.hardware.slice, self.layout.mesh
        if wanted is None or not gathers_by_reducing(wanted, mesh):
            return None
        data = min(wanted.shape)
        return (
            "fsdp is the whole of a 3-D torus, where the compiler gathers weights by all-reduces (twice the bytes, and "
            f"nothing beside them); --mesh.data {data} --mesh.fsdp {mesh.fsdp // data} gathers, if it fits"
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


def make_plan(config: Any) -> Plan:
    """The plan of a configuration of commands.plan.settings; UserError for what cannot be, before any compilation."""
    hardware = find_hardware(config)
    length = config.data.sequence_length
    model = config.model.fitted(config.model.vocab_size, length)
    planner = Planner(config, model, hardware)
    if hardware.slice:
        planner.devices()
    mesh, why = planner.mesh()
    asked = planner.layout(mesh, config.accumulation, config.execution.remat, compiling=True)
    found, tried = planner.search(asked) if config.search and not asked.fits else (None, 0)
    layout = found or asked
    tokens = as_tokens(config.tokens) if config.tokens else float(config.steps * config.batch_size * length)
    job = planner.job(layout.mesh, layout.accumulation, layout.remat)
    return Plan(
        hardware=hardware,
        model=model,
        params=count_params(model, planner.head),
        rows=config.batch_size,
        length=length,
        tokens=tokens,
        asked=asked,
        why_mesh=why,
        attention_reason=planner.attention(mesh)[1],
        found=found,
        tried=tried,
        bill=bill(layout.time, job, tokens, config.price),
    )


def find_hardware(config: Any) -> Hardware:
    """The chips that the settings name."""
    if (config.topology is None) == (config.chip is None):
        given = "both --topology and --chip" if config.topology else "no chips"
        raise UserError(f"{given} given; name a TPU slice (--topology v5e:4x4) or a chip (--chip h100 --chips 8)")
    if config.chip and config.slices != 1 or config.topology and config.chips != 1:
        one, other = ("--slices", "--chip") if config.chip else ("--chips", "--topology")
        raise UserError(f"{one} does not go with {other}; write --topology v5e:4x4 --slices 2 or --chip h100 --chips 8")
    if config.topology:
        wanted = parse_topology(config.topology, config.slices)
        return Hardware(wanted.chip, wanted.devices, wanted.count, wanted)
    chip = chip_named(config.chip)
    return Hardware(chip, config.chips * chip.devices_per_chip)


class Planner:
    """Layouts of one run on one kind of hardware."""

    def __init__(self, config: Any, model: ModelConfig, hardware: Hardware):
        self.config, self.model, self.hardware = config, model, hardware
        self.head = "causal_lm" if model.causal else "masked_lm"
        self.limit = hardware.chip.memory
        self._devices: list[Any] = []

    def mesh(self) -> tuple[MeshConfig, str | None]:
        """The mesh that was asked for, all sizes known, and why if it was left to us."""
        config, devices = self.config, self.hardware.devices
        wanted, why = config.mesh, None
        if wanted.auto:
            wanted, why = advise(self._task(config), lambda mesh: self._memory(config, mesh).total, self.limit)
        elif self.hardware.slices > 1 and wanted.replica == 1:
            wanted = dataclasses.replace(wanted, replica=self.hardware.slices)
        mesh = wanted.on(devices)
        product = math.prod(mesh.sizes(devices))
        if product != devices:
            raise UserError(
                f"mesh {mesh} has {product} devices and {self.hardware.name} has {devices}; "
                "set one axis to -1 = the rest, or try --mesh auto"
            )
        self._check(mesh)
        return mesh, why

    def layout(self, mesh: MeshConfig, accumulation: int, remat: str, *, compiling: bool) -> Layout:
        """What comes of a mesh, micro-batches and rematerialisation."""
        config = self._with(accumulation, remat)
        compiled = None
        if compiling and self.hardware.slice:
            config = dataclasses.replace(config, mesh=mesh)
            compiled = compile_step(config, build_mesh(mesh, self.devices()), self.hardware.chip)
        return Layout(
            mesh=mesh,
            accumulation=accumulation,
            remat=remat,
            attention=self.attention(mesh)[0],
            memory=self._memory(config, mesh),
            time=step_time(self.job(mesh, accumulation, remat)),
            compiled=compiled,
            limit=compiled.limit if compiled else self.limit,
        )

    def search(self, asked: Layout) -> tuple[Layout | None, int]:
        """(the first layout that fits, candidates looked at): by analysis the fastest first, and then compiled."""
        # Where the compiler has spoken, estimates are scaled by what it said; elsewhere some memory is left free.
        allowed = asked.limit * (1 - KEPT_FREE)
        if asked.compiled:
            allowed = asked.limit / max(1.0, asked.peak / asked.memory.total)
        tried, fitting = 0, []
        for accumulation in _doublings(self.config.accumulation, self.config.batch_size):
            for remat in REMATS[REMATS.index(self.config.execution.remat) :]:
                config = self._with(accumulation, remat)
                for mesh in dict.fromkeys([asked.mesh, *layouts(self._task(config))]):
                    if config.batch_size % (accumulation * mesh.replica * mesh.data * mesh.fsdp):
                        continue
                    tried += 1
                    if self._memory(config, mesh).total <= allowed:
                        fitting.append(self.layout(mesh, accumulation, remat, compiling=False))
        fitting.sort(key=lambda layout: layout.time.step)
        if self.hardware.slice is None:
            return (fitting[0] if fitting else None), tried
        for layout in fitting[:COMPILATIONS]:
            compiled = self.layout(layout.mesh, layout.accumulation, layout.remat, compiling=True)
            if compiled.fits:
                return compiled, tried
        return None, tried

    def job(self, mesh: MeshConfig, accumulation: int, remat: Any) -> Job:
        """The step, as the time model takes it."""
        config = self.config
        fraction = 1.0
        if not self.model.causal:
            fraction = (config.masking.rate + (config.masking.final_rate or config.masking.rate)) / 2
        return Job(
            model=self.model,
            chip=self.hardware.chip,
            sequence_length=config.data.sequence_length,
            batch_rows=config.batch_size,
            mesh={axis: getattr(mesh, axis) for axis in AXES},
            accumulation=accumulation,
            predicted_fraction=fraction,
            remat=remat,
            scan=self._scans(),
            optimizer=config.optimizer.name,
            attention="xla" if self.attention(mesh)[0] == "xla" else "flash",
        )

    def attention(self, mesh: MeshConfig) -> tuple[str, str]:
        """(backend, reason). On GPUs a fused kernel is assumed, whatever this version has there."""
        wanted = self.config.execution.attention
        if wanted == "xla":
            return "xla", "as asked"
        on_tpu = self.hardware.chip.architecture == "tpu"
        if not on_tpu and wanted == "auto":
            return "fused", (
                "assumed: a kernel that keeps no scores (cuDNN's, Triton's); this version runs XLA's attention on "
                "GPUs, which --execution.attention xla plans for"
            )
        use = Use.of(
            self.model,
            self.config.data.sequence_length,
            dtype="float32" if self.config.execution.dtype == "float32" else "bfloat16",
            dropping=self.model.attention_dropout > 0,
            platform="tpu" if on_tpu else "gpu",
            parts=mesh.sequence,
        )
        backend, reason = choose_backend(wanted, use)
        return backend.name, reason

    def devices(self) -> list[Any]:
        assert self.hardware.slice is not None
        self._devices = self._devices or devices_of(self.hardware.slice)
        return self._devices

    def _scans(self) -> bool:
        platform = "tpu" if self.hardware.chip.architecture == "tpu" else "gpu"
        return scans(self.model, self.config.execution, platform)

    def _with(self, accumulation: int, remat: Any) -> Any:
        execution = dataclasses.replace(self.config.execution, remat=remat)
        return dataclasses.replace(self.config, accumulation=accumulation, execution=execution)

    def _memory(self, config: Any, mesh: MeshConfig) -> Memory:
        return memory_of(
            config,
            self.model,
            self.head,
            mesh,
            config.data.sequence_length,
            attention="xla" if self.attention(mesh)[0] == "xla" else "splash",
            dtype="float32" if config.execution.dtype == "float32" else "bfloat16",
            scan=self._scans(),
        )

    def _task(self, config: Any) -> Task:
        return task_of(config, self.model, self.hardware.devices, self.hardware.slices, config.data.sequence_length)

    def _check(self, mesh: MeshConfig) -> None:
        """UserError for what does not divide, before any compilation."""
        config = self.config
        check_batch(mesh, self.hardware.devices, config.batch_size, config.accumulation, config.data.sequence_length)
        for axis, size, what in (
            ("tensor", self.model.kv_heads, f"{self.model.kv_heads} key/value heads"),
            ("tensor", self.model.intermediate_size, f"intermediate size {self.model.intermediate_size}"),
            ("fsdp", self.model.hidden_size, f"hidden size {self.model.hidden_size}"),
        ):
            if size % getattr(mesh, axis):
                fits = [n for n in range(1, getattr(mesh, axis) + 1) if size % n == 0][-2:]
                raise UserError(
                    f"mesh axis {axis}={getattr(mesh, axis)} does not divide the model's {what}; "
                    f"try {axis} = {' or '.join(map(str, fits))}"
                )


def _doublings(start: int, most: int) -> list[int]:
    values = [start]
    while most % (values[-1] * 2) == 0:
        values.append(values[-1] * 2)
    return values
