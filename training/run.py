"""The run directory: everything a person needs to understand or resume a run is in it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cli import UserError
from training.config import EXECUTION_FIELDS


class RunDirectory:
    """Where the files of one run lie."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"

    def create_or_resume(self, config: dict) -> bool:
        """Write config.json, or check that the run there is the same one; returns whether there was one.

        config: JSON values, with the fingerprints of tokenizer and data. Fields of EXECUTION_FIELDS may differ, and the
        file then holds the new values. UserError for another run's folder or a folder of other things.
        """
        config = json.loads(json.dumps(config))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a run needs a folder: give another --run-dir")
        known = self.config.exists()
        if known:
            self._check_same_run(config)
        elif self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UserError(f"{self.path} holds other files and no run; give another --run-dir, or an empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, config)
        return known

    def _check_same_run(self, config: dict) -> None:
        try:
            there = json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.config} is damaged ({error}); give another --run-dir") from None
        changes = list(_differences(identity(there), identity(config)))
        # A run that failed before its first step has nothing to lose: its settings may be corrected.
        begun = self.metrics.exists() and self.metrics.stat().st_size or any(self.checkpoints.glob("*"))
        if changes and begun:
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(changes)}; "
                "give another --run-dir, or the settings it was started with"
            )


def summarise(run: RunDirectory, result: Any, **more: Any) -> dict:
    """The `--json` object of a training session (training.loop.Result); summary.json holds it and the environment.

    more: what the door adds (metrics of a classifier).
    """
    names = ("step", "loss", "eval", "tokens", "tokens_per_second", "first_step_seconds", "mfu", "finished")
    summary = {name: getattr(result, name) for name in names} | more | {"run_dir": str(run.path)}
    if jax.process_index() == 0:
        write_json(run.summary, summary | {"environment": environment()})
    return summary


def environment() -> dict[str, str]:
    """Where this process runs, in words: versions and hardware."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    devices = {
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processes": str(jax.process_count()),
    }
    system = {"system": f"{platform.system()} {platform.machine()}", "CPU cores": str(os.cpu_count())}
    return {"Python": platform.python_version()} | versions | devices | system


def identity(config: Any) -> Any:
    """The part of a configuration that makes a run what it is: without EXECUTION_FIELDS, at any depth."""
    if isinstance(config, dict):
        return {key: identity(value) for key, value in config.items() if key not in EXECUTION_FIELDS}
    return [identity(value) for value in config] if isinstance(config, list) else config


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one, whole."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """`key: value there, now value here` for every leaf that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            nested = f"{name}.{key}" if name else key
            yield from _differences(there.get(key, "unset"), here.get(key, "unset"), nested)
    elif there != here:
        yield f"{name} was {there}, now {here}"
