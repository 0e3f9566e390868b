"""Tokens to the same loss: recipes against the tuned BERT and GPT-2 recipes, at one size, on books.

A variant is a list of flags; every run is a normal run directory, whose command a person can give by hand. What is
finished is not run again, so that more variants, rates, seeds and lengths can be added at any time:

    .venv/bin/python benchmarks/recipe.py runs/recipe --books ../shared/data/books --task mlm --variants bert \\
        --rates 5e-4 1e-3 2e-3 4e-3 --steps 500
    .venv/bin/python benchmarks/recipe.py runs/recipe --books ../shared/data/books --task mlm --variants bert \\
        --best --seeds 0 1 2 --steps 1000
    .venv/bin/python benchmarks/recipe.py runs/recipe --books ../shared/data/books --plan
    .venv/bin/python benchmarks/recipe.py runs/recipe --table

--plan runs all that docs/experiments.md asks, the most worth first.
--best takes the rate at which a run of that variant and length, or else of any length, reached the lowest loss.
--table writes results.jsonl (a line a run), table.md and curves.png into the folder, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZE = (
    "--model.hidden-size WIDTH --model.num-hidden-layers 4 --model.num-attention-heads 4 --model.vocab-size 4096 "
    "--model.max-position-embeddings 128 --model.hidden-dropout 0 --model.attention-dropout 0 "
    "--data.sequence-length 128 --batch-size 16 --accumulation 1"
)
MLM = f"{SIZE} --data.tokenizer-kind wordpiece --data.lowercase"
PLAIN = "--model.intermediate-size PLAIN"
GATED = "--model.intermediate-size GATED"
"""Three matrices instead of two: as many parameters as with PLAIN, near enough."""
MUON = "--optimizer.name muon"
WSD = "--optimizer.schedule wsd --optimizer.decay-fraction 0.3"
# ModernBERT's layers, all of them global.
MODERN = (
    f"modern-base {MLM} {GATED} --model.layer-period global --masking.mask-fraction 0.8 --masking.random-fraction 0.1"
)
ADAMW = "--optimizer.schedule linear --optimizer.warmup 0.1 --optimizer.weight-decay 0.01 --masking.rate 0.15"
MASKS = "--masking.rate 0.3 --masking.final-rate 0.15"
BERT = f"bert-base {MLM} {PLAIN} --optimizer.warmup 0.1"
GPT2 = f"gpt2 {SIZE} {PLAIN} --optimizer.warmup 0.05"
PRE_RMS = (
    f"gpt2 {SIZE} {GATED} --optimizer.warmup 0.05 --model.norm rmsnorm --model.no-norm-bias "
    "--model.position-embedding rotary --model.gated-mlp --model.hidden-act silu --model.no-attention-bias "
    "--model.no-mlp-bias"
)
LLAMA = f"{PRE_RMS} --model.model-type llama"
QWEN3 = f"{PRE_RMS} --model.model-type qwen3 --model.qk-norm"
QK_NORM = "--model.qk-norm"
ZERO = "--model.zero-outputs"
RELU2 = "--model.hidden-act relu2"
VARIANTS: dict[str, dict[str, str]] = {
    "mlm": {
        "bert": BERT,
        "bert-b2": f"{BERT} --optimizer.b2 0.98",
        "bert-muon": f"{BERT} {MUON}",
        "bert-wsd": f"{BERT} {WSD}",
        "bert-masks": f"{BERT} {MASKS}",
        "bert-pre": f"{BERT} --model.norm-position pre --model.final-norm",
        "bert-relu2": f"{BERT} {RELU2}",
        "bert-zero": f"{BERT} {ZERO}",
        "modern": f"{MODERN} {ADAMW}",
        "modern-muon": f"{MODERN} {ADAMW} {MUON}",
        "modern-masks": f"{MODERN} {ADAMW} {MASKS}",
        "modern-muon-masks": f"{MODERN} {ADAMW} {MUON} {MASKS}",
        "modern-muon-wsd": f"{MODERN} {ADAMW} {MUON} {WSD}",
        "modern-muon-masks-warm": f"{MODERN} {ADAMW} {MUON} {MASKS} --optimizer.warmup 0.02",
        "modern-muon-masks-wsd": f"{MODERN} {ADAMW} {MUON} {MASKS} {WSD}",
        "modern-muon-masks-zero": f"{MODERN} {ADAMW} {MUON} {MASKS} {ZERO}",
        "modern-muon-masks-relu2": f"{MODERN} {ADAMW} {MUON} {MASKS} {RELU2}",
        "modern-muon-masks-qk": f"{MODERN} {ADAMW} {MUON} {MASKS} {QK_NORM}",  # Of no stock class.
    },
    "clm": {
        "gpt2": GPT2,
        "gpt2-muon": f"{GPT2} {MUON}",
        "gpt2-wsd": f"{GPT2} {WSD}",
        "gpt2-qk": f"{GPT2} {QK_NORM}",  # Of no stock class.
        "gpt2-zero": f"{GPT2} {ZERO}",
        "gpt2-relu2": f"{GPT2} {RELU2}",
        "qwen3": QWEN3,
        "llama": LLAMA,
        "qwen3-muon": f"{QWEN3} {MUON}",
        "qwen3-muon-wsd": f"{QWEN3} {MUON} {WSD}",
        "qwen3-muon-zero": f"{QWEN3} {MUON} {ZERO}",
    },
}
BASELINES = {"mlm": "bert", "clm": "gpt2"}
RECIPES = {"mlm": "modern-muon-masks", "clm": "qwen3-muon"}
PAIRS = {
    "mlm": [("modern", "modern-muon"), ("bert", "bert-muon"), ("bert", "modern")]
    + [
        ("modern-muon-masks", variant)
        for variant in VARIANTS["mlm"]
        if variant.startswith("modern-m") and variant != RECIPES["mlm"]
    ],
    "clm": [("gpt2", "gpt2-muon"), ("gpt2", "qwen3"), ("qwen3", "qwen3-muon")]
    + [("qwen3-muon", variant) for variant in VARIANTS["clm"] if variant.startswith("qwen3-muon-")],
}
"""What `pairs` compares: one against other."""
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
MUON_RATIO = 5
"""The rate of the matrices under Muon, as a multiple of that of the other parameters."""
LENGTH = 1000


def plan() -> list[tuple[str, str, tuple[float, ...], tuple[int, ...], int]]:
    """(task, variant, rates or none for the best, seeds, steps) in the order of worth."""
    rows = []
    for task in VARIANTS:
        base, recipe = BASELINES[task], RECIPES[task]
        rows += [(task, base, GRID, (0,), LENGTH), (task, recipe, GRID[2:], (0,), LENGTH // 2)]
    for task in VARIANTS:
        rows += [(task, BASELINES[task], (), (0, 1, 2), LENGTH), (task, RECIPES[task], (), (0, 1, 2), LENGTH // 2)]
    # Muon against AdamW at equal tokens, each with its own grid.
    rows += [("mlm", v, GRID, (0,), LENGTH // 2) for v in ("modern", "modern-muon")]
    rows += [("mlm", v, (), (0, 1, 2, 3, 4), LENGTH // 2) for v in ("modern", "modern-muon")]
    for task, variants in VARIANTS.items():
        rows += [(task, variant, (1e-3, 2e-3, 4e-3), (0,), LENGTH // 2) for variant in variants]
    return rows


def sized(flags: str, width: int) -> list[str]:
    """The flags at one size."""
    values = {"WIDTH": width, "PLAIN": 4 * width, "GATED": round(width * 8 / 3 / 8) * 8}
    return [str(values.get(flag, flag)) for flag in flags.split()]


def name_of(task: str, variant: str, rate: float, seed: int, steps: int) -> str:
    return f"{task}-{variant}-{rate:g}-seed{seed}-{steps}"


def command_of(
    folder: Path, books: Path, task: str, variant: str, rate: float, seed: int, steps: int, width: int, flags: str
) -> list[str]:
    """The command of one run, as it is given to launch.sh; `flags` follow those of the variant and outdo them."""
    of_variant = sized(VARIANTS[task][variant], width)
    given = [task, *of_variant, *flags.split(), "--optimizer.learning-rate", f"{rate:g}"]
    if "muon" in of_variant:
        given += ["--optimizer.muon-learning-rate", f"{MUON_RATIO * rate:g}"]
    every = max(1, steps // 10)
    given += ["--seed", str(seed), "--steps", str(steps), "--eval-every", str(every), "--log-every", str(every)]
    given += ["--eval-rows", "256", "--checkpoint.every", "1000000"]
    given += ["--data.files", str(books / "train/*.txt"), "--data.validation-files", str(books / "validation/*.txt")]
    return [*given, "--run-dir", str(folder / name_of(task, variant, rate, seed, steps))]


def curve_of(run: Path) -> list[tuple[int, float]]:
    """(step, held-out loss) of every evaluation of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]


