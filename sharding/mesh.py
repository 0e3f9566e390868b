"""The one place that builds device meshes and places batches on them.

Axes, from the slowest network to the fastest: `replica` holds copies of the model on distant slices or nodes,
`data` copies on near devices, `fsdp` splits parameters, optimizer state and batch (ZeRO-3, Rajbhandari et al. 2020),
`sequence` splits the tokens of a row (each device gathers the keys and values of the whole row, as in Grattafiori et
al. 2024, section 3.3.2), `tensor` splits heads, MLP width and vocabulary (Shoeybi et al. 2019). Imports JAX inside the
functions only, because presets import `MeshConfig` for the command line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.short_help import often

if TYPE_CHECKING:
    import numpy as np

AXES = ("replica", "data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("replica", "data", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1 = the rest of the devices."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Ways to split parameters, optimizer state and batch (ZeRO-3). Beside an open `data`, -1 is all devices, or half
    of them where they are a whole 3-D torus (`off_torus`)."""
    tensor: int = 1
    """Ways to split heads, MLP width and vocabulary."""
    sequence: int = 1
    """Ways to split the tokens of a row, for rows too long for one device."""
    replica: int = 1
    """Copies on slices or nodes with a slower network between them."""
    auto: bool = often(False)
    """Choose the axes and say why. They follow from the model's size, the chips' memory and their connections."""

    def sizes(self, device_count: int) -> tuple[int, ...]:
        """Axis sizes in the order of AXES on `device_count` devices, the -1 filled in; UserError if they do not fit.

        Their product may be smaller than device_count: then some devices stay idle.
        """
        assert not self.auto, "the axes are not chosen yet (sharding.advice)"
        sizes = [getattr(self, name) for name in AXES]
        if self.data == -1 and sizes.count(-1) == 2:
            # The user set only one of them: the other is the default of `data`.
            sizes[AXES.index("data")] = 1
        given = " × ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True) if size != 1) or "data=1"
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
        return tuple(sizes)

    def on(self, device_count: int) -> MeshConfig:
        """The same mesh with every size known."""
        return dataclasses.replace(self, **dict(zip(AXES, self.sizes(device_count), strict=True)))

    @property
    def flags(self) -> str:
        """As command-line flags; the sizes must be known."""
        sizes = {name: getattr(self, name) for name in AXES if getattr(self, name) != 1 or name == "data"}
        return " ".join(f"--mesh.{name} {size}" for name, size in sizes.items())

    def __str__(self) -> str:
        return " × ".join(f"{name}={size}" for name in AXES if (size := getattr(self, name)) != 1) or "data=1"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def off_torus(config: MeshConfig, sides: tuple[int, ...]) -> MeshConfig:
    """The same mesh, or with `data` 2 where both `data` and `fsdp` are open and the devices are a whole 3-D torus.

    There the TPU's compiler would gather weights by all-reduces, which move twice the bytes (plan/compile/slices.py).
    sides: of the torus, () where there is none.
    """
    both = config.data == config.fsdp == -1 and config.sequence == config.tensor == 1 and not config.auto
    return dataclasses.replace(config, data=2) if both and is_torus(sides) else config


def is_torus(sides: tuple[int, ...]) -> bool:
    """Whether a slice of these sides is a torus of three dimensions; shorter sides do not close to rings."""
    return len(sides) == 3 and min(sides) >= 4


def torus_sides(devices) -> tuple[int, ...]:
    """Chips along each dimension of the slice (of the first of several) that TPU devices fill; () for other devices."""
    import numpy as np

    if devices[0].platform != "tpu":
        return ()
    slices = [getattr(d, "slice_index", None) or 0 for d in devices]
    where = [d.coords for d, number in zip(devices, slices, strict=True) if number == min(slices)]
    spread = np.ptp(np.array(where), axis=0) + 1
    full = len({tuple(place) for place in where}) == math.prod(spread.tolist())
    return tuple(spread.tolist()) if full else ()


