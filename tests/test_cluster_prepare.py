"""Many tasks of datatrove on this machine against `prepare` in one process: the same tokens, the same manifest."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest

import cluster.prepare
from cluster.config import ClusterConfig
from cluster.executors import executor_of
from cluster.stages import Decide, Join, Tokenize
from espalier.data.config import DataConfig
from espalier.data.filters import FilterConfig
from espalier.data.prepare import prepare
from espalier.data.store import exists
from espalier.errors import MachineError, UserError

# datatrove forks a process that only keeps a lock; JAX, which an earlier test may have imported, warns of every fork.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


def files(folder: pathlib.Path, shared_data) -> str:
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:150_000]
    scenes = [scene for scene in text.split("\n\n") if scene.strip()]
    scenes += scenes[:40]
    folder.mkdir()
    for number in range(5):
        lines = "".join(json.dumps({"text": scene}) + "\n" for scene in scenes[number::5])
        (folder / f"{number}.jsonl").write_text(lines + "broken\n" * (number == 3))
    return f"{folder}/*.jsonl"


@pytest.mark.parametrize("filters", [{}, {"exact": True, "near": 0.8, "min_characters": 20}])
def test_the_local_executor_gives_the_tokens_of_prepare(tmp_path, shared_data, run_cli, filters):
    pattern = files(tmp_path / "text", shared_data)

    def config(cache: str) -> DataConfig:
        return DataConfig(
            files=(pattern,), tokenizer_kind="bpe", filters=FilterConfig(**filters), cache=str(tmp_path / cache)
        )

    flags = [f"--data.filters.{name.replace('_', '-')}" for name in filters]
    values = [[flag] if value is True else [flag, value] for flag, value in zip(flags, filters.values(), strict=True)]
    told = run_cli(
        *("cluster.prepare", "--data.files", pattern, "--data.tokenizer-kind", "bpe", "--vocab-size", 400, "--causal"),
        *("--data.cache", tmp_path / "cluster", "--tasks", 3, *(part for pair in values for part in pair)),
    )
    # A slow machine also says what it waits for.
    stages = [line.split("  ")[0] for line in told.stdout.splitlines() if re.match(r"\d+/\d+  ", line)]
    assert stages == [f"{n}/{len(stages)}" for n in range(1, len(stages) + 1)] and len(stages) == 3 + bool(filters)
    # Not a word of datatrove's.
    assert told.stderr == ""
    alone = prepare(config("alone"), 400, for_masked_lm=False)
    names = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cluster").glob("tokens-*/manifest.json")}
    together = prepare(config("cluster"), 400, for_masked_lm=False)
    assert names == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cluster").glob("tokens-*/manifest.json")}
    assert alone.fingerprints == together.fingerprints
    for side in ("train", "validation"):
        one, other = getattr(alone, side)["text"], getattr(together, side)["text"]
        np.testing.assert_array_equal(one.offsets, other.offsets)
        every = np.arange(one.offsets[-1])
        np.testing.assert_array_equal(one.take(every), other.take(every))
        assert len(other.manifest["shards"]) > 1 or side == "validation"
        different = {"shards", "sha256", "sum"}
        assert {k: v for k, v in one.manifest.items() if k not in different} == {
            k: v for k, v in other.manifest.items() if k not in different
        }
        rejects = (store.folder / "rejects.jsonl" for store in (one, other))
        assert len({path.read_text() for path in rejects}) == 1
    assert alone.train["text"].manifest["rejected"] == {"json": 1}
    if filters:
        assert alone.train["text"].manifest["filtered"]["exact duplicate"] >= 30


def test_word_starts_are_those_of_prepare(tmp_path, monkeypatch):
    """Parts with word starts are joined; a machine with another segmenter is told of, and nothing is written."""
    (tmp_path / "text").mkdir()
    for number in range(4):
        lines = [json.dumps({"text": f"使用模型训练{number}，研究生命的起源 {line}"}) for line in range(60)]
        (tmp_path / "text" / f"{number}.jsonl").write_text("\n".join(lines))

    def config(cache: str) -> DataConfig:
        files = (f"{tmp_path}/text/*.jsonl",)
        return DataConfig(files=files, words="segmenter", cache=str(tmp_path / cache))

    steps = [ClusterConfig(config("cluster"), 400, tasks=3), tmp_path / "cluster" / "work"]
    Decide(*steps)(None)
    for rank in range(3):
        Tokenize(*steps)(None, rank, 3)
    version = importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "0.1.9" if name == "rjieba" else version(name))
        with pytest.raises(UserError, match="all machines must have the same segmenters .*rjieba 0.1.9"):
            Join(*steps)(None)
    assert not stores(tmp_path / "cluster")
    Join(*steps)(None)
    names = stores(tmp_path / "cluster")
    one, other = (prepare(config(cache), 400, for_masked_lm=True).train["text"] for cache in ("alone", "cluster"))
    assert one.folder.name == other.folder.name and other.folder.name in names and not other.damaged()
    assert one.manifest["words"] == other.manifest["words"] and len(other.manifest["shards"]) == 3
    every = np.arange(one.offsets[-1])
    np.testing.assert_array_equal(one.word_starts(every), other.word_starts(every))
    assert 0.1 < one.word_starts(every).mean() < 0.9


def small(folder: pathlib.Path, words: str) -> str:
    """Three files of text with these words in it."""
    folder.mkdir()
    for number in range(3):
        lines = (json.dumps({"text": f"{words}, {number}, and {line} more of them"}) + "\n" for line in range(60))
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return f"{folder}/*.jsonl"


def flags(pattern: str, cache: pathlib.Path, *more: object) -> tuple:
    return (
        *("cluster.prepare", "--data.files", pattern, "--data.tokenizer-kind", "bpe", "--vocab-size", 400, "--causal"),
        *("--data.cache", cache, "--tasks", 2, *more),
    )


def stores(cache: pathlib.Path) -> list[str]:
    return sorted(path.name for path in cache.glob("tokens-*") if exists(path))


def contents(cache: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("tokens-*/*")}


def test_marks_of_what_is_done_belong_to_their_text(tmp_path, run_cli):
    """A second text in the same cache, and the first again when its tokens were deleted."""
    cache = tmp_path / "cache"
    one, other = small(tmp_path / "one", "words of one text"), small(tmp_path / "other", "what another says")
    run_cli(*flags(one, cache))
    first, whole = stores(cache), contents(cache)
    assert len(first) == 2 and not [path for path in cache.glob("cluster-*") if path.is_dir()]
    run_cli(*flags(other, cache))
    assert len(stores(cache)) == 4
    for name in first:
        shutil.rmtree(cache / name)
    again = run_cli(*flags(one, cache), "--json")
    assert json.loads(again.stdout.splitlines()[-1]) == {"logs": None, "joined": True}
    assert {name: content for name, content in contents(cache).items() if name.split("/")[0] in first} == whole
    assert "everything is there already" in run_cli(*flags(one, cache)).stdout


@pytest.fixture
def config(tmp_path) -> ClusterConfig:
    files = (small(tmp_path / "text", "words of a text"),)
    data = DataConfig(files=files, tokenizer_kind="bpe", cache=str(tmp_path / "cache"))
    return ClusterConfig(data, 400, causal=True, tasks=2, workers=1)


def test_a_task_that_fails_is_repeated_and_the_others_are_not(config, monkeypatch, tmp_path):
    whole, ranks = Tokenize.__call__, []

    def failing(self, data=None, rank=0, world_size=1):
        ranks.append(rank)
        if rank == 1 and len(ranks) == 2:
            raise OSError("this machine is going down")
        whole(self, data, rank, world_size)

    monkeypatch.setattr(Tokenize, "__call__", failing)
    with pytest.raises(OSError, match="going down"):
        cluster.prepare.main(config)
    assert not stores(tmp_path / "cache")
    assert cluster.prepare.main(config)["joined"] and len(stores(tmp_path / "cache")) == 2
    assert ranks == [0, 1, 1]


def test_a_stage_that_leaves_tasks_undone_ends_it(config, monkeypatch):
    """As on Ray, which tells of failures in its log alone."""
    from datatrove.executor import LocalPipelineExecutor

    monkeypatch.setattr(LocalPipelineExecutor, "run", lambda self: None)
    with pytest.raises(MachineError, match="a task has failed; its log is below .*repeats what is not done"):
        cluster.prepare.main(config)


SBATCH = """#!{python}
# Runs each task of the array at once and waits, so that every dependency is met; notes how it was called.
import json, os, pathlib, re, subprocess, sys
here = pathlib.Path(__file__).parent
script = pathlib.Path(sys.argv[-1]).read_text()
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps({{"arguments": sys.argv[1:-1], "script": script}}) + "\\n")
number = len((here / "calls.jsonl").read_text().splitlines())
last = int(re.search(r"--array=0-(\\d+)", script)[1])
for task in range(last + 1 if "merge_stats" not in script else 0):
    environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": "0", "SLURM_NODELIST": "here"}}
    run = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    (here / f"{{number}}-{{task}}.log").write_text(run.stdout + run.stderr)
