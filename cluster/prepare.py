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

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from espalier import cli
from espalier.data.config import DataConfig
from espalier.errors import MachineError, UserError
from espalier.files import cache_key, make_folder, replacing, write_json

if TYPE_CHECKING:
    from espalier.data.filters import Measure
    from espalier.data.prepare import Plan
    from espalier.data.sources import FileSource, Source, Sources
    from espalier.data.store import TokenStore


ROOT = Path(__file__).resolve().parent.parent
PARTS, JOBS = "parts", "jobs.json"


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


def main(config: ClusterConfig) -> dict:
    """Run the stages, each when the one before it has ended; returns where they log and whether all is there."""
    from espalier.data.prepare import cache_folder
    from espalier.data.sources import FileSource, open_sources

    sources = open_sources(config.data, cache_folder(config.data))
    for name, source in sources.train.items():
        whole = getattr(source, "source", source)
        if not isinstance(whole, FileSource):
            raise UserError(
                f"the text {name!r} is not made of files, which tasks could share; prepare it on one machine"
            )
    work = cache_folder(config.data) / f"cluster-{_digest(config, sources)}"
    if folders := _joined(work):
        print(f"everything is there already: {', '.join(folders)}")
        shutil.rmtree(work, ignore_errors=True)
        return {"logs": None, "joined": True}
    logs = work / "logs"
    if waiting := _waiting(work):
        print(waiting)
        return {"logs": str(logs), "joined": False}
    if not (work / PARTS).is_dir():
        # Marks without the parts that they tell of would let tasks be left out.
        shutil.rmtree(work, ignore_errors=True)
        make_folder(work / PARTS)
    _run(config, _stages(config, work), logs)
    if config.executor == "slurm":
        return {"logs": str(logs), "joined": False}
    if not _joined(work):
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


def _stages(config: ClusterConfig, work: Path) -> list[tuple[_Step, int]]:
    """The steps and their numbers of tasks."""
    steps: list[tuple[_Step, int]] = [
        (Decide(config, work), 1),
        (Tokenize(config, work), config.tasks),
        (Join(config, work), 1),
    ]
    return [(MeasureFiles(config, work), config.tasks)] * config.data.filters.active + steps


def _run(config: ClusterConfig, stages: Sequence[tuple[_Step, int]], logs: Path) -> None:
    """On Slurm: hand all stages over. Else run them one by one, up to the first of which a task fails."""
    before, executors = None, []
    for number, (step, tasks) in enumerate(stages):
        before = _executor(config, step, tasks, before, logs / f"{number}-{type(step).__name__.lower()}")
        executors.append(before)
    if config.executor == "slurm":
        _hand_over(executors, logs.parent)
        return
    for number, (executor, (step, tasks)) in enumerate(zip(executors, stages, strict=True), 1):
        shares = f" in {tasks} tasks" if tasks > 1 else ""
        print(f"{number}/{len(stages)}  {step.title}{shares}; their logs: {logs}", flush=True)
        try:
            executor.run()
        except ImportError as error:
            raise _missing(config.executor, error) from error
        if executor.get_incomplete_ranks():
            return


def _hand_over(executors: list[Any], work: Path) -> None:
    if not shutil.which("sbatch"):
        raise UserError("--executor slurm needs sbatch, which is not on the PATH; start it on a login node of Slurm")
    try:
        executors[-1].run()
    except subprocess.CalledProcessError as error:
        raise MachineError(
            f"sbatch has refused a stage (exit {error.returncode}); nothing behind it was started"
        ) from error
    jobs = {executor.job_name: str(executor.job_id) for executor in executors if executor.job_id != -1}
    (work / JOBS).write_text(json.dumps(jobs))
    listed = ", ".join(f"{name} {job}" for name, job in jobs.items())
    print(f"handed over to Slurm: {listed}; the same command tells how far it is, and repeats what has failed")


def _waiting(work: Path) -> str | None:
    """How it stands with the jobs of an earlier command that Slurm has not ended; None where there are none."""
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
    text = f"Slurm is at work: {', '.join(states)}"
    if "DependencyNeverSatisfied" in found.stdout:
        advice = f"see {work / 'logs'}, `scancel {' '.join(jobs.values())}` and give the same command again"
        text += f"; an earlier stage has failed: {advice}"
    return text


