"""The mesh of a run: as it was asked for, or chosen by the model's size, the chips' memory and their connections."""

from __future__ import annotations

from typing import Any

import jax

from models.attention import choose_backend
from models.config import ModelConfig
from models.layers import compute_dtype
from models.memory import step_memory
from models.transformer import scans
from sharding.advice import Task, advise
from sharding.mesh import AXES, MeshConfig, build_mesh, check_batch
from sharding.topology import chip_of


def open_mesh(config: Any, model: ModelConfig, head: str, length: int | None) -> jax.sharding.Mesh:
    """The mesh over all devices for a training configuration; a chosen one is told of, with the reason.

    length: tokens of a row; None = rows of several lengths, which are not split. UserError where the batch or the row
    does not divide.
    """
    mesh = config.mesh
    if mesh.auto:
        mesh, why = _chosen(config, model, head, length or model.max_position_embeddings)
        if jax.process_index() == 0:
            print(f"mesh {mesh}: {why}", flush=True)
    check_batch(mesh, jax.device_count(), config.batch_size, config.accumulation, length)
    return build_mesh(mesh)


def _chosen(config: Any, model: ModelConfig, head: str, length: int) -> tuple[MeshConfig, str]:
    devices = jax.devices()
    execution = config.execution
    dropping = model.attention_dropout > 0
    attention, _ = choose_backend(execution.attention, model, length, dropping=dropping, cached=False)

    def need(mesh: MeshConfig) -> float:
        return step_memory(
            model,
            head,
            {axis: getattr(mesh, axis) for axis in AXES},
            rows=config.batch_size,
            length=length,
            accumulation=config.accumulation,
            remat=execution.remat,
            attention=attention,
            dtype=compute_dtype(execution).name,
            muon=config.optimizer.name == "muon",
            scan=scans(model, execution),
        ).total

    task = Task(
        devices=len(devices),
        slices=len({getattr(device, "slice_index", None) or 0 for device in devices}),
        rows=config.batch_size // config.accumulation,
        length=length,
        heads=model.kv_heads,
        width=model.hidden_size,
    )
    return advise(task, need, _memory_of(jax.local_devices()[0]))


def _memory_of(device: Any) -> float | None:
    """Bytes that programs may use on a device; None where that is not known (CPUs)."""
    known = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    chip = chip_of(device)
    return known or (chip.memory if chip else None)
