"""Prepare text on many machines: `python -m cluster.prepare --data.files 's3://…/*.jsonl.gz' --executor slurm`.

The steps of `./launch.sh prepare` (filters, tokenizer, tokens), spread over the tasks of datatrove, which runs them
here, on Slurm or on Ray, notes which are done, and repeats those that are not. Each task has consecutive files; joined
in their order, the parts are token for token what `prepare` writes, under the same name in the cache: give the runs
the same --data flags and a --data.cache that they see.

    measure   each task      what the filters must know of each document
    decide    one task       which documents go; the tokenizer, where none is given
    tokenize  each task      tokens of its files
    join      one task       one store of all parts, with its manifest

What the tasks write and log lies in cluster-<digest> of the cache. The digest is that of text, filters, tokenizer and
number of tasks, for datatrove's marks of what is done know of none of these; when all is joined the folder goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import ClusterConfig
from cluster.executors import executor_of, hand_over, missing_package, waiting_for
from cluster.stages import PARTS, Decide, Join, MeasureFiles, Step, Tokenize, joined_folders
from espalier import cli
from espalier.errors import MachineError, UserError
from espalier.files import cache_key, make_folder

if TYPE_CHECKING:
    from espalier.data.sources import Sources


def main(config: ClusterConfig) -> dict:
    """Run the stages, each when the one before it has ended; returns where they log and whether all is there."""
    from espalier.data.prepare.planning import cache_folder
    from espalier.data.sources import FileSource, open_sources

    sources = open_sources(config.data, cache_folder(config.data))
    for name, source in sources.train.items():
        whole = getattr(source, "source", source)
        if not isinstance(whole, FileSource):
            raise UserError(
                f"the text {name!r} is not made of files, which tasks could share; prepare it on one machine"
            )
    work = cache_folder(config.data) / f"cluster-{_digest(config, sources)}"
    if folders := joined_folders(work):
        print(f"everything is there already: {', '.join(folders)}")
        shutil.rmtree(work, ignore_errors=True)
        return {"logs": None, "joined": True}
    logs = work / "logs"
    if waiting := waiting_for(work):
        print(waiting)
        return {"logs": str(logs), "joined": False}
    if not (work / PARTS).is_dir():
        # Marks without the parts that they tell of would let tasks be left out.
        shutil.rmtree(work, ignore_errors=True)
        make_folder(work / PARTS)
    _run(config, _stages(config, work), logs)
    if config.executor == "slurm":
        return {"logs": str(logs), "joined": False}
    if not joined_folders(work):
        raise MachineError(f"a task has failed; its log is below {logs}; the same command repeats what is not done")
    shutil.rmtree(work, ignore_errors=True)
    return {"logs": None, "joined": True}


def _digest(config: ClusterConfig, sources: Sources) -> str:
    """Of everything that decides what a task makes; computed without looking into the text."""
    from espalier.data.tokenizer import fingerprint, load_tokenizer
    from espalier.data.words import installed

    data = config.data
    keys = [(side, name, source.fingerprint()) for side, of in sources._asdict().items() for name, source in of.items()]
    tokenizer = (
        fingerprint(load_tokenizer(data.tokenizer))
        if data.tokenizer
        else (*data.training(), config.vocab_size, config.causal)
    )
    segmenters = [installed()] if data.words == "segmenter" else []
    parts = (keys, str(data.filters), tokenizer, config.tasks, *segmenters)
    return cache_key(*parts)


def _stages(config: ClusterConfig, work: Path) -> list[tuple[Step, int]]:
    """The steps and their numbers of tasks."""
    steps: list[tuple[Step, int]] = [
        (Decide(config, work), 1),
        (Tokenize(config, work), config.tasks),
        (Join(config, work), 1),
    ]
    return [(MeasureFiles(config, work), config.tasks)] * config.data.filters.active + steps


def _run(config: ClusterConfig, stages: Sequence[tuple[Step, int]], logs: Path) -> None:
    """On Slurm: hand all stages over. Else run them one by one, up to the first of which a task fails."""
    before, executors = None, []
    for number, (step, tasks) in enumerate(stages):
        before = executor_of(config, step, tasks, before, logs / f"{number}-{type(step).__name__.lower()}")
        executors.append(before)
    if config.executor == "slurm":
        hand_over(executors, logs.parent)
        return
    for number, (executor, (step, tasks)) in enumerate(zip(executors, stages, strict=True), 1):
        shares = f" in {tasks} tasks" if tasks > 1 else ""
        print(f"{number}/{len(stages)}  {step.title}{shares}; their logs: {logs}", flush=True)
        try:
            executor.run()
        except ImportError as error:
            raise missing_package(config.executor, error) from error
        if executor.get_incomplete_ranks():
            return


if __name__ == "__main__":
    cli.run_config(main, ClusterConfig, prog="cluster.prepare")
