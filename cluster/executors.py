"""Who runs a stage: datatrove's executors for this machine, Slurm and Ray, and how far Slurm is."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from espalier.errors import MachineError, UserError

if TYPE_CHECKING:
    from cluster.stages import Step

ROOT = Path(__file__).resolve().parent.parent
JOBS = "jobs.json"


def executor_of(config: ClusterConfig, step: Step, tasks: int, before: Any, logs: Path) -> Any:
    """before: the executor of the stage that Slurm waits for; here and on Ray each runs when the last has ended."""
    try:
        if config.executor == "local":
            from datatrove.executor import LocalPipelineExecutor

            return LocalPipelineExecutor([step], tasks=tasks, workers=min(config.workers, tasks), logging_dir=str(logs))
        if config.executor == "slurm":
            from datatrove.executor import SlurmPipelineExecutor

            root, programs = (shlex.quote(str(path)) for path in (ROOT, Path(sys.executable).parent))
            return SlurmPipelineExecutor(
                [step],
                tasks=tasks,
                time=config.time,
                partition=config.partition,
                job_name=f"espalier-{type(step).__name__.lower()}",
                logging_dir=str(logs),
                depends=before,
                env_command=f"export PYTHONPATH={root} PATH={programs}:$PATH",
            )
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor([step], tasks=tasks, logging_dir=str(logs))
    except ImportError as error:
        raise missing_package(config.executor, error) from error


def missing_package(executor: str, error: ImportError) -> UserError:
    package = "ray" if executor == "ray" else "-r cluster/requirements.txt"
    return UserError(
        f"the {executor} executor needs a package that is not here ({' '.join(str(error).split())}); "
        f"`./launch.sh python -m pip install {package}`"
    )


def hand_over(executors: list[Any], work: Path) -> None:
    if not shutil.which("sbatch"):
        raise UserError("--executor slurm needs sbatch, which is not on the PATH; start it on a login node of Slurm")
    try:
        executors[-1].run()
    except subprocess.CalledProcessError as error:
        raise MachineError(f"sbatch refused a stage (exit {error.returncode}); no later stage was submitted") from error
    jobs = {executor.job_name: str(executor.job_id) for executor in executors if executor.job_id != -1}
    (work / JOBS).write_text(json.dumps(jobs))
    listed = ", ".join(f"{name} {job}" for name, job in jobs.items())
    print(f"submitted to Slurm: {listed}; run the same command again for their state, and to repeat what has failed")


def waiting_for(work: Path) -> str | None:
    """The state of an earlier command's unfinished Slurm jobs; None where there are none."""
    try:
        jobs = json.loads((work / JOBS).read_text())
        asked = ["squeue", "--noheader", f"--jobs={','.join(jobs.values())}", "--format=%F %T %r"]
        found = subprocess.run(asked, capture_output=True, text=True)
    except (OSError, ValueError):
        return None
    # squeue fails where it knows none of the jobs any more.
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines() if line.strip()]
    if found.returncode or not lines:
        return None
    names = {job: name for name, job in jobs.items()}
    states = dict.fromkeys(f"{names.get(job, 'job')} {job} {' '.join(state)}" for job, *state in lines)
    text = f"Slurm is working: {', '.join(states)}"
    if "DependencyNeverSatisfied" in found.stdout:
        advice = f"see {work / 'logs'}, `scancel {' '.join(jobs.values())}` and give the same command again"
        text += f"; an earlier stage has failed: {advice}"
    return text