def results(folder: Path) -> list[dict]:
    """A record of every finished run."""
    found = []
    for path in sorted(folder.glob("*/recipe.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        summary = json.loads((path.parent / "summary.json").read_text(encoding="utf-8"))
        found.append(record | {"curve": curve_of(path.parent), "tokens": summary["tokens"]})
    return found


def best_rate(folder: Path, task: str, variant: str, steps: int) -> float:
    """The rate of the lowest loss, of one seed, among runs of this length or else of all."""
    runs = [r for r in results(folder) if (r["task"], r["variant"]) == (task, variant)]
    runs = [r for r in runs if r["steps"] == steps] or runs
    if not runs:
        sys.exit(f"no run of {task} {variant} in {folder}; give --rates first")
    seed = min(r["seed"] for r in runs)
    return min((r for r in runs if r["seed"] == seed), key=lambda r: r["loss"])["rate"]


def train(
    folder: Path, books: Path, task: str, variant: str, rate: float, seed: int, steps: int, width: int, flags: str
) -> None:
    name = name_of(task, variant, rate, seed, steps)
    kept = folder / name / "recipe.json"
    if kept.exists():
        return
    command = command_of(folder, books, task, variant, rate, seed, steps, width, flags)
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        code = subprocess.call(
            [sys.executable, "-P", "-m", "espalier", *command], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    if code:
        print(f"{name}: exit code {code}, see {name}.log", flush=True)
        return
    loss = curve_of(folder / name)[-1][1]
    record = {"task": task, "variant": variant, "rate": rate, "seed": seed, "steps": steps, "loss": loss}
    record["command"] = "./launch.sh " + " ".join(command)
    kept.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k != "command"}), flush=True)


