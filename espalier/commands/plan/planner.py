"""Makes a plan: whether a run fits, and how long it takes. Compiles for TPU slices; analysis for everything else."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from espalier.commands.plan.compile.program import compile_step
from espalier.commands.plan.compile.slices import devices_of, parse_topology
from espalier.commands.plan.objectives import objective_of
from espalier.commands.plan.plan import Hardware, Layout, Plan
from espalier.commands.plan.settings import PlanSettings, as_tokens
from espalier.commands.plan.time.amounts import Job
from espalier.commands.plan.time.roofline import StepTime, bill, step_time, together
from espalier.errors import UserError
from espalier.models.attention import choose_backend
from espalier.models.attention_backend import Backend, Use
from espalier.models.config import ModelConfig
from espalier.models.counts import count_params
from espalier.models.layout import memory_of, task_of
from espalier.models.memory import Memory
from espalier.models.memory import together as in_one_step
from espalier.models.transformer import scans
from sharding.advice import KEPT_FREE, Task, advise, layouts
from sharding.mesh import AXES, MeshConfig, build_mesh, check_batch, off_torus
from sharding.topology import chip_named

COMPILATIONS = 4
"""How many candidates of a search are compiled at most."""
REMATS = ("none", "dots", "full")


def make_plan(config: Any, settings: PlanSettings) -> Plan:
    """The plan of a pretraining configuration. UserError for impossible settings, before any compilation.

    config: a pretraining.config.TextConfig, which may be `settings` too (plan.settings.PRESETS).
    """
    hardware = find_hardware(settings)
    length = config.data.sequence_length
    model = config.model.fitted(config.model.vocab_size, length)
    planner = Planner(config, model, hardware)
    if hardware.slice:
        planner.devices()
    mesh, why = planner.mesh()
    asked = planner.layout(mesh, config.accumulation, config.execution.remat, compiling=True)
    found, tried = planner.search(asked) if settings.search and not asked.fits else (None, 0)
    layout = found or asked
    tokens = as_tokens(settings.tokens) if settings.tokens else float(config.steps * config.batch_size * length)
    job = planner.job(layout.mesh, layout.accumulation, layout.remat)
    return Plan(
        hardware=hardware,
        model=model,
        params=count_params(model, planner.objective.head),
        rows=config.batch_size,
        length=length,
        tokens=tokens,
        asked=asked,
        why_mesh=why,
        attention_reason=planner.attention(mesh)[1],
        found=found,
        tried=tried,
        bill=bill(layout.time, job, tokens, settings.price),
    )


def find_hardware(settings: PlanSettings) -> Hardware:
    """The chips that the settings name."""
    if (settings.topology is None) == (settings.chip is None):
        given = "both --topology and --chip" if settings.topology else "no chips"
        raise UserError(f"{given} given; name a TPU slice (--topology v5e:4x4) or a chip (--chip h100 --chips 8)")
    if settings.chip and settings.slices != 1 or settings.topology and settings.chips != 1:
        one, other = ("--slices", "--chip") if settings.chip else ("--chips", "--topology")
        raise UserError(f"{one} does not go with {other}; write --topology v5e:4x4 --slices 2 or --chip h100 --chips 8")
    if settings.topology:
        wanted = parse_topology(settings.topology, settings.slices)
        return Hardware(wanted.chip, wanted.devices, wanted.count, wanted)
    assert settings.chip is not None
    chip = chip_named(settings.chip)
    return Hardware(chip, settings.chips * chip.devices_per_chip)


class Planner:
    """Layouts of one run on one kind of hardware."""

    def __init__(self, config: Any, model: ModelConfig, hardware: Hardware):
        self.config, self.model, self.hardware = config, model, hardware
        self.objective = objective_of(config)
        self.beside = self.objective.beside(config, model).values()
        self.platform = "tpu" if hardware.chip.architecture == "tpu" else "gpu"
        self.dtype = "float32" if config.execution.dtype == "float32" else "bfloat16"
        self.limit = hardware.chip.memory
        self._devices: list[Any] = []

    def mesh(self) -> tuple[MeshConfig, str | None]:
        """(mesh with all sizes known, why it was chosen if --mesh auto)."""
        config, devices = self.config, self.hardware.devices
        wanted, why = config.mesh, None
        if wanted.auto:
            wanted, why = advise(self._task(config), lambda mesh: self._memory(config, mesh).total, self.limit)
        elif self.hardware.slices > 1 and wanted.replica == 1:
            wanted = dataclasses.replace(wanted, replica=self.hardware.slices)
        if self.hardware.slice:
            wanted = off_torus(wanted, self.hardware.slice.shape)
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
        """Memory and time with a mesh, micro-batches and rematerialisation."""
        config = self._with(accumulation, remat)
        compiled = None
        if compiling and self.hardware.slice:
            config = dataclasses.replace(config, mesh=mesh)
            compiled = compile_step(config, build_mesh(mesh, self.devices()), self.hardware.chip)
        return Layout(
            mesh=mesh,
            accumulation=accumulation,
            remat=remat,
            attention=self.attention(mesh)[0].name,
            memory=self._memory(config, mesh),
            time=self.time(mesh, accumulation, remat),
            compiled=compiled,
            limit=compiled.limit if compiled else self.limit,
        )

    def search(self, asked: Layout) -> tuple[Layout | None, int]:
        """(the first layout that fits, candidates considered): the fastest by analysis first, then compiled."""
        # Estimates are scaled by the compiler's result if there is one; otherwise some memory is left free.
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

    def time(self, mesh: MeshConfig, accumulation: int, remat: Any) -> StepTime:
        """Of all models that are trained."""
        job = self.job(mesh, accumulation, remat)
        others = [dataclasses.replace(job, model=one.model, predicted_fraction=one.predicted) for one in self.beside]
        return together([step_time(one) for one in (job, *others)], job)

    def job(self, mesh: MeshConfig, accumulation: int, remat: Any) -> Job:
        """The step of the model as input of the time model."""
        config = self.config
        return Job(
            model=self.model,
            chip=self.hardware.chip,
            sequence_length=config.data.sequence_length,
            batch_rows=config.batch_size,
            mesh={axis: getattr(mesh, axis) for axis in AXES},
            accumulation=accumulation,
            predicted_fraction=self.objective.predicted(config),
            remat=remat,
            scan=self._scans(),
            optimizer=config.optimizer.name,
            attention="fused" if self.attention(mesh)[0].fused else "stored",
        )

    def attention(self, mesh: MeshConfig) -> tuple[Backend, str]:
        """(backend, reason): the one that would run on this platform."""
        use = Use.of(
            self.model,
            self.config.data.sequence_length,
            dtype=self.dtype,
            dropping=self.model.attention_dropout > 0,
            platform=self.platform,
            capability=self.hardware.chip.capability,
            parts=mesh.sequence,
            mixed=self.objective.mixed,
        )
        return choose_backend(self.config.execution.attention, use)

    def devices(self) -> list[Any]:
        assert self.hardware.slice is not None
        self._devices = self._devices or devices_of(self.hardware.slice)
        return self._devices

    def _scans(self) -> bool:
        return scans(self.model, self.config.execution, self.platform)

    def _with(self, accumulation: int, remat: Any) -> Any:
        execution = dataclasses.replace(self.config.execution, remat=remat)
        return dataclasses.replace(self.config, accumulation=accumulation, execution=execution)

    def _memory(self, config: Any, mesh: MeshConfig) -> Memory:
        how: Any = dict(attention=self.attention(mesh)[0].name, dtype=self.dtype, scan=self._scans())
        models = [(self.model, self.objective.head), *((one.model, one.head) for one in self.beside)]
        length = config.data.sequence_length
        return in_one_step([memory_of(config, model, head, mesh, length, **how) for model, head in models])

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
