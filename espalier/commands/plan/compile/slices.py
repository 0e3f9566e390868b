"""TPU slices by name, and their devices as libtpu describes them on machines without a TPU."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import UserError
from sharding.mesh import is_torus
from sharding.topology import Chip, chip_named

if TYPE_CHECKING:
    from sharding.mesh import MeshConfig

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
MOST_CHIPS = 4096
EXAMPLES = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "4x4x4", "8x8x8", "16x16x16"),
}


@dataclass(frozen=True)
class Slice:
    """One or several TPU slices of a topology such as `v5e:16x16`."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.count

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.devices_per_chip


def parse_topology(text: str, count: int = 1) -> Slice:
    """`v5e:16x16` as a Slice; UserError that lists the known ones."""
    name, _, dimensions = text.strip().lower().partition(":")
    if name not in TPUS:
        raise UserError(f"unknown topology {text!r}; it is one of {_known()}, for instance v5e:4x4")
    chip = chip_named(name)
    examples = ", ".join(f"{name}:{shape}" for shape in EXAMPLES[chip.torus_dimensions])
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", dimensions) or dimensions.count("x") + 1 != chip.torus_dimensions:
        raise UserError(
            f"topology {text!r}: {name} slices have {chip.torus_dimensions} dimensions; for instance {examples}"
        )
    found = Slice(chip, tuple(int(part) for part in dimensions.split("x")), count)
    if count < 1:
        raise UserError(f"slices={count} must be at least 1")
    if found.chips > MOST_CHIPS:
        raise UserError(f"topology {text!r} × {count} has {found.chips} chips; at most {MOST_CHIPS} are planned for")
    return found


def gathers_by_reducing(wanted: Slice, mesh: MeshConfig) -> bool:
    """Whether the compiler gathers weights that `fsdp` splits by all-reduces of parts padded with zeros.

    It does if the axis is the whole of a three-dimensional torus (found by compiling, libtpu 0.0.41). An all-reduce
    moves twice the bytes, and no computation overlaps with it.
    """
    whole = mesh.fsdp == wanted.devices // wanted.count
    return whole and is_torus(wanted.shape)


def devices_of(wanted: Slice) -> list[Any]:
    """The devices of a slice as libtpu describes them; UserError if there is no such slice."""
    _find_libtpu()
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": wanted.count} if wanted.count > 1 else {}
    if wanted.chip.name == "v4":
        options["chip_config_name"] = "megacore"
    if math.prod(wanted.shape) < 4:
        options["chips_per_host_bounds"] = (*wanted.shape, 1)[:3]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=wanted.name, **options)
    except Exception as error:
        examples = ", ".join(f"{wanted.chip.name}:{shape}" for shape in EXAMPLES[wanted.chip.torus_dimensions])
        said = " ".join(str(error).split())[:200]
        raise UserError(f"no topology {wanted.name} ({said}); for instance {examples}") from None
    return list(found.devices)


def _known() -> str:
    return ", ".join(f"{name}:{'AxB' if chip_named(name).torus_dimensions == 2 else 'AxBxC'}" for name in TPUS)


def _find_libtpu() -> None:
    """Tell JAX where libtpu is, and libtpu that there is no TPU; UserError if it is not installed."""
    # Otherwise libtpu asks the cloud's metadata server, and only one process at a time may load it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "TPU_LIBRARY_PATH" in os.environ:
        return
    folder = Path(sys.prefix) / ".espalier" / "libtpu" / "libtpu" / "libtpu.so"
    if folder.is_file():
        os.environ["TPU_LIBRARY_PATH"] = str(folder)
        return
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "--topology compiles with libtpu, which is not installed; `./launch.sh plan` installs it, or name its file "
            "in TPU_LIBRARY_PATH"
        ) from None
