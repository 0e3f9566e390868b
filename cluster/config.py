"""Settings of a preparation on many machines. They stand apart from the command, for pickled tasks name this module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from espalier.data.config import DataConfig
from espalier.errors import UserError


@dataclass(frozen=True)
class ClusterConfig:
    """Prepare text on many machines, as `./launch.sh prepare` does on one."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: int = 30522
    """Size of a tokenizer that is trained here."""
    causal: bool = False
    """For `clm` instead of `mlm`: a byte-level tokenizer then needs no [MASK]."""
    tasks: int = 8
    """Parts of the files; at most as many as there are files are of use."""
    executor: Literal["local", "slurm", "ray"] = "local"
    workers: int = 2
    """Tasks at a time on this machine (local)."""
    partition: str = "cpu"
    """Slurm's partition."""
    time: str = "12:00:00"
    """Slurm's limit for a task."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        for name in ("tasks", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