def _joined(work: Path) -> list[str]:
    """The folders of tokens that the last stage has noted, if they are all there."""
    from espalier.data.store import exists

    try:
        folders = [work.with_name(name) for name in json.loads(_note(work).read_text())]
    except (OSError, ValueError):
        return []
    return [str(folder) for folder in folders] if all(map(exists, folders)) else []


def _note(work: Path) -> Path:
    return work.with_name(f"{work.name}.json")


class _Step:
    """A stage: a callable that datatrove runs with the number of its task."""

    title: str
    """What it does, for a line on the terminal."""

    def __init__(self, config: ClusterConfig, work: Path):
        self.config, self.work = config, work

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        raise NotImplementedError


class MeasureFiles(_Step):
    """What the filters must know of the documents in this task's files, into a folder of the cache."""

    title = "measuring the documents"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        import pickle

        from espalier.data.documents import documents
        from espalier.data.filters import measure

        for source in _unfiltered(self.config):
            path = _measures(self, source, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = (item.text for item in documents(source.part(rank, world_size)))
            found = [measure(text, self.config.data.filters) for text in texts]
            with replacing(path, "wb") as file:
                pickle.dump(found, file)


class Decide(_Step):
    """Which documents go, from all measures; and the tokenizer, so that no task trains one."""

    title = "deciding which documents stay, training the tokenizer"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        from espalier.data.filters import Decisions
        from espalier.data.prepare import decisions_path, write_decisions

        if self.config.data.filters.active:
            for source in _unfiltered(self.config):
                path = decisions_path(source, self.config.data)
                if Decisions.load(path) is None:
                    write_decisions(path, self._all(source), self.config.data)
        _plan(self.config)

    def _all(self, source: FileSource) -> Iterator[Measure]:
        for rank in range(self.config.tasks):
            yield from _read_measures(self, source, rank)


class Tokenize(_Step):
    """Tokens of this task's files, into stores of their own."""

    title = "tokenizing"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        from espalier.data.prepare import tokens_folder, write_tokens
        from espalier.data.store import exists

        made = _plan(self.config)
        for side, sources in made.sides.items():
            for name, source in sources.items():
                if exists(tokens_folder(self.config.data, made, side, name)):
                    continue
                part = self._part(source, rank, world_size)
                write_tokens(self.config.data, made, side, name, part, _part_folder(self, made, side, name, rank))

    def _part(self, source: Source, rank: int, ranks: int) -> Source:
        from espalier.data.filters import Decisions
        from espalier.data.sources import FileSource, Filtered, Part

        if isinstance(source, Part):
            return source.of(self._part(source.source, rank, ranks))
        if isinstance(source, Filtered):
            whole = source.source
            assert isinstance(whole, FileSource)
            sizes = [len(_read_measures(self, whole, number)) for number in range(rank + 1)]
            begin, end = sum(sizes[:-1]), sum(sizes)
            chosen = (source.decisions.dropped >= begin) & (source.decisions.dropped < end)
            mine = source.decisions
            decisions = Decisions(mine.dropped[chosen] - begin, mine.reasons[chosen], mine.counts, end - begin)
            return Filtered(whole.part(rank, ranks), decisions, "")
        assert isinstance(source, FileSource)
        return source.part(rank, ranks)


class Join(_Step):
    """One store of all parts: their shards move, nothing is copied but the borders of documents."""

    title = "joining the parts"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        from espalier.data.prepare import check_share, tokens_folder
        from espalier.data.store import REJECTS, TokenStore, exists

        made, joined = _plan(self.config), []
        for side, sources in made.sides.items():
            for name, source in sources.items():
                folder = tokens_folder(self.config.data, made, side, name)
                joined.append(folder.name)
                if exists(folder):
                    continue
                folders = [_part_folder(self, made, side, name, number) for number in range(self.config.tasks)]
                if missing := [part for part in folders if not exists(part)]:
                    raise UserError(
                        f"{missing[0]} is not there; where --data.words segmenter is given, all machines must have the "
                        f"same segmenters (here: {made.words or 'none'})"
                    )
                parts = [TokenStore(part) for part in folders]
                counts = {key: sum(part.manifest[key] for part in parts) for key in ("documents", "tokens", "bytes")}
                counts |= {key: sum(part.manifest[key] for part in parts) for key in ("items", "records")}
                counts |= {
                    key: _added(part.manifest[key] for part in parts) for key in ("rejected", "repaired", "dropped")
                }
                rejects = folder.with_name(f".{folder.name}.joining")
                rejects.mkdir(parents=True, exist_ok=True)
                with (rejects / REJECTS).open("wb") as file:
                    for part in folders:
                        file.write((part / REJECTS).read_bytes())
                check_share(counts, True, self.config.data.max_rejected, f"{side} text of {name}", rejects)
                first = parts[0].manifest
                about = {key: first[key] for key in ("source", "tokenizer", "dtype", "words") if key in first}
                about["filtered"] = getattr(source, "dropped", {})
                _join(rejects, folder, parts, about | counts)
        write_json(_note(self.work), joined)
        shutil.rmtree(self.work / PARTS, ignore_errors=True)


def _join(unfinished: Path, folder: Path, parts: list[TokenStore], manifest: dict) -> None:
    import numpy as np

    from espalier.data.store import OFFSETS, starts_beside, write_manifest

    shards: list[tuple[Path, int]] = []
    with (unfinished / OFFSETS).open("wb") as file:
        file.write(np.int64(0).tobytes())
        begin = 0
        for part in parts:
            file.write((part.offsets[1:] + begin).astype(np.int64).tobytes())
            begin += int(part.offsets[-1])
    for part in parts:
        for shard in part.manifest["shards"]:
            path = unfinished / f"tokens-{len(shards):05}.bin"
            # A hard link, so that a join that is interrupted finds every part whole.
            names = {shard["file"]: path} | ({shard["starts"]: starts_beside(path)} if "starts" in shard else {})
            for file, linked in names.items():
                linked.unlink(missing_ok=True)
                os.link(part.folder / file, linked)
            shards.append((path, shard["tokens"]))
    write_manifest(unfinished, manifest, shards)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, count in one.items():
            total[key] = total.get(key, 0) + count
    return total


def _executor(config: ClusterConfig, step: _Step, tasks: int, before: Any, logs: Path) -> Any:
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
        raise _missing(config.executor, error) from error


def _missing(executor: str, error: ImportError) -> UserError:
    package = "ray" if executor == "ray" else "-r cluster/requirements.txt"
    return UserError(
        f"the {executor} executor needs a package that is not here ({' '.join(str(error).split())}); "
        f"`./launch.sh python -m pip install {package}`"
    )


def _plan(config: ClusterConfig) -> Plan:
    from espalier.data.prepare import plan

    return plan(config.data, config.vocab_size, for_masked_lm=not config.causal)


def _unfiltered(config: ClusterConfig) -> list[FileSource]:
    """The training sources as they are before filters and split."""
    from espalier.data.prepare import cache_folder
    from espalier.data.sources import Part, open_sources

    train = open_sources(config.data, cache_folder(config.data)).train.values()
    return [source.source if isinstance(source, Part) else source for source in train]  # type: ignore[misc]


def _part_folder(step: _Step, made: Plan, side: str, name: str, rank: int) -> Path:
    from espalier.data.prepare import tokens_folder

    return step.work / PARTS / f"{tokens_folder(step.config.data, made, side, name).name}-{rank:05}"


def _measures(step: _Step, source: Source, rank: int) -> Path:
    from espalier.data.prepare import decisions_path

    return step.work / PARTS / decisions_path(source, step.config.data).stem / f"{rank:05}.pickle"


def _read_measures(step: _Step, source: Source, rank: int) -> list[Measure]:
    """Of the files that a task measured. Written by this program beside it: pickle is safe here."""
    import pickle

    return pickle.loads(_measures(step, source, rank).read_bytes())


if __name__ == "__main__":
    # By the name under which the machines of Slurm and Ray find again what is pickled here.
    from cluster import prepare

    cli.run_config(prepare.main, prepare.ClusterConfig, prog="cluster.prepare")
