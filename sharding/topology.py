"""What each kind of chip can do at most: dense bfloat16 FLOP/s per JAX device, for model FLOP utilisation."""

from __future__ import annotations

import re
from typing import Any

PEAKS: tuple[tuple[str, float], ...] = (
    # Google Cloud TPU documentation, "Peak compute per chip (bf16)". v2, v3 and 7x show each half chip as a device.
    (r"TPU v2", 46e12 / 2),
    (r"TPU v3", 123e12 / 2),
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"TPU7x", 2307e12 / 2),
    # NVIDIA data sheets; where they give the figure with sparsity, half of it.
    (r"GB200", 2500e12),  # GB200 NVL72: 360 PFLOP/s with sparsity on 72 GPUs
    (r"B200", 2250e12),  # HGX B200: 36 PFLOP/s with sparsity on 8 GPUs
    (r"H100 PCIe", 756e12),  # 1,513 with sparsity
    (r"H100 NVL", 835e12),  # 1,671 with sparsity
    (r"H100|H200|GH200", 989e12),  # SXM: 1,979 with sparsity
    (r"A100", 312e12),
    (r"A10G", 70e12),
    (r"A10", 125e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),  # 242 with sparsity
    # Without bfloat16: float16 tensor cores.
    (r"V100", 125e12),
    (r"T4", 65e12),
)
"""(pattern of `device_kind`, peak); the first that matches whole words counts."""


def peak_flops(device: Any) -> float | None:
    """Peak of one `jax.Device`, None for a kind that is not in the table (CPUs)."""
    for pattern, peak in PEAKS:
        if re.search(rf"(?<!\w)(?:{pattern})(?!\w)", device.device_kind):
            return peak
    return None