def steps_to(curve: list[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve first is at a loss, by linear interpolation; None if it never is."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = step, value
    return None


def table(runs: list[dict]) -> str:
    """Markdown: a row for each variant, rate and length; means over seeds, with the range."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["steps"], run["variant"], run["rate"]), []).append(run)
    lines = ["| task | steps | variant | rate | seeds | held-out loss | range |", "|---|---|---|---|---|---|---|"]
    for key in sorted(groups, key=lambda k: (*k[:2], statistics.mean(r["loss"] for r in groups[k]))):
        losses = [run["loss"] for run in groups[key]]
        task, steps, variant, rate = key
        spread = f"{min(losses):.3f} to {max(losses):.3f}" if len(losses) > 1 else ""
        lines.append(
            f"| {task} | {steps:,} | {variant} | {rate:g} | {len(losses)} | {statistics.mean(losses):.3f} | {spread} |"
        )
    return "\n".join(lines) + "\n"


def ratios(runs: list[dict]) -> str:
    """Markdown: tokens to the loss at which the baseline ends, at its best rate and greatest length, mean of its seeds.

    A run that is longer than it needs has a higher rate where it passes that loss than one that ends there: what is
    said of it is too little rather than too much.
    """
    lines = [
        "| task | variant | rate | length | steps to the loss | baseline's steps ÷ these |",
        "|---|---|---|---|---|---|",
    ]
    for task, base in BASELINES.items():
        mine = [run for run in runs if run["task"] == task]
        of_base = [run for run in mine if run["variant"] == base]
        if not of_base:
            continue
        length = max(run["steps"] for run in of_base)
        longest = [run for run in of_base if run["steps"] == length]
        best = min((run for run in longest if run["seed"] == 0), key=lambda run: run["loss"])["rate"]
        target = statistics.mean(run["loss"] for run in longest if run["rate"] == best)
        groups: dict[tuple, list[float | None]] = {}
        for run in mine:
            if run["variant"] != base:
                group = groups.setdefault((run["variant"], run["rate"], run["steps"]), [])
                group.append(steps_to(run["curve"], target))
        lines.append(f"| {task} | {base} | {best:g} | {length:,} | {length:,} (loss {target:.3f}) | 1 |")
        for (variant, rate, steps), reached in sorted(groups.items()):
            met = [step for step in reached if step is not None]
            if len(met) < len(reached):
                shown, gain = f"{len(reached) - len(met)} of {len(reached)} not reached", ""
            else:
                shown = ", ".join(f"{step:.0f}" for step in met)
                gain = f"{length / statistics.mean(met):.2f}"
            lines.append(f"| {task} | {variant} | {rate:g} | {steps:,} | {shown} | {gain} |")
    return "\n".join(lines) + "\n"


def pairs(runs: list[dict]) -> str:
    """Markdown: what each recipe changes, by itself, at equal tokens: `other` - `one`, paired by seed.

    A seed is the order of the rows and which tokens are hidden, and where the layers are alike the first parameters
    too. Each variant is at the rate of `rate_by_mean`. Student's t of the differences, two-sided.
    """
    from scipy import stats

    lines = [
        "| task | steps | one | other | seeds | one, mean ± deviation | other | difference, 95 % interval | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lengths = sorted({(run["task"], run["steps"]) for run in runs})
    for task, steps, (one, other) in [(*at, pair) for at in lengths for pair in PAIRS[at[0]]]:
        losses = [at_best(runs, task, variant, steps) for variant in (one, other)]
        seeds = sorted(losses[0].keys() & losses[1].keys())
        if len(seeds) < 2:
            continue
        a, b = ([loss[seed] for seed in seeds] for loss in losses)
        test = stats.ttest_rel(b, a)
        low, high = test.confidence_interval(0.95)
        means = [f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" for x in (a, b)]
        change = statistics.mean(b) - statistics.mean(a)
        lines.append(
            f"| {task} | {steps:,} | {one} | {other} | {', '.join(map(str, seeds))} | {means[0]} | {means[1]} "
            f"| {change:+.3f} ({low:+.3f} to {high:+.3f}) | {test.pvalue:.2g} |"
        )
    return "\n".join(lines) + "\n"


def at_best(runs: list[dict], task: str, variant: str, steps: int) -> dict[int, float]:
    """Seed → held-out loss of a variant at one length, at its best rate."""
    own = [run for run in runs if (run["task"], run["variant"], run["steps"]) == (task, variant, steps)]
    rate = rate_by_mean(own)
    return {run["seed"]: run["loss"] for run in own if run["rate"] == rate}


def rate_by_mean(runs: list[dict]) -> float | None:
    """Of the rates that were given the most seeds, the one of the lowest mean loss; runs of one variant and length."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        losses.setdefault(run["rate"], []).append(run["loss"])
    return min(losses, key=lambda rate: (-len(losses[rate]), statistics.mean(losses[rate])), default=None)


def draw(runs: list[dict], path: Path, wanted: list[str]) -> None:
    """Held-out loss over tokens, each variant at its best rate; every length and seed is a line.

    wanted: the variants, or none for baselines and recipes.
    """
    from matplotlib.figure import Figure

    tasks = [task for task in VARIANTS if any(run["task"] == task for run in runs)]
    figure = Figure(figsize=(6 * len(tasks), 4.2), layout="constrained")
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        for number, variant in enumerate(wanted or (BASELINES[task], RECIPES[task])):
            own = [run for run in runs if (run["task"], run["variant"]) == (task, variant)]
            for steps in sorted({run["steps"] for run in own}):
                alike = [run for run in own if run["steps"] == steps]
                rate = rate_by_mean(alike)
                for at, run in enumerate(run for run in alike if run["rate"] == rate):
                    x, y = zip(*run["curve"], strict=True)
                    label = f"{variant}, rate {rate:g}, {steps:,} steps" if at == 0 else None
                    millions = [step * run["tokens"] / run["steps"] / 1e6 for step in x]
                    axes.plot(millions, y, color=f"C{number}", marker=".", label=label)
        axes.set(title=task, xlabel="million tokens", ylabel="held-out loss")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are")
    parser.add_argument("--books", type=Path, help="folder with train/*.txt and validation/*.txt")
    parser.add_argument("--task", choices=list(VARIANTS), default="mlm")
    parser.add_argument("--variants", nargs="+", default=[])
    parser.add_argument("--rates", nargs="+", type=float, default=[])
    parser.add_argument("--best", action="store_true", help="the best rate of what has been run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--plan", action="store_true", help="everything, the most worth first")
    parser.add_argument("--width", type=int, default=64, help="of the model; a folder holds runs of one")
    parser.add_argument(
        "--flags", default="", help="of every run, like the width of one folder: --flags='--batch-size 8'"
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--draw", nargs="+", default=[], help="variants in curves.png; else baseline and recipe")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = plan() if given.plan else []
    for variant in given.variants:
        rates = () if given.best else tuple(given.rates)
        rows.append((given.task, variant, rates, tuple(given.seeds), given.steps))
    if rows and given.books is None:
        parser.error("--books: where is the text?")
    for task, variant, rates, seeds, steps in rows:
        for rate in rates or (best_rate(folder, task, variant, steps),):
            for seed in seeds:
                train(folder, given.books.resolve(), task, variant, rate, seed, steps, given.width, given.flags)
    if given.table:
        runs = results(folder)
        (folder / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
        text = "\n".join([table(runs), ratios(runs), pairs(runs)])
        (folder / "table.md").write_text(text, encoding="utf-8")
        draw(runs, folder / "curves.png", given.draw)
        print(text, end="")


if __name__ == "__main__":
    main()
