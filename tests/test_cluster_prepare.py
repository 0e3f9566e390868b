"""Many tasks of datatrove on this machine against `prepare` in one process: the same tokens, the same manifest."""

import json
import pathlib

import numpy as np
import pytest

from data.config import DataConfig
from data.filters import FilterConfig
from data.prepare import prepare


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
    run_cli(
        *("cluster.prepare", "--data.files", pattern, "--data.tokenizer-kind", "bpe", "--vocab-size", 400, "--causal"),
        *("--data.cache", tmp_path / "cluster", "--tasks", 3, *(part for pair in values for part in pair)),
    )
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
        different = {"shards", "sha256"}
        assert {k: v for k, v in one.manifest.items() if k not in different} == {
            k: v for k, v in other.manifest.items() if k not in different
        }
        rejects = (store.folder / "rejects.jsonl" for store in (one, other))
        assert len({path.read_text() for path in rejects}) == 1
    assert alone.train["text"].manifest["rejected"] == {"json": 1}
    if filters:
        assert alone.train["text"].manifest["filtered"]["exact duplicate"] >= 30
