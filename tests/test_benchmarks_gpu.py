"""The command that checks and measures a GPU runs where there is none, on tiny sizes; its counts are right."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_step import CASES, QUICK, batches_of, model_flops
from espalier.models.counts import flops_per_token


def test_the_command_runs_on_a_cpu_and_writes_what_it_found(monkeypatch, tmp_path, capsys):
    # Its processes compile tiny programs.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    assert gpu.main(["--quick", "--only", "attention|masked", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    (check,) = found["attention"]["checks"].values()
    assert check["right"] and check["apart"] and found["attention"]["times"] == {}
    (step,) = found["steps"].values()
    assert step["attention"] == "xla" and step["mfu"] is None and 0 < step["planned_mfu"] < 1
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["step_seconds"])
    assert "| tiny-masked packed | 0M | 4 × 64 | xla |" in capsys.readouterr().out


def test_a_failure_is_written_down_and_the_next_one_runs(tmp_path, monkeypatch):
    broken = dataclasses.replace(next(iter(QUICK.values())), attention="cudnn")
    monkeypatch.setattr(gpu, "QUICK", {"one": broken, "another": broken})
    assert gpu.main(["--quick", "--only", "one|another", "--limit", "0.01", "--out", str(tmp_path)]) == 1
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert [step["error"] for step in steps.values()] == ["not done after 0.01 s"] * 2
    assert "| another | not done after 0.01 s |" in (tmp_path / "gpu.md").read_text()
    assert gpu.measured("none", "benchmarks.no_such_module", [], 60)["error"].endswith(
        "No module named benchmarks.no_such_module"
    )


def test_flops_of_a_step_are_those_of_its_documents():
    plain, packed = (CASES[f"bert-base {kind}"] for kind in ("plain", "packed"))
    small = dataclasses.replace(plain, rows=2, length=64)
    (batch,) = batches_of(small, 1)
    assert model_flops(small, batch) == pytest.approx(2 * 64 * flops_per_token(small.model, 64, 0.15))
    (batch,) = batches_of(dataclasses.replace(packed, rows=4), 1)
    segments, positions = batch["segment_ids"], batch["positions"]
    assert segments.max() > 2 and (np.diff(segments, axis=1) >= 0).all() and "row_lengths" not in batch
    assert ((positions == 0) == (np.diff(segments, axis=1, prepend=0) > 0)).all()
    halves = {"segment_ids": np.repeat([[1, 2]], 32, axis=1)}
    assert model_flops(dataclasses.replace(small, rows=1), halves) == pytest.approx(
        64 * flops_per_token(small.model, 32, 0.15)
    )
