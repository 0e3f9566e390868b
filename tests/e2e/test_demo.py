"""The demo, shortened: everything that it promises is there."""

import json

import pytest

from espalier.data.builtin import demo_task
from espalier.data.config import DataConfig
from espalier.data.sources import open_sources


@pytest.mark.timeout(900)
def test_the_demo_end_to_end(run_cli, tmp_path):
    result = run_cli(
        *("espalier.commands.demo", "--steps", 6, "--finetune-steps", 3, "--labels", 32, "--json"), timeout=800
    )
    out = json.loads(result.stdout.splitlines()[-1])
    for name in ("pretrained_accuracy", "scratch_accuracy", "tfidf_accuracy", "majority_accuracy"):
        assert 0 <= out[name] <= 1, name
    assert out["step"] == 6
    run = tmp_path / "runs" / "demo"
    report = (run / "report.html").read_text()
    assert "What is the pretraining worth?" in report and "Masked words" in report and "data:image/png" in report
    assert "TF-IDF" in report and "src=http" not in report

    held_out = set(json.loads((run / "config.json").read_text())["data"]["builtin_exclude"])
    assert held_out, "the files of the task's validation part must be left out of the pretraining text"

    task = demo_task(0, 32)
    assert held_out == task.validation_files
    # The recorded hash of the corpus is that of the text without them.
    recorded = json.loads((run / "config.json").read_text())["fingerprints"]["train"]
    without, with_them = (
        open_sources(DataConfig(builtin="pydoc", builtin_exclude=tuple(sorted(files)))).train["text"].fingerprint()
        for files in (held_out, ())
    )
    assert recorded == without != with_them

    other = run_cli("espalier.commands.demo", "--steps", 6, "--finetune-steps", 3, "--labels", 64, code=2)
    assert "demo with other labelled sentences" in other.stderr

    for name in ("pretrained", "scratch"):
        predictions = [json.loads(line) for line in (run / name / "predictions.jsonl").read_text().splitlines()]
        validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        assert [p["label"] for p in predictions] == [v["label"] for v in validation]
        metrics = json.loads((run / name / "summary.json").read_text())["metrics"]
        right = sum(p["label"] == p["prediction"] for p in predictions)
        assert metrics["accuracy"] == right / len(predictions)