print("Submitted batch job", number)
"""


def programs(folder: pathlib.Path, **scripts: str) -> pathlib.Path:
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def test_on_slurm_each_stage_waits_for_the_one_before(tmp_path, run_cli):
    """sbatch and srun are stand-ins that run the scripts as they are handed over."""
    slurm = programs(
        tmp_path / "slurm",
        sbatch=SBATCH.format(python=sys.executable).replace("\\\\", "\\"),
        srun='#!/bin/bash\nwhile [[ $1 == -* ]]; do if [[ $1 == -n ]]; then shift; fi; shift; done; exec "$@"\n',
        scontrol="#!/bin/bash\necho here\n",
        squeue="#!/bin/bash\nexit 1\n",
    )
    environment = {"PATH": f"{slurm}:{os.environ['PATH']}"}
    pattern, cache = small(tmp_path / "text", "words of a text"), tmp_path / "cache"
    more = ("--data.filters.exact", "--executor", "slurm", "--partition", "cpu-long", "--time", "3:00:00", "--json")
    run = run_cli(*flags(pattern, cache, *more), env=environment)
    assert "submitted to Slurm: espalier-measurefiles 1, espalier-decide 3, espalier-tokenize 5" in run.stdout
    calls = [json.loads(line) for line in (slurm / "calls.jsonl").read_text().splitlines()]
    stages = [call for call in calls if "merge_stats" not in call["script"]]
    logs = "\n".join(path.read_text() for path in sorted(slurm.glob("*.log")))
    for stage, name, tasks in zip(stages, ("measurefiles", "decide", "tokenize", "join"), (2, 1, 2, 1), strict=True):
        for line in ("partition=cpu-long", "time=3:00:00", f"job-name=espalier-{name}", f"array=0-{tasks - 1}"):
            assert f"#SBATCH --{line}\n" in stage["script"], stage["script"]
    waits = [[part for part in stage["arguments"] if "dependency" in part] for stage in stages]
    assert waits == [[], *([f"--dependency=afterok:{number}"] for number in (1, 3, 5))]
    assert len(stores(cache)) == 2, logs
    (tmp_path / "here").mkdir()
    run_cli(*flags(pattern, tmp_path / "here", "--data.filters.exact"))
    assert contents(cache) == contents(tmp_path / "here")
    assert "everything is there already" in run_cli(*flags(pattern, cache, *more), env=environment).stdout


def test_slurm_is_asked_how_far_it_is(tmp_path, run_cli):
    state = tmp_path / "state"
    slurm = programs(
        tmp_path / "slurm",
        sbatch=f"#!/bin/bash\necho x >> {tmp_path}/calls\necho Submitted batch job $(wc -l < {tmp_path}/calls)\n",
        squeue=f"#!/bin/bash\ncat {state}\n",
    )
    environment = {"PATH": f"{slurm}:{os.environ['PATH']}"}
    command = flags(small(tmp_path / "text", "words of a text"), tmp_path / "cache", "--executor", "slurm")
    assert "submitted to Slurm" in run_cli(*command, env=environment).stdout
    handed = (tmp_path / "calls").read_text()
    state.write_text("1 RUNNING None\n3 PENDING Dependency\n3 PENDING Dependency\n")
    found = run_cli(*command, env=environment).stdout
    assert "Slurm is working: espalier-decide 1 RUNNING None, espalier-tokenize 3 PENDING Dependency\n" in found
    state.write_text("3 PENDING DependencyNeverSatisfied\n")
    assert "an earlier stage has failed: see " in run_cli(*command, env=environment).stdout
    assert (tmp_path / "calls").read_text() == handed
    state.write_text("")
    assert "submitted to Slurm" in run_cli(*command, env=environment).stdout
    assert len((tmp_path / "calls").read_text()) == 2 * len(handed)


def test_what_executors_need_and_is_not_there(config, monkeypatch, tmp_path):
    from dataclasses import replace

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs sbatch, which is not on the PATH"):
        cluster.prepare.main(replace(config, executor="slurm"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="the ray executor needs a package.*pip install ray"):
        cluster.prepare.main(replace(config, executor="ray"))


def test_rays_executor_is_given_the_stages(config, tmp_path):
    from dataclasses import replace

    from datatrove.executor.ray import RayPipelineExecutor

    stages = cluster.prepare._stages(replace(config, executor="ray"), tmp_path / "work")
    for step, tasks in stages:
        executor = executor_of(replace(config, executor="ray"), step, tasks, None, tmp_path / "logs")
        assert isinstance(executor, RayPipelineExecutor) and executor.pipeline == [step]
        assert executor.world_size == tasks and executor.get_incomplete_ranks() == list(range(tasks))
