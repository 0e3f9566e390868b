"""The toy (tests/toy.py), trained by several processes: `worker.py JOB …`, a job being JSON.

    run_dir, mesh (sizes of axes), steps, stop_at, every (steps between checkpoints), pause (seconds before a batch),
    poison (numbers of batches whose loss is NaN), bad_steps (settings of training.config.BadSteps),
    frozen (whether embeddings are frozen and weigh the rows: toy.partly_frozen),
    blind (processes that do not see what others write), full (processes that cannot write more than 1 kB to a file)

Each job leaves in its run directory start.npz and final.npz (leaves of the whole state), and rows-<process>.json: the
rows that the process loaded.
"""

import dataclasses
import json
import pathlib
import resource
import sys
import time

from espalier import cli, library_log
from espalier.exits import one_line_errors
from sharding.processes.coordination import collected, joined
from sharding.processes.discovery import DistributedConfig


@dataclasses.dataclass(frozen=True)
class Jobs:
    jobs: list[dict]
    distributed: DistributedConfig = DistributedConfig()


def perform(job: dict):
    import jax
    import numpy as np
    import toy

    from espalier.training import loop, run
    from espalier.training.config import BadSteps, CheckpointConfig
    from sharding.mesh import MeshConfig, build_mesh, host_rows

    run_dir = pathlib.Path(job["run_dir"])
    config = toy.config(
        run_dir,
        steps=job["steps"],
        stop_at=job.get("stop_at"),
        mesh=MeshConfig(**job["mesh"]),
        checkpoint=CheckpointConfig(every=job.get("every", 100)),
        eval_every=job.get("eval_every", 100),
        bad_steps=BadSteps(**job.get("bad_steps", {})),
    )
    mesh = build_mesh(config.mesh)
    mine = host_rows(toy.ROWS, mesh)
    if jax.process_index() in job.get("blind", ()):
        run._appears = lambda path: False

    def part(batch):
        return {name: array[mine] for name, array in batch.items()}

    def batches_from(step):
        while True:
            time.sleep(job.get("pause", 0))
            # Not before the programs are compiled and cached.
            if jax.process_index() in job.get("full", ()) and step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            batch = part(toy.batch(step))
            if step in job.get("poison", ()):
                batch["loss_weights"] = batch["loss_weights"] * np.float32(np.nan)
            yield batch
            step += 1

    def keep(state, name):
        whole = collected(state)
        if whole is not None:
            np.savez(run_dir / name, *jax.tree.leaves(whole))

    first_state = loop.first_state

    def and_kept(*arguments):
        state = first_state(*arguments)
        started.append(collected(state) if state.step else None)
        return state

    started: list = []
    loop.first_state = and_kept
    try:
        result = toy.run(
            config,
            batches_from=batches_from,
            eval_batches=[part(toy.batch(10_000 + i)) for i in range(3)],
            mesh=mesh,
            **(toy.partly_frozen() if job.get("frozen") else {}),
        )
    finally:
        loop.first_state = first_state
    if started[0] is not None:
        np.savez(run_dir / "start.npz", *jax.tree.leaves(started[0]))
    keep(result.state, "final.npz")
    (run_dir / f"rows-{jax.process_index()}.json").write_text(json.dumps(mine.tolist()))
    return result


@joined
def main(config: Jobs) -> dict:
    import jax
    import toy

    # As tests/toy.py does it for the tests of one process.
    jax.config.update("jax_disable_most_optimizations", True)
    assert toy.ROWS == 16
    result = [perform(job) for job in config.jobs][-1]
    return {"stopped_by": result.stopped_by}


if __name__ == "__main__":
    library_log.begin()
    jobs = Jobs([json.loads(argument) for argument in sys.argv[1:]])
    with one_line_errors(debug=False):
        cli._call(main, jobs)
