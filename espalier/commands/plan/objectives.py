"""The pretraining objectives that can be planned for, and their presets. Imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from espalier.pretraining.objective import TextObjective
from espalier.task import TASKS, find

OBJECTIVES: Mapping[str, TextObjective] = {
    record.command: record for record in reversed([*map(find, TASKS)]) if isinstance(record, TextObjective)
}
"""By the command that trains it; of several, the first in TASKS."""

PRESETS: Mapping[str, Mapping[str, Callable[[], Any]]] = {
    command: importlib.import_module(f"{command}.presets").PRESETS for command in OBJECTIVES
}
"""Command → its presets."""


def objective_of(config: Any) -> TextObjective:
    """The record of the objective that a pretraining configuration is for, a user's own included."""
    record = find(config.task).chosen(config)
    assert isinstance(record, TextObjective), config.task
    return record
