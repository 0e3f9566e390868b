"""The checkpoints of a run: `./launch.sh checkpoint list|verify|show RUN`. Changes nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from espalier import cli, progress
from espalier.errors import UserError

if TYPE_CHECKING:
    from espalier.training.run import RunDirectory

MAIN = ("task", "command", "init_from", "imported_from", "steps", "batch_size", "seed", "accumulation")
"""Of a configuration, what is shown as it is; besides, the main settings of model and optimizer."""
PARTS = {
    "model": ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    "optimizer": ("name", "learning_rate", "schedule", "warmup"),
}


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints of a run: `checkpoint list RUN` (step, size, time, which are damaged by the look of it, the best,
    what was set aside), `checkpoint verify RUN` (every file is read; exit code 1 if one is damaged), `checkpoint show
    RUN` (the tensors of one, where its data goes on, its settings)."""

    what: Literal["list", "verify", "show"]
    """What is asked."""
    run_dir: str
    """The run directory."""
    step: int | None = None
    """Only this checkpoint; unset = all, and the newest for show."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: CheckpointConfig) -> dict[str, Any]:
    """Print what is asked; returns the `--json` object."""
    from espalier.training.run import RunDirectory

    run = RunDirectory(config.run_dir)
    rows = list(_rows(run))
    if config.step is not None:
        rows = [row for row in rows if row["step"] == config.step] if _known(rows, config.step) else []
    if not rows:
        there = ", ".join(str(row["step"]) for row in _rows(run))
        which = f" of step {config.step}" if config.step is not None else ""
        more = f"; there are {there}" if there else "; give the folder of a run that has saved one"
        raise UserError(f"no checkpoint{which} in {run.checkpoints}{more}")
    if config.what == "show":
        return _shown(run, rows)
    if config.what == "verify":
        return _verified(run, [row for row in rows if row["state"] in ("complete", "damaged")], config.step is None)
    lines = [("step", "size", "written", "state")]
    for row in rows:
        state = row["state"] + (f": {row['damage']}" if row["damage"] else "") + (", the best" if row["best"] else "")
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["written"]))
        lines.append((Path(row["path"]).name, progress.size(row["bytes"]), written, state))
    widths = [max(len(line[at]) for line in lines) for at in range(3)]
    for step, size, written, state in lines:
        print(f"{step:>{widths[0]}}  {size:>{widths[1]}}  {written:{widths[2]}}  {state}")
    return {"run_dir": str(run.path), "checkpoints": rows}


def _known(rows: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any(row["step"] == step for row in rows)


def _rows(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """The checkpoints of a run as JSON values, oldest first: by names and sizes alone."""
    from espalier.training.fallback import best_step
    from espalier.training.manifest import MANIFEST, bytes_in, fault_by_size, is_unfinished

    folders = (path for path in run.checkpoints.glob("*") if path.is_dir() and path.name.partition(".")[0].isdecimal())
    for path in sorted(folders, key=lambda path: (int(path.name.partition(".")[0]), path.name)):
        step, _, after = path.name.partition(".")
        damage = None
        if after:
            state = "set aside" if after.startswith("damaged") else "unfinished"
        elif is_unfinished(run.checkpoints, int(step)):
            state = "unfinished"
        else:
            damage = fault_by_size(path)
            state = "damaged" if damage else "complete"
        manifest = path / MANIFEST
        yield {
            "step": int(step),
            "path": str(path),
            "bytes": bytes_in(path),
            "written": (manifest if manifest.exists() else path).stat().st_mtime,
            "state": state,
            "damage": damage,
            "best": not after and best_step(run) == int(step),
        }


def _verified(run: RunDirectory, rows: Sequence[Mapping[str, Any]], whole: bool) -> dict[str, Any]:
    """Read every file of these checkpoints, and the frozen parameters of a `whole` run; a line for each."""
    from espalier.training.manifest import bytes_in, fault

    places = {f"step {row['step']}": Path(row["path"]) for row in rows}
    if whole and (run.frozen / "0").is_dir():
        places["frozen"] = run.frozen / "0"
    found = []
    for name, path in places.items():
        began = time.perf_counter()
        with progress.waiting(f"reading {name}"):
            damage = fault(path)
        size, took = progress.size(bytes_in(path)), time.perf_counter() - began
        print(f"{name}: " + (f"damaged: {damage}" if damage else f"sound ({size}, {took:.1f} s)"))
        found.append({"name": name, "path": str(path), "damage": damage})
    return {
        "run_dir": str(run.path),
        "checkpoints": found,
        "damaged": sum(1 for one in found if one["damage"]),
    }


def _shown(run: RunDirectory, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from espalier.training.restore import read_config, read_data, saved_shapes

    there = [row["step"] for row in rows if row["state"] == "complete"]
    if not there:
        raise UserError(f"no checkpoint in {run.checkpoints} is sound: {rows[-1]['path']} is {rows[-1]['state']}")
    step = there[-1]
    tensors = {item: saved_shapes(run.checkpoints, step, item) for item in ("params", "opt_state")}
    listed = [
        {
            "item": item,
            "path": path,
            "shape": list(leaf.shape),
            "type": leaf.dtype.name,
            "bytes": math.prod(leaf.shape) * leaf.dtype.itemsize,
        }
        for item, leaves in tensors.items()
        for path, leaf in leaves.items()
    ]
    config, data = read_config(run.path, step), read_data(run.path, step)
    totals = {
        "parameters": sum(math.prod(one["shape"]) for one in listed if one["item"] == "params"),
        "parameter_bytes": sum(one["bytes"] for one in listed if one["item"] == "params"),
        "optimizer_bytes": sum(one["bytes"] for one in listed if one["item"] == "opt_state"),
    }
    path_width = max(len(f"{one['item']}/{one['path']}") for one in listed)
    shape_width = max(len(_shape(one["shape"])) for one in listed)
    for one in listed:
        name, size = f"{one['item']}/{one['path']}", progress.size(one["bytes"])
        print(f"{name:{path_width}}  {_shape(one['shape']):{shape_width}}  {one['type']:9} {size:>9}")
    lines = {
        "parameters": f"{totals['parameters']:,} ({progress.size(totals['parameter_bytes'])})",
        "optimizer state": progress.size(totals["optimizer_bytes"]),
        "step": str(step),
        "data goes on": _words(data) if data else "the checkpoint does not say",
        **{name: str(config[name]) for name in MAIN if config.get(name) is not None},
        **{
            name: _words({key: config[name].get(key) for key in keys}) for name, keys in PARTS.items() if name in config
        },
    }
    progress.block(lines)
    return {"run_dir": str(run.path), "step": step, "tensors": listed, "data": data, "config": config, **totals}


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "–"


def _words(values: Mapping[str, Any]) -> str:
    """Names and values on one line; what is itself a table is left out."""
    plain = {name: value for name, value in values.items() if value is not None and not isinstance(value, dict)}
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in plain.items()
    )


def command(argv: Sequence[str] | None = None) -> None:
    """Exit code 1 where `verify` found damage."""
    found: dict[str, Any] = {}

    def asked(config: CheckpointConfig) -> dict[str, Any]:
        found.update(main(config))
        return found

    cli.run_config(asked, CheckpointConfig, prog="checkpoint", argv=argv)
    if found.get("damaged"):
        raise SystemExit(1)


if __name__ == "__main__":
    from espalier import library_log

    library_log.begin()
    command()
