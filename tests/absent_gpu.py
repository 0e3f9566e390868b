"""A GPU that is not here, for which JAX makes programs all the same."""

from typing import Any

import jax
from jax._src.mesh import AbstractDevice

from sharding.mesh import MeshConfig, build_mesh


def h100() -> jax.sharding.AbstractMesh:
    """A mesh of one H100; to be used by `jax.sharding.use_abstract_mesh`."""
    kind: dict[str, Any] = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": 132}
    # Where JAX knows a device's platform by more than its kind.
    kind |= {"platform": "gpu"} if "platform" in AbstractDevice.__annotations__ else {}
    like = build_mesh(MeshConfig(data=1), jax.devices()[:1])
    device = AbstractDevice(**kind)
    return jax.sharding.AbstractMesh(
        like.axis_sizes, like.axis_names, axis_types=like.axis_types, abstract_device=device
    )
