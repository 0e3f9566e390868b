"""Espalier: language models pretrained, fine-tuned and looked into with JAX.

    import espalier

    model = espalier.load("runs/demo")  # or "hf:bert-base-uncased"
    model.logits(["To be, or not to be"])

Importing it is light: JAX is loaded by the first of these that is used. docs/python.md shows them at work.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from espalier import neighbours

if TYPE_CHECKING:
    from espalier.front import plan, sweep, train
    from espalier.loading import load
    from espalier.look.looked import look as look
    from espalier.predict.loaded import LoadedModel
    from espalier.report.inline import page
    from espalier.report.tables import metrics, settings

__version__ = "0.1.0"

_FRONT = {
    "LoadedModel": "espalier.predict.loaded",
    "load": "espalier.loading",
    "look": "espalier.look",
    "metrics": "espalier.report.tables",
    "page": "espalier.report.inline",
    "plan": "espalier.front",
    "settings": "espalier.report.tables",
    "sweep": "espalier.front",
    "train": "espalier.front",
}
"""Name → the module that has it."""

__all__ = ["LoadedModel", "load", "look", "metrics", "page", "plan", "settings", "sweep", "train"]

neighbours.take()
if "ipykernel" in sys.modules:
    from espalier import library_log

    library_log.begin_in_notebook()


def __getattr__(name: str) -> Any:
    if name not in _FRONT:
        raise AttributeError(f"module 'espalier' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_FRONT[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
