"""The mesh of a run: as requested, or chosen by the size of the model, the memory of a device and their number."""

from __future__ import annotations

import math
from typing import Any

import jax

from espalier.models.attention import choose_backend
from espalier.models.attention_backend import Use
from espalier.models.config import ModelConfig
from espalier.models.layers import compute_dtype
from espalier.models.memory import Memory, step_memory
from espalier.models.transformer import scans
from sharding.advice import Task, advise
from sharding.mesh import AXES, MeshConfig, build_mesh, check_batch, off_torus, slice_count, torus_sides
from sharding.processes.coordination import from_first
from sharding.topology import chip_of


def open_mesh(
    config: Any, model: ModelConfig, head: str, length: int, *, split: bool = True, mixed: bool = False
) -> jax.sharding.Mesh:
    """The mesh over all devices for a training configuration; a chosen one is printed with the reason.

    length: tokens of the longest row. split: whether rows may be split over the axis sequence. mixed: as
    attention_backend.Use. UserError where batch or row does not divide.
    """
    mesh = off_torus(config.mesh, torus_sides(jax.devices()))
    if mesh.auto:
        devices = jax.devices()
        dtype = compute_dtype(config.execution).name
        use = Use.of(model, length, dtype=dtype, dropping=model.attention_dropout > 0, mixed=mixed)
        attention, _ = choose_backend(config.execution.attention, use)

        def need(mesh: MeshConfig) -> float:
            return memory_of(
                config,
                model,
                head,
                mesh,
                length,
                attention=attention.name,
                dtype=dtype,
                scan=scans(model, config.execution),
            ).total

        task = task_of(config, model, len(devices), slice_count(devices), length if split else 1)
        # Of the first process, so that all choose the same.
        limit = from_first("memory of a device", _limit(jax.local_devices()[0]))
        mesh, why = advise(task, need, limit)
        if jax.process_index() == 0:
            print(f"mesh {mesh}: {why}", flush=True)
    check_batch(mesh, jax.device_count(), config.batch_size, config.accumulation, length if split else None)
    return build_mesh(mesh)


def task_of(config: Any, model: ModelConfig, devices: int, slices: int, length: int) -> Task:
    """What a mesh must divide for a training configuration."""
    return Task(
        devices=devices,
        slices=slices,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        length=length,
        heads=math.gcd(model.kv_heads, model.intermediate_size),
        width=math.gcd(model.hidden_size, model.embedding_width),
    )


def memory_of(
    config: Any,
    model: ModelConfig,
    head: str,
    mesh: MeshConfig,
    length: int,
    *,
    attention: str,
    dtype: str,
    scan: bool,
) -> Memory:
    """models.memory.step_memory of a training configuration on a mesh whose sizes are known."""
    return step_memory(
        model,
        head,
        {axis: getattr(mesh, axis) for axis in AXES},
        rows=config.batch_size,
        length=length,
        accumulation=config.accumulation,
        remat=config.execution.remat,
        attention=attention,
        dtype=dtype,
        moments=(config.optimizer.kind.moments, config.optimizer.kind.matrix_moments),
        scan=scan,
    )


def _limit(device: Any) -> float | None:
    """Bytes that programs may use on a device; None where that is not known (CPUs)."""
    known = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    chip = chip_of(device)
    return known or (chip.memory if chip else None)
