"""Peak performance of each kind of chip, per JAX device: arithmetic, memory, and links between chips.

Training takes the peak for its MFU from this table, and `./launch.sh plan` its times and memory. Imports no JAX.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

from espalier.errors import UserError

GB = 1e9
MIB = 2**20
GIB = 2**30

Architecture = Literal["tpu", "volta", "turing", "ampere", "ada", "hopper", "blackwell"]


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator; every figure is for one JAX device, bandwidths in bytes/s."""

    name: str
    """As on the command line."""
    device_kind: str
    """Pattern of JAX's `device_kind`."""
    architecture: Architecture
    flops: float
    """Dense bfloat16 FLOP/s at the highest clock; float16 where there is no bfloat16 (V100, T4)."""
    memory: float
    """Bytes available to a program. On TPU the compiler's limit, from its messages "Used … of … hbm"."""
    memory_bandwidth: float
    fast_bandwidth: float
    """Of a device to its neighbours, all links together, in one direction: NVLink, PCIe, or ICI (links of a chip ×
    bandwidth of one link in one direction ÷ devices of the chip)."""
    slow_bandwidth: float
    """Of a device beyond the fast domain, in one direction: its share of the host's network cards."""
    fast_domain: int | None
    """Devices connected by fast links: GPUs of a node or rack; None = a whole TPU slice, however large."""
    torus_dimensions: int = 0
    """Of a TPU slice's torus; 0 = a switch, where any group of devices has the whole bandwidth."""
    devices_per_chip: int = 1
    """JAX shows each half of some TPU chips as a device; what is rented and billed is the chip."""
    aliases: tuple[str, ...] = ()
    sustained_clock: float = 1.0
    """Base clock ÷ boost clock, for chips whose low power limit keeps them from holding the peak; 1 where the fitted
    efficiency of the architecture (plan/time/roofline.py) already contains it."""

    @property
    def capability(self) -> float | None:
        """Compute capability of an NVIDIA GPU, by its architecture; None of a TPU."""
        return CAPABILITIES.get(self.architecture)


CAPABILITIES = {"volta": 7.0, "turing": 7.5, "ampere": 8.0, "ada": 8.9, "hopper": 9.0, "blackwell": 10.0}
"""The lowest of an architecture."""


