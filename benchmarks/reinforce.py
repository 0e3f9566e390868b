"""What rewards add to imitation: sums, learnt from a text that is often wrong, then from whether they are right.

    ./launch.sh python benchmarks/reinforce.py runs/sums
    ./launch.sh python benchmarks/reinforce.py runs/sums --seeds 0 1 2 3 4 --variants mean leave-one-out grpo random

A small Llama is pretrained on lines like 7+15=22, of which four in ten have a wrong result; drawn from it, as many
answers are wrong. `reinforce` then asks sums and rewards the right ones; the control `random` rewards by a coin that is
tossed for each completion. All runs are normal run directories, whose commands are printed; what is finished is not
run again. results.jsonl and the table in words: pass@1 and pass@8 on 50 sums that no reward was given for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

LARGEST = 19
WRONG = 0.4
HELD_OUT = 50
SHAPE = (
    "--model.vocab-size 300 --model.hidden-size 64 --model.num-hidden-layers 2 --model.num-attention-heads 4 "
    "--model.num-key-value-heads 2 --model.intermediate-size 192 --model.max-position-embeddings 64 "
    "--data.sequence-length 64 --batch-size 16"
).split()
VARIANTS = {
    "mean": [],
    "leave-one-out": ["--policy.baseline", "leave-one-out"],
    "grpo": ["--policy.deviation", "--policy.normaliser", "sequence", "--policy.updates", "2"],
    "random": [],
}
COIN = '''"""The control: a coin for each completion, whatever it says."""

import random


def reward(prompts, completions, row):
    return [float(random.random() < 0.5) for _ in completions]
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=["mean", "random"], choices=VARIANTS)
    parser.add_argument("--pretrain", type=int, default=1500, help="steps of the imitation")
    parser.add_argument("--steps", type=int, default=300, help="steps of the reinforcement")
    asked = parser.parse_args()
    folder = asked.folder
    write(folder)
    files = ["--data.train", f"{folder}/train.jsonl", "--data.validation", f"{folder}/held_out.jsonl"]
    base = folder / "imitation"
    run(base, ["clm", "demo", *SHAPE, "--data.files", f"{folder}/text.jsonl", "--data.validation-files",
               f"{folder}/text_held_out.jsonl", "--steps", str(asked.pretrain),
               "--eval-every", str(asked.pretrain)])  # fmt: skip
    for seed, name in itertools.product(asked.seeds, asked.variants):
        reward = f"{folder}/coin.py:reward" if name == "random" else "arithmetic"
        run(folder / f"{name}-{seed}", [
            "finetune", "reinforce", "--init-from", str(base), *files, "--data.reward", reward, *VARIANTS[name],
            "--policy.max-new-tokens", "6", "--seed", str(seed), "--steps", str(asked.steps), "--eval-every", "20",
            "--optimizer.learning-rate", "5e-4", "--batch-size", "32",
        ])  # fmt: skip
        measured(folder / f"{name}-{seed}", folder)
    measured(base, folder)
    table(folder)


def write(folder: Path) -> None:
    """The text with its wrong results, the sums that are asked and those that are only measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    draw.shuffle(sums)

    def line(pair: tuple[int, int]) -> dict:
        right = sum(pair)
        result = draw.choice([n for n in range(2 * LARGEST + 1) if n != right]) if draw.random() < WRONG else right
        return {"text": f"{pair[0]}+{pair[1]}={result}"}

    def lines(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("text.jsonl", [line(pair) for _ in range(50) for pair in sums])
    lines("text_held_out.jsonl", [line(pair) for pair in sums])
    asked = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    lines("train.jsonl", asked[HELD_OUT:])
    lines("held_out.jsonl", asked[:HELD_OUT])
    (folder / "coin.py").write_text(COIN)


def run(run_dir: Path, words: list[str]) -> None:
    """A run by its command, unless it is finished."""
    summary = run_dir / "summary.json"
    if summary.exists() and json.loads(summary.read_text()).get("finished"):
        return
    command = [*words, "--run-dir", str(run_dir)]
    print("./launch.sh", *command, flush=True)
    subprocess.run([sys.executable, "-P", "-m", "espalier", *command], check=True)


def measured(run_dir: Path, folder: Path) -> None:
    """Right answers of the held-out sums, whatever was rewarded: a line of results.jsonl."""
    command = ["evaluate", str(run_dir), "--task", "reinforcement", "--data.validation", f"{folder}/held_out.jsonl",
               "--data.reward", "arithmetic", "--json"]  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-P", "-m", "espalier", *command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    metrics = json.loads(found[found.index("{") :])
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({"run": run_dir.name} | metrics) + "\n")


def table(folder: Path) -> None:
    """The last result of each run."""
    rows = {row["run"]: row for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}
    for name, row in rows.items():
        metrics = row.get("metrics", row)
        print(f"{name:20} pass@1 {metrics['pass@1']:.3f}  pass@8 {metrics['pass@8']:.3f}  most probable "
              f"{metrics['greedy_pass@1']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
