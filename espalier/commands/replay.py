"""Execute steps of a run once more and compare them with what was logged: `./launch.sh replay RUN --from A --to B`.

A run is opened from its own config.json as the command that trains it would open it (espalier/assembly.py), and writes
nothing (espalier/training/replay.py).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import cli, progress, saved_config
from espalier.errors import MachineError, UserError
from sharding.processes.coordination import joined
from sharding.processes.discovery import DistributedConfig

if TYPE_CHECKING:
    from espalier.contracts import Origin
    from espalier.training.replay import Replayed
    from espalier.training.run import RunDirectory

PRESETS = ("mlm.presets", "clm.presets", "finetune.presets", "espalier.features.config")
"""Where the configurations of all tasks are."""
SPELLED = {"--from": "--from-step", "--to": "--to-step"}
"""Short flags → those of the fields, which cannot be called `from`."""


@dataclass(frozen=True)
class ReplayConfig:
    """Execute steps of a run once more and compare tensors and losses with what was logged: `replay RUN --from A --to
    B`. Says which tensor differs first, and within which steps; exit code 1 then. Writes nothing into the run.
    """

    run_dir: str
    """The run directory."""
    from_step: int | None = None
    """Also --from: the step of the checkpoint to begin with; 0 = where the run began; unset = the oldest one there."""
    to_step: int | None = None
    """Also --to: the last step to execute; unset = the last one logged."""
    trust_code: bool = False
    """Run the code of a user's own that the run names (an objective, masking, a text): the run may be anyone's."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


class Departure(MachineError):
    """A step that was executed once more is not what was logged."""


@joined
def main(config: ReplayConfig) -> dict[str, Any]:
    """Print what was compared; returns the `--json` object. Departure where something differs."""
    from espalier.training.run import RunDirectory

    run = RunDirectory(config.run_dir)
    first, last = _steps(run, config)
    found = _replayed(run, first, last, config.trust_code)
    result = dataclasses.asdict(found) | {"run_dir": str(run.path)}
    words = _compared(found)
    if found.difference is None:
        progress.say(f"{words} as logged")
        return result
    if config.json:
        progress.end()
        print(json.dumps(result))
    raise Departure(f"{run.path}: {found.difference}")


def _replayed(run: RunDirectory, first: int, last: int, trusted: bool) -> Replayed:
    from espalier import assembly
    from espalier.training.replay import replay

    kinds = [type(preset()) for module in PRESETS for preset in importlib.import_module(module).PRESETS.values()]
    saved = saved_config.read(str(run.path), dict.fromkeys(kinds), "replay")
    values = json.loads(run.config.read_text(encoding="utf-8"))
    if getattr(saved.config, "task", None) != values.get("task"):
        raise UserError(
            f"{run.path} holds a run of the task {values.get('task')!r}, which no command trains; runs of a task that "
            "was given in Python cannot be executed again"
        )
    if not trusted:
        saved_config.check_code(str(run.config), saved.config, instead="add --trust-code")
    config = _on_its_mesh(dataclasses.replace(saved.config, run_dir=str(run.path)), run, first)
    if first == 0 and not config.init_from and hasattr(config.data, "tokenizer"):
        # That which was trained then.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(run.tokenizer)))
    call = cli.Call(values.get("command"), saved.given)
    open_task = assembly.opened(config, call=call, origin_of=_origin_of(first))
    record, task, _, mesh, origin = open_task
    settings, defaults = assembly.recorded_settings(record, task, origin, call.command)
    run.check(settings, defaults, first, task.schedules)
    learnt, begins_at = assembly.learnable(record, task, mesh, origin)
    where = "its beginning" if first == 0 else f"checkpoint {first}"
    progress.say(f"{run.path}: steps {first + 1} to {last} once more, from {where}")
    return replay(task.config, learnt, run, mesh, begins_at, last, json.loads(json.dumps(settings)))


def _steps(run: RunDirectory, config: ReplayConfig) -> tuple[int, int]:
    """The checkpoint to begin with and the last step to execute; UserError where they will not do."""
    from espalier.training.manifest import complete_steps
    from espalier.training.replay import logged_steps

    if not run.config.is_file():
        raise UserError(f"{run.path} holds no run (no config.json); give the folder of a run")
    steps, done = complete_steps(run.checkpoints), logged_steps(run)
    there = sorted({0, *steps})
    first = config.from_step
    if first is None:
        first = steps[0] if steps and steps[0] < done else 0
    if first not in there:
        raise UserError(f"--from {first}: {run.path} has no such checkpoint; there are {', '.join(map(str, there))}")
    last = done if config.to_step is None else config.to_step
    if not first < last <= done:
        raise UserError(
            f"--from {first} --to {last}: {run.path} has logged steps up to {done}; --to lies after --from and at most "
            "there"
        )
    return first, last


def _origin_of(step: int) -> Callable[[Any, RunDirectory, Callable], Origin | None]:
    """For `assembly.opened`: the run's checkpoint of this step; of step 0, what the run began with."""
    from espalier.training.manifest import complete_steps
    from espalier.training.restore import read_config
    from espalier.training.run import RunDirectory
    from espalier.training.start import RunOrigin, find_origin

    def origin_of(config: Any, run: RunDirectory, open_hub: Callable) -> Origin | None:
        if step or 0 in complete_steps(run.checkpoints):
            return RunOrigin(run.path, step, read_config(run.path, step), resumed=True)
        # As of a run that has no checkpoint yet.
        with tempfile.TemporaryDirectory() as empty:
            return find_origin(config, RunDirectory(Path(empty) / "run"), open_hub)

    return origin_of


def _on_its_mesh(config: Any, run: RunDirectory, step: int) -> Any:
    """The configuration with the mesh and the micro-batches of the session that executed what followed this step."""
    import jax

    from espalier.training.checksums import logged
    from sharding.mesh import MeshConfig

    sessions = [line.began for line in logged(run) if line.began and line.step <= step]
    if not sessions or sessions[-1]["processes"] != jax.process_count():
        return config
    mesh = MeshConfig(**{"data": 1} | sessions[-1]["mesh"])
    if mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence * mesh.replica > jax.device_count():
        return config
    return dataclasses.replace(config, mesh=mesh, accumulation=sessions[-1]["accumulation"])


def _compared(found: Replayed) -> str:
    sums, losses = progress.plural(found.checksums, "line"), progress.plural(found.losses, "record")
    words = f"steps {found.first + 1} to {found.last}: {sums} of checksums and {losses} of the loss"
    if found.apart:
        progress.say(
            f"{found.apart}: equal bits are not promised there, and losses are compared within 1 %; the largest "
            f"difference is {found.furthest:.2g}"
        )
    return words


def command(arguments: Sequence[str]) -> None:
    """`replay RUN --from A --to B [flags]`."""
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelled.append(SPELLED.get(name, name) + equals + value)
    cli.run_config(main, ReplayConfig, prog="replay", argv=spelled)


if __name__ == "__main__":
    from espalier import library_log

    library_log.begin()
    command(sys.argv[1:])
