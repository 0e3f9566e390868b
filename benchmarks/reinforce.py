"""What rewards add to imitation: sums, learnt from a text that is often wrong, then from whether they are right.

    ./launch.sh python benchmarks/reinforce.py runs/sums
    ./launch.sh python benchmarks/reinforce.py runs/sums --seeds 0 1 2 3 4 --variants dpo rloo grpo random

A small Llama is pretrained on lines like 7+15=22, of which four in ten have a wrong result; drawn from it, as many
answers are wrong. Then the same sums are asked, and right answers made more probable: by `reinforce`, which draws anew
at each step (mean, rloo, grpo), or by `prefer` on pairs of a right and a wrong answer that the imitation drew once
(dpo). The controls say nothing of sums: `random` rewards by a coin for each completion, `dpo-random` draws by lot which
answer of a pair is the chosen one. All runs are normal run directories, whose commands are printed; what is finished is
not run again. results.jsonl, and the table in words: pass@1 and pass@8 on 50 sums that no reward was given for.
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
    "rloo": ["--policy.baseline", "leave-one-out"],
    "grpo": ["--policy.deviation", "--policy.normaliser", "sequence", "--policy.updates", "2"],
    "random": [],
}
PAIRED = ("dpo", "dpo-random")
NEW = 6
"""Tokens of an answer at most."""
DRAWN = 16
"""Answers to each sum that pairs are made of."""
COIN = '''"""The control: a coin for each completion, whatever it says."""

import random


def reward(prompts, completions, row):
    return [float(random.random() < 0.5) for _ in completions]
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=["mean", "random"], choices=[*VARIANTS, *PAIRED])
    parser.add_argument("--pretrain", type=int, default=1500, help="steps of the imitation")
    parser.add_argument("--steps", type=int, default=300, help="steps of the reinforcement")
    asked = parser.parse_args()
    folder = asked.folder
    write(folder)
    base = folder / "imitation"
    run(base, ["clm", "demo", *SHAPE, "--data.files", f"{folder}/text.jsonl", "--data.validation-files",
               f"{folder}/text_held_out.jsonl", "--steps", str(asked.pretrain),
               "--eval-every", str(asked.pretrain)])  # fmt: skip
    measured(base, folder)
    for seed, name in itertools.product(asked.seeds, asked.variants):
        run_dir = folder / f"{name}-{seed}"
        shared = ["--init-from", str(base), "--seed", str(seed), "--steps", str(asked.steps),
                  "--eval-every", str(asked.steps), "--batch-size", "32"]  # fmt: skip
        if name in PAIRED:
            train, validation = pairs(base, folder, seed, by_lot=name == "dpo-random")
            run(run_dir, ["finetune", "prefer", *shared, "--data.train", train, "--data.validation", validation,
                          "--optimizer.learning-rate", "2e-4"])  # fmt: skip
        else:
            reward = f"{folder}/coin.py:reward" if name == "random" else "arithmetic"
            run(run_dir, ["finetune", "reinforce", *shared, "--data.train", f"{folder}/train.jsonl",
                          "--data.validation", f"{folder}/held_out.jsonl", "--data.reward", reward, *VARIANTS[name],
                          "--policy.max-new-tokens", str(NEW), "--optimizer.learning-rate", "5e-4"])  # fmt: skip
        measured(run_dir, folder)
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


def pairs(base: Path, folder: Path, seed: int, by_lot: bool) -> list[str]:
    """Files of right answers and wrong ones to the same sum, drawn by the imitation; of each sum, as many pairs as
    there are of what it has fewer of."""
    import espalier
    from finetune.tasks.reinforce.rewards import arithmetic

    name = f"{'lot' if by_lot else 'pairs'}-{seed}"
    files = [folder / f"{name}.{side}.jsonl" for side in ("train", "validation")]
    if not all(file.exists() for file in files):
        model, draw = espalier.load(base), random.Random(seed)
        for file, side in zip(files, ("train", "held_out"), strict=True):
            asked = [json.loads(line) for line in (folder / f"{side}.jsonl").read_text().splitlines()]
            prompts = [row["prompt"] for row in asked for _ in range(DRAWN)]
            texts = model.generate(prompts, max_new_tokens=NEW, temperature=1.0, seed=seed)
            rows = []
            for number, row in enumerate(asked):
                drawn = texts[number * DRAWN : (number + 1) * DRAWN]
                right, wrong = (
                    [text for text in drawn if arithmetic(text, row["answer"]) == wanted] for wanted in (1, 0)
                )
                for two in zip(right, wrong, strict=False):
                    chosen, rejected = draw.sample(two, 2) if by_lot else two
                    rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(file) for file in files]


def run(run_dir: Path, words: list[str]) -> None:
    """A run by its command, unless it is finished."""
    summary = run_dir / "summary.json"
    if summary.exists() and json.loads(summary.read_text()).get("finished"):
        return
    command = [*words, "--run-dir", str(run_dir)]
    print("./launch.sh", *command, flush=True)
    subprocess.run([sys.executable, "-P", "-m", "espalier", *command], check=True)


def measured(run_dir: Path, folder: Path) -> None:
    """Right answers of the held-out sums, whatever was rewarded: a line of results.jsonl, unless it is there."""
    if run_dir.name in results(folder):
        return
    summary = json.loads((run_dir / "summary.json").read_text())
    metrics = summary.get("metrics") or {}
    if "pass@1" not in metrics or run_dir.name.startswith("random"):
        command = ["evaluate", str(run_dir), "--task", "reinforcement", "--data.validation",
                   f"{folder}/held_out.jsonl", "--data.reward", "arithmetic", "--json"]  # fmt: skip
        found = subprocess.run(
            [sys.executable, "-P", "-m", "espalier", *command], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        metrics = json.loads(found[found.index("{") :])
        metrics = metrics.get("metrics", metrics)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({"run": run_dir.name, "seconds": summary.get("seconds")} | metrics) + "\n")


def results(folder: Path) -> dict[str, dict]:
    """Name of a run → what it was measured at."""
    file = folder / "results.jsonl"
    return {row["run"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}


def table(folder: Path) -> None:
    """Each variant's mean over its seeds, with its lowest and highest."""
    variants: dict[str, list[dict]] = {}
    for name, row in results(folder).items():
        variant, _, seed = name.rpartition("-")
        variants.setdefault(variant if seed.isdecimal() else name, []).append(row)
    for name, rows in variants.items():
        words = [f"{name:14} seeds {len(rows)}"]
        for metric, said in (("pass@1", "pass@1"), ("pass@8", "pass@8"), ("greedy_pass@1", "most probable")):
            values = [row[metric] for row in rows]
            words.append(f"{said} {statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        words.append(f"{statistics.fmean(row['seconds'] or 0 for row in rows):.0f} s")
        print("  ".join(words))


if __name__ == "__main__":
    main()