# TPU: peaks, HBM and its bandwidth per chip from the Google Cloud TPU documentation (docs.cloud.google.com/tpu/docs/
# v2, v3, v4, v5e, v5p, v6e, tpu7x, "System architecture"); one link one way from "How to Scale Your Model" (Austin et
# al. 2025), chapter "How to Think About TPUs": v3 100 GB/s, v4 and v5e 45, v5p, v6e and 7x 90 (v2: 496 Gb/s, Jouppi et
# al. 2020); links: 2 a torus dimension. Slow network (DCN) per chip from the same book's chapter on training: v5p
# 6.25 GB/s, v5e 3.125, v6e 12.5; v4 the 25 GB/s of a host by its 4 chips, v2 and v3 half of that for each half chip; 7x
# 100 Gb/s a chip. Memory is what the compiler admits; for v2, v3 and 7x, of which no message is at hand, HBM less 2 %.
#
# GPU: NVIDIA data sheets: dense is half of a figure "with sparsity"; NVLink is half of the total of both directions.
# Memory as nvidia-smi shows it. Slow network: one 400 Gb/s card a GPU for Hopper and Blackwell (DGX H100, DGX B200
# user guides), 200 Gb/s for A100 (DGX A100), 100 Gb/s for V100 (DGX-2), a share of 100 Gb/s for inference cards
# (AWS g5/g6, Google g2 instances). Inference cards have no link of their own: PCIe, one direction.
#
# In each line: name, kind, architecture, FLOP/s, memory, its bandwidth, fast links, slow network, fast domain, and for
# TPU the dimensions of the torus and the devices of a chip.
CHIPS: tuple[Chip, ...] = (
    Chip("v2", r"TPU v2", "tpu", 46e12 / 2, 7.8 * GIB, 700 * GB / 2, 4 * 62 * GB / 2, 3.125 * GB, None, 2, 2),
    Chip("v3", r"TPU v3", "tpu", 123e12 / 2, 15.7 * GIB, 900 * GB / 2, 4 * 100 * GB / 2, 3.125 * GB, None, 2, 2),
    Chip("v4", r"TPU v4", "tpu", 275e12, 30.75 * GIB, 1228 * GB, 6 * 45 * GB, 6.25 * GB, None, 3),
    Chip("v5e", r"TPU v5 lite|TPU v5e", "tpu", 197e12, 15.75 * GIB, 819 * GB, 4 * 45 * GB, 3.125 * GB, None, 2),
    Chip("v5p", r"TPU v5p?", "tpu", 459e12, 95.74 * GIB, 2765 * GB, 6 * 90 * GB, 6.25 * GB, None, 3),
    Chip("v6e", r"TPU v6 lite|TPU v6e", "tpu", 918e12, 31.25 * GIB, 1640 * GB, 4 * 90 * GB, 12.5 * GB, None, 2),
    Chip("tpu7x", r"TPU7x", "tpu", 2307e12 / 2, 94 * GIB, 7380 * GB / 2, 6 * 90 * GB / 2, 12.5 * GB / 2, None, 3, 2),
    # GB200 NVL72: 360 PFLOP/s with sparsity, 13.4 TB and 576 TB/s of HBM3e, 130 TB/s of NVLink on 72 GPUs.
    Chip("gb200", r"GB200", "blackwell", 2500e12, 189_471 * MIB, 8000 * GB, 900 * GB, 50 * GB, 72),
    # HGX B200: 36 PFLOP/s with sparsity, 64 TB/s of HBM3e, 14.4 TB/s of NVLink on 8 GPUs.
    Chip("b200", r"B200", "blackwell", 2250e12, 183_359 * MIB, 8000 * GB, 900 * GB, 50 * GB, 8),
    Chip("h100-pcie", r"H100 PCIe", "hopper", 756e12, 81_559 * MIB, 2000 * GB, 64 * GB, 25 * GB, 8),
    Chip("h100-nvl", r"H100 NVL", "hopper", 835e12, 95_830 * MIB, 3900 * GB, 300 * GB, 25 * GB, 2),
    Chip("gh200", r"GH200", "hopper", 989e12, 97_871 * MIB, 4000 * GB, 450 * GB, 50 * GB, 1),
    Chip("h200", r"H200", "hopper", 989e12, 143_771 * MIB, 4800 * GB, 450 * GB, 50 * GB, 8),
    # SXM5: 1,979 with sparsity, 3.35 TB/s, 900 GB/s of NVLink.
    Chip("h100", r"H100", "hopper", 989e12, 81_559 * MIB, 3350 * GB, 450 * GB, 50 * GB, 8, aliases=("h100-80gb",)),
    # SXM4: 312, 600 GB/s of NVLink; HBM2 of 1,555 GB/s (40 GB) or HBM2e of 2,039 GB/s (80 GB).
    Chip("a100-40gb", r"A100.*40GB", "ampere", 312e12, 40_960 * MIB, 1555 * GB, 300 * GB, 25 * GB, 8),
    Chip("a100-80gb", r"A100", "ampere", 312e12, 81_920 * MIB, 2039 * GB, 300 * GB, 25 * GB, 8, aliases=("a100",)),
    # Base and boost clock in MHz: A10 885 and 1,695, L4 795 and 2,040, T4 585 and 1,590 (product briefs). L40S, with
    # 350 W, holds more than its base clock (1,110 of 2,520): 0.7 is a guess.
    Chip("a10g", r"A10G", "ampere", 70e12, 23_028 * MIB, 600 * GB, 32 * GB, 3.125 * GB, 1),
    Chip("a10", r"A10", "ampere", 125e12, 23_028 * MIB, 600 * GB, 32 * GB, 3.125 * GB, 1, sustained_clock=885 / 1695),
    Chip("l40s", r"L40S", "ada", 362e12, 46_068 * MIB, 864 * GB, 32 * GB, 3.125 * GB, 1, sustained_clock=0.7),
    # 242 with sparsity.
    Chip("l4", r"L4", "ada", 121e12, 23_034 * MIB, 300 * GB, 32 * GB, 3.125 * GB, 1, sustained_clock=795 / 2040),
    # Without bfloat16: float16 tensor cores.
    Chip("v100", r"V100", "volta", 125e12, 32_510 * MIB, 900 * GB, 150 * GB, 12.5 * GB, 8),
    Chip("t4", r"T4", "turing", 65e12, 15_360 * MIB, 320 * GB, 16 * GB, 3.125 * GB, 1, sustained_clock=585 / 1590),
)
"""A device is the first chip whose pattern matches whole words of its `device_kind`."""


def chip_named(name: str) -> Chip:
    """The chip of that name or alias, in any case; UserError that lists the known ones."""
    wanted = name.strip().lower()
    for chip in CHIPS:
        if wanted in (chip.name, *chip.aliases):
            return chip
    known = [known for chip in CHIPS for known in (chip.name, *chip.aliases)]
    near = difflib.get_close_matches(wanted, known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown chip {name!r}{meant}; known are {', '.join(chip.name for chip in CHIPS)}")


def chip_of(device: Any) -> Chip | None:
    """The chip of a `jax.Device`; None if it is not in the table (CPUs)."""
    for chip in CHIPS:
        if re.search(rf"(?<!\w)(?:{chip.device_kind})(?!\w)", device.device_kind):
            return chip
    return None


def peak_flops(device: Any) -> float | None:
    """Peak FLOP/s of a `jax.Device`; None if it is not in the table (CPUs)."""
    chip = chip_of(device)
    return chip and chip.flops
