"""The one place that builds device meshes and lays batches on them.

Axes (docs: DESIGN "Sharding"): `data` replicates parameters, `fsdp` splits parameters, optimizer state and
batch, `tensor` splits heads, MLP width and vocabulary. Imports JAX inside the functions only, because
presets import `MeshConfig` for the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cli import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1 = the rest of the devices."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Ways to split parameters, optimizer state and batch (ZeRO-3)."""
    tensor: int = 1
    """Ways to split heads, MLP width and vocabulary."""

    def sizes(self, device_count: int) -> tuple[int, int, int]:
        """Axis sizes on `device_count` devices, the -1 filled in; raises UserError where they do not fit."""
        sizes = [self.data, self.fsdp, self.tensor]
        given = " × ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh {given}: each axis is at least 1, and one of them may be -1 = the rest")
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes:
            if device_count % known:
                raise UserError(
                    f"mesh {given}: {known} does not divide the {device_count} devices; "
                    f"try axes whose product is one of {_divisors(device_count)}"
                )
            sizes[sizes.index(-1)] = device_count // known
        elif known > device_count:
            raise UserError(
                f"mesh {given} needs {known} devices and there are {device_count}; "
                "make an axis smaller, or set one to -1 = the rest"
            )
        data, fsdp, tensor = sizes
        return data, fsdp, tensor


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def build_mesh(config: MeshConfig, devices=None):
    """The mesh with axes data, fsdp, tensor over `devices` (default: all; fewer are used if the product is smaller)."""
    import jax

    if jax.process_count() > 1:
        raise UserError(
            f"this is one of {jax.process_count()} processes; training runs in a single one yet, on all of its devices"
        )
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices[: math.prod(sizes)])


def check_batch(config: MeshConfig, device_count: int, batch_size: int, accumulation: int = 1) -> None:
    """Raise UserError unless every micro-batch splits evenly over data × fsdp."""
    data, fsdp, _ = config.sizes(device_count)
    unit = data * fsdp * accumulation
    if batch_size % unit:
        low = max(unit, batch_size // unit * unit)
        raise UserError(
            f"batch_size={batch_size} is not divisible by data×fsdp×accumulation={data}×{fsdp}×{accumulation}={unit}; "
            f"try {low} or {low + unit}"
        )


def host_rows(batch_size: int) -> slice:
    """The rows of the global batch that this process loads: consecutive, in the order of the processes."""
    import jax

    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def place_batch(batch: dict, mesh) -> dict:
    """Lay a host's rows of a batch on the mesh: first axis over data × fsdp, the rest whole.

    batch: numpy arrays [rows of this process, …]. Returns global `jax.Array`s.
    """
    import jax

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def constrain(x, *axes):
    """Ask XLA to keep activation `x` split like this; a no-op without a mesh.

    axes: one entry a dimension: "batch" (= data × fsdp), "tensor" or None. A dimension that its axis does not divide
    (one prompt, two key/value heads) is left to XLA.
    """
    import jax

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    assert len(axes) == x.ndim, f"{len(axes)} axes for an array of shape {x.shape}"
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        names = BATCH_AXES if axis == "batch" else (axis,) if axis else ()
        fits = size % math.prod(mesh.shape[name] for name in names) == 0
        spec.append(names if fits else jax.sharding.PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))
