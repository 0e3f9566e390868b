"""The flags by which a command names the model that it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AskedModel:
    """Which model, and how it computes."""

    model: str
    """Run directory, or hf: before a folder in Hugging Face format or an id on the Hub."""
    step: int | None = None
    """Which checkpoint of the run; unset = the newest."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; bfloat16 is faster on GPUs and TPUs."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""
