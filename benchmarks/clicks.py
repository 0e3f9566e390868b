"""A ranker that learns from clicks, beside one that takes them as they are and one that knows what is relevant.

    ./launch.sh python benchmarks/clicks.py SST-2/train.tsv SST-2/dev.tsv runs/clicks --seeds 0 1 2

Lists of ten sentences of SST-2, of which a query wants those that praise (or blame). They are shown five times each,
the short ones first; people look at position k with the probability 1/k, click what is relevant there, and one in ten
of the others. Three rankers learn from the same lists: `naive` from clicks as they are, `ips` from clicks divided by
these probabilities, `supervised` from the labels. All are runs of `finetune rank --loss softmax` from one small
encoder, whose commands are printed; what is finished is not run again. The table: nDCG@10 over lists of the development
set, beside that of showing the short ones first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

SIZE, SHOWN, NOISE = 10, 5, 0.1
"""Sentences of a list, how often it is shown, and how often what is not relevant is clicked where it is looked at."""
SHAPE = (
    "--model.vocab-size 4000 --model.hidden-size 96 --model.num-hidden-layers 2 --model.num-attention-heads 4 "
    "--model.intermediate-size 256 --data.sequence-length 64 --data.lowercase"
).split()
VARIANTS = {
    "naive": ["--data.position", "position", "--data.position-bias", "0"],
    "ips": ["--data.position", "position"],
    "supervised": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("dev", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--lists", type=int, default=1500, help="of them that are shown")
    parser.add_argument("--pretrain", type=int, default=600, help="steps of the encoder")
    parser.add_argument("--steps", type=int, default=600, help="steps of each ranker")
    asked = parser.parse_args()
    folder = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    sentences = read(asked.train)
    (folder / "text.txt").write_text("\n\n".join(text for text, _ in sentences[SIZE * 20 :]), encoding="utf-8")
    (folder / "text_held_out.txt").write_text("\n\n".join(text for text, _ in sentences[: SIZE * 20]), encoding="utf-8")
    held_out = lists(read(asked.dev), 10**6, random.Random(0))
    write(folder / "held_out.jsonl", [row for one in held_out for row in judged(one)])
    run(folder / "encoder", ["mlm", "demo", *SHAPE, "--data.files", f"{folder}/text.txt", "--data.validation-files",
                             f"{folder}/text_held_out.txt", "--steps", str(asked.pretrain),
                             "--eval-every", str(asked.pretrain)])  # fmt: skip
    found: dict[str, list[float]] = {"short first": [short_first(held_out)]}
    for seed, name in itertools.product(asked.seeds, asked.variants):
        draw = random.Random(seed)
        shown = lists(sentences, asked.lists, draw)
        write(folder / f"clicks-{seed}.jsonl", [row for one in shown for row in clicks(one, draw)])
        write(folder / f"judged-{seed}.jsonl", [row for one in shown for row in judged(one)])
        train = folder / f"{'judged' if name == 'supervised' else 'clicks'}-{seed}.jsonl"
        run_dir = folder / f"{name}-{seed}"
        run(run_dir, ["finetune", "rank", "--init-from", f"{folder}/encoder", "--data.train", str(train),
                      "--data.validation", f"{folder}/held_out.jsonl", "--loss", "softmax", "--batch-size", "16",
                      "--data.max-length", "64", "--steps", str(asked.steps), "--eval-every", str(asked.steps),
                      "--seed", str(seed), "--optimizer.learning-rate", "1e-3", *VARIANTS[name]])  # fmt: skip
        metrics = json.loads((run_dir / "summary.json").read_text())["metrics"]
        found.setdefault(name, []).append(metrics["ndcg@10"])
    for name, values in found.items():
        print(f"{name:12} nDCG@10 {statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")


def read(path: Path) -> list[tuple[str, int]]:
    """Sentences of some length with their labels, each once."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return list({text.strip(): int(label) for text, label in lines if len(text) > 30}.items())


def lists(sentences: list[tuple[str, int]], count: int, draw: random.Random) -> list[tuple[str, list[tuple[str, int]]]]:
    """(query, its sentences with their relevance), at most `count`; no sentence is in two."""
    order = draw.sample(sentences, len(sentences))
    found = []
    for number in range(min(count, len(order) // SIZE)):
        part, wanted = order[number * SIZE : (number + 1) * SIZE], number % 2
        found.append((f"{('blame', 'praise')[wanted]} {number}", [(text, int(is_ == wanted)) for text, is_ in part]))
    return found


def judged(one: tuple[str, list[tuple[str, int]]]) -> list[dict]:
    query, texts = one
    return [{"query": query, "text": text, "relevance": relevant} for text, relevant in texts]


def clicks(one: tuple[str, list[tuple[str, int]]], draw: random.Random) -> list[dict]:
    """Impressions of a list; the order is that of lengths, a little disturbed."""
    query, texts = one
    rows = []
    for _ in range(SHOWN):
        order = sorted(texts, key=lambda pair: len(pair[0]) * draw.uniform(0.7, 1.3))
        for position, (text, relevant) in enumerate(order, 1):
            click = draw.random() < 1 / position and (relevant or draw.random() < NOISE)
            rows.append({"query": query, "text": text, "position": position, "click": int(click)})
    return rows


def short_first(found: list[tuple[str, list[tuple[str, int]]]]) -> float:
    """nDCG@10 of showing short sentences first."""
    import numpy as np

    from finetune.ranking_metrics import mean, of_query

    by_length = [(np.array([-len(text) for text, _ in texts]), np.array([grade for _, grade in texts]))
                 for _, texts in found]  # fmt: skip
    return mean([of_query(scores, grades, []) for scores, grades in by_length])["ndcg@10"]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(run_dir: Path, words: list[str]) -> None:
    """A run by its command, unless it is finished."""
    summary = run_dir / "summary.json"
    if summary.exists() and json.loads(summary.read_text()).get("finished"):
        return
    command = [*words, "--run-dir", str(run_dir)]
    print("./launch.sh", *command, flush=True)
    subprocess.run([sys.executable, "-P", "-m", "espalier", *command], check=True)


if __name__ == "__main__":
    main()
