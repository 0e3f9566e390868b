"""Labels of GLUE's test files in the form that the benchmark's server takes: index, tab, prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from espalier import progress
from espalier.files import replacing
from espalier.loading import load
from espalier.predict.loaded import LoadedModel
from finetune.glue.files import Files
from finetune.glue.tasks import BY_KEY, DIAGNOSTIC, MISMATCHED, MNLI


def write_submissions(folder: Path, runs: Mapping[str, tuple[Files, Path]]) -> list[str]:
    """Label what test files there are with the run of each task; the names of the files that were written."""
    written = []
    for key, (files, run) in runs.items():
        task = BY_KEY[key]
        wanted = {task.test: task.submission}
        if task is MNLI:
            wanted |= {MISMATCHED[1]: "MNLI-mm.tsv", DIAGNOSTIC[2]: f"{DIAGNOSTIC[0]}.tsv"}
        wanted = {name: to for name, to in wanted.items() if name in files.more}
        if not wanted:
            continue
        model = load(run)
        for name, to in wanted.items():
            folder.mkdir(parents=True, exist_ok=True)
            with progress.waiting(f"labelling {name} of {task.name}"):
                labels = _labels(model, files.more[name])
            with replacing(folder / to) as file:
                file.write("index\tprediction\n")
                file.writelines(f"{number}\t{label}\n" for number, label in enumerate(labels))
            written.append(to)
    return written


def _labels(model: LoadedModel, path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [(row["text"], row["text_b"]) if "text_b" in row else row["text"] for row in rows]
    found = model.classify(texts)
    # Scores of STS-B lie between 0 and 5.
    return [f"{min(max(result['score'], 0.0), 5.0):.3f}" if "score" in result else result["label"] for result in found]
