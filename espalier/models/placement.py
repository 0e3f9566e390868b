"""Parameters assembled on the devices from views on a file: each device gets its shard, piece by piece.

A stack of layers is larger than any of its tensors, and a host may hold less than its devices together. So every
device's part is made as zeros there and filled in place: the host never holds more than a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PIECE_BYTES = 2**24
"""What the host copies at a time."""

Part = tuple[tuple[int, ...], Any]
"""(index on the leading axes, view of what belongs there); it may end before the parameter does."""


def place(shape: jax.ShapeDtypeStruct, parts: list[Part], piece_bytes: int = PIECE_BYTES) -> jax.Array:
    """The parameter of this shape and sharding, made of `parts`; what no part covers is zero."""
    sharding = shape.sharding
    assert sharding is not None
    buffers = []
    for device, index in sharding.addressable_devices_indices_map(shape.shape).items():
        index = tuple(slice(*part.indices(size)) for part, size in zip(index or (), shape.shape, strict=True))
        local = tuple(part.stop - part.start for part in index)
        pieces = _pieces(index, parts, piece_bytes)
        if math.prod(local) * shape.dtype.itemsize <= piece_bytes:
            buffer = np.zeros(local, shape.dtype)
            for start, piece in pieces:
                depth = len(local) - piece.ndim
                ends = zip(start[depth:], piece.shape, strict=True)
                buffer[start[:depth] + tuple(slice(at, at + size) for at, size in ends)] = piece
            buffers.append(jax.device_put(buffer, device))
            continue
        # A mesh of its own, because the one that is set would want all of its devices in the computation.
        with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("one",))):
            buffer = _zeros(local, shape.dtype, device)()
            for start, piece in pieces:
                piece = jax.device_put(np.ascontiguousarray(piece, shape.dtype), device)
                # Waiting keeps the pieces that are on their way to one.
                buffer = jax.block_until_ready(_fill(buffer, piece, start))
        buffers.append(buffer)
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, buffers)


@cache
def _zeros(shape: tuple[int, ...], dtype: Any, device: Any) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=jax.sharding.SingleDeviceSharding(device))


@partial(jax.jit, donate_argnums=0)
def _fill(buffer: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    piece = piece.reshape((1,) * (buffer.ndim - piece.ndim) + piece.shape)
    return jax.lax.dynamic_update_slice(buffer, piece, start)


def _pieces(index: tuple[slice, ...], parts: list[Part], piece_bytes: int) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(start in the device's part, view) of everything that lies within `index`, none larger than piece_bytes."""
    for leading, view in parts:
        depth = len(leading)
        if not all(part.start <= at < part.stop for at, part in zip(leading, index[:depth], strict=True)):
            continue
        inside = index[depth:]
        window = view[
            tuple(slice(part.start, min(part.stop, size)) for part, size in zip(inside, view.shape, strict=True))
        ]
        if not window.size:
            continue
        start = tuple(at - part.start for at, part in zip(leading, index[:depth], strict=True))
        rows = max(1, piece_bytes // (4 * max(1, window[:1].size)))
        for row in range(0, len(window), rows):
            offset = np.array((*start, row) + (0,) * (len(inside) - 1), np.int32)
            yield tuple(offset), window[row : row + rows]