def build_mesh(config: MeshConfig, devices=None):
    """The mesh over `devices` (default: all devices of all processes; fewer are used if the product is smaller).

    Devices are ordered so that the axes to the right connect the nearest ones. With several TPU slices, only `replica`
    crosses from one to the next.
    """
    import jax
    import numpy as np
    from jax.experimental import mesh_utils

    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    count = math.prod(sizes)
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh {config} has {count} of the {len(devices)} devices, but all processes need devices in it; "
            "set one axis to -1 = the rest"
        )
    slices = slice_count(devices)
    if slices > 1:
        if sizes[0] % slices:
            raise UserError(
                f"mesh {config}: the devices are {slices} slices, and only the axis replica crosses from one to "
                f"the next; try --mesh.replica {slices}"
            )
        within = (sizes[0] // slices, *sizes[1:])
        across = (slices, *(1,) * (len(AXES) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu" and count == len(devices):
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        # In JAX's order, so that devices of one process, and so of one node, are adjacent.
        grid = np.array(devices[:count]).reshape(sizes)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def slice_count(devices) -> int:
    """TPU slices among the devices. JAX calls each node of GPUs one too, but fast networks join them."""
    return len({getattr(d, "slice_index", None) or 0 for d in devices}) if devices[0].platform == "tpu" else 1


def check_batch(
    config: MeshConfig, device_count: int, batch_size: int, accumulation: int = 1, sequence_length: int | None = None
) -> None:
    """Raise UserError unless every micro-batch splits evenly over replica × data × fsdp, and rows over `sequence`."""
    replica, data, fsdp, sequence, _ = config.sizes(device_count)
    unit = replica * data * fsdp * accumulation
    if batch_size % unit:
        low = max(unit, batch_size // unit * unit)
        names, factors = ("replica×", f"{replica}×") if replica > 1 else ("", "")
        raise UserError(
            f"batch_size={batch_size} is not divisible by {names}data×fsdp×accumulation="
            f"{factors}{data}×{fsdp}×{accumulation}={unit}; try {low} or {low + unit}"
        )
    if sequence_length is not None and sequence_length % sequence:
        low = max(sequence, sequence_length // sequence * sequence)
        raise UserError(
            f"data.sequence_length={sequence_length} is not divisible by mesh axis sequence={sequence}; "
            f"try {low} or {low + sequence}"
        )


def token_axes(batch: dict, known: tuple[int, int] = (0, 0)) -> dict:
    """For every array of the batch, nested like it: which of its dimensions counts tokens; 0 = none does.

    Tokens are the last dimension of `input_ids`; of the arrays beside and below it, that dimension if it is as long.
    Others (candidates, classes, masked positions) stay whole. known: (dimension, length) from further up.
    """
    if "input_ids" in batch:
        known = batch["input_ids"].ndim - 1, batch["input_ids"].shape[-1]
    axis, length = known
    return {
        name: token_axes(part, known)
        if isinstance(part, dict)
        else axis * (part.ndim > axis and part.shape[axis] == length)
        for name, part in batch.items()
    }


def batch_sharding(shape: tuple[int, ...], mesh, tokens: int = 0):
    """The sharding of an array of the batch: rows over the batch axes, tokens over `sequence`.

    tokens: the dimension that counts them (see `token_axes`). Where the axis does not divide it, it is not split.
    """
    import jax

    split = tokens > 0 and shape[tokens] % mesh.shape["sequence"] == 0
    names = (*(None,) * (tokens - 1), "sequence") if split else ()
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH_AXES, *names))


def host_rows(batch_size: int, mesh) -> np.ndarray:
    """The rows of the global batch that the devices of this process hold, in order: what it has to load."""
    import numpy as np

    indices = batch_sharding((batch_size,), mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def place_batch(batch: dict, mesh) -> dict:
    """Place a batch on the mesh. batch: NumPy arrays of the rows `host_rows`, nested or not; returns `jax.Array`s."""
    import jax
    import numpy as np

    blocks = math.prod(mesh.shape[name] for name in BATCH_AXES)
    held = host_rows(blocks, mesh)

    def place(array, tokens):
        rows = len(array) // len(held)

        def part(index):
            block = int(np.searchsorted(held, (index[0].start or 0) // rows))
            return array[(slice(block * rows, (block + 1) * rows), *index[1:])]

        shape = (rows * blocks, *array.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(shape, mesh, tokens), part)

    return jax.tree.map(place, batch, token_axes(batch))


def mesh_platform() -> str:
    """Platform ("cpu", "gpu", "tpu") of the current mesh; without one, that of this process.

    A mesh may consist of absent devices: a program is then compiled for them.
    """
    import jax

    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("tpu") else "gpu"


def mesh_capability() -> float | None:
    """Compute capability of the NVIDIA GPUs of the current mesh, or of this process; None for other devices.

    Of a GPU that is not here it is that of its architecture.
    """
    import jax

    from sharding.topology import chip_of

    if mesh_platform() != "gpu":
        return None
    if jax.default_backend() == "gpu":
        # "gfx90a" is AMD's.
        found = str(getattr(jax.local_devices()[0], "compute_capability", ""))
        return float(found) if re.fullmatch(r"\d+\.\d+", found) else None
    chip = chip_of(jax.sharding.get_abstract_mesh().abstract_device)
    return chip.capability if chip else None


def constrain(x, *axes):
    """Ask XLA to keep activation `x` split over these axes; a no-op without a mesh.

    axes: one entry a dimension: "batch" (= replica × data × fsdp), "sequence", "tensor", "tokens" (= sequence × tensor)
    or None. A dimension that its axis does not divide (one prompt, two key/value heads) is left to XLA; tokens are then
    split by "sequence" alone, if that divides.
    """
    import jax

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    assert len(axes) == x.ndim, f"{len(axes)} axes for an array of shape {x.shape}"
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        choices = {"batch": [BATCH_AXES], "tokens": [("sequence", "tensor"), ("sequence",)], None: [()]}
        fitting = (
            names for names in choices.get(axis, [(axis,)]) if size % math.prod(mesh.shape[name] for name in names) == 0
        )
        spec.append(next(fitting, jax.sharding.PartitionSpec.UNCONSTRAINED))
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))
