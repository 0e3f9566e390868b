"""What a contender says at its end, as one line of JSON."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping, Sequence


def report(began: float, losses: Sequence[float], ends: Sequence[float], versions: Mapping[str, str]) -> None:
    """Print the losses, when each step ended (seconds since the process began), the most memory held, versions.

    began, ends: by time.perf_counter. Memory: of the host, in bytes; of a GPU too where there is one.
    """
    print(
        json.dumps(
            {
                "losses": list(losses),
                "ends": [end - began for end in ends],
                "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "device_bytes": _device_bytes(),
                "versions": dict(versions),
            }
        ),
        flush=True,
    )


def _device_bytes() -> int | None:
    import sys

    if "jax" in sys.modules:
        import jax

        device = jax.local_devices()[0]
        return (device.memory_stats() or {}).get("peak_bytes_in_use") if device.platform == "gpu" else None
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
