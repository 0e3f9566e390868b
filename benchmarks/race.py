"""Espalier against what people would use instead, on the same work: `./launch.sh python -m benchmarks.race W1 W2`.

Every contender starts from the same weights and sees the same batches. First each makes fifty steps, and their losses
must agree; then they are timed, each in a process of its own, in an order that turns around from round to round, after
a warm-up. PyTorch is a part of the test environment (`./launch.sh test --collect-only` installs it). On a GPU the works
are bert-base and gpt2. Results go to FOLDER/race.json, a table race.md and a picture race.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.work import WORKS, Work, flops, write

CHECKED, WARM = 50, 8
"""Steps whose losses are compared, and steps of a timed process that do not count: compiling, caches, clock rates."""
CLOSE = {"float32": 1e-3, "bfloat16": 3e-2}
"""How far losses of products in float32 or bfloat16 may lie from the first contender's, in nats."""
LIMIT = 1800
"""Seconds that a contender may take."""


class Contender(NamedTuple):
    name: str
    arguments: tuple[str, ...]
    """The module and what stands behind the number of steps."""
    dtype: str
    ours: bool = False


CONTENDERS = (
    Contender("Espalier", ("benchmarks.ours", "float32"), "float32", True),
    Contender("Espalier, scanned", ("benchmarks.ours", "float32", "scan"), "float32", True),
    Contender("Espalier, bf16 products", ("benchmarks.ours", "products"), "bfloat16", True),
    Contender("Trainer", ("benchmarks.pytorch", "trainer", "eager", "float32"), "float32"),
    Contender("Trainer, compiled", ("benchmarks.pytorch", "trainer", "compile", "float32"), "float32"),
    Contender("Trainer, compiled, bf16", ("benchmarks.pytorch", "trainer", "compile", "bfloat16"), "bfloat16"),
    Contender("loop", ("benchmarks.pytorch", "loop", "eager", "float32"), "float32"),
    Contender("loop, compiled", ("benchmarks.pytorch", "loop", "compile", "float32"), "float32"),
    Contender("loop, bf16", ("benchmarks.pytorch", "loop", "eager", "bfloat16"), "bfloat16"),
    Contender("loop, compiled, bf16", ("benchmarks.pytorch", "loop", "compile", "bfloat16"), "bfloat16"),
)
"""The first is what the others are compared with. Trainer: that of transformers; loop: of our own writing."""
ON_GPUS = (Contender("Espalier, bf16", ("benchmarks.ours", "bfloat16"), "bfloat16", True),)


class Timing(NamedTuple):
    """Of one contender, over all rounds. Seconds."""

    step: float
    """Median."""
    spread: float
    """Half of the distance between the quartiles."""
    first: float
    """From the start of the process to the end of the first step: starting and compiling. The least."""
    bytes: int
    """The most memory, of the GPU where there is one."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    asked.folder.mkdir(parents=True, exist_ok=True)
    chosen = [c for c in (*CONTENDERS, *(ON_GPUS if _gpu() else ())) if re.search(asked.contenders, c.name)]
    found = {"hardware": hardware(), "rounds": asked.rounds, "steps": asked.steps, "works": {}}
    for name in asked.works:
        work = WORKS[name]
        with tempfile.TemporaryDirectory() as place:
            write(work, Path(place), max(CHECKED, asked.steps + WARM))
            differences = check(chosen, Path(place))
            timings, versions = race(chosen, Path(place), asked.steps, asked.rounds)
        found["works"][name] = {
            "tokens": work.tokens,
            "flops": flops(work),
            "peak_flops": peak_flops(),
            "differences": differences,
            "timings": {who: timing._asdict() for who, timing in timings.items()},
            "versions": versions,
        }
        (asked.folder / "race.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (asked.folder / "race.md").write_text(table(found), encoding="utf-8")
    picture(found, asked.folder / "race.png")
    print(table(found))


def check(contenders: Sequence[Contender], folder: Path) -> dict[str, float]:
    """How far the losses of each lie from those of the first, at most; ends the race where that is too far."""
    losses = {c.name: run(c, folder, CHECKED)["losses"] for c in contenders}
    first = losses[contenders[0].name]
    far = {name: max(abs(a - b) for a, b in zip(first, mine, strict=True)) for name, mine in losses.items()}
    for contender in contenders:
        print(f"{CHECKED} losses of {contender.name}: within {far[contender.name]:.1e}", file=sys.stderr, flush=True)
        if not far[contender.name] < CLOSE[contender.dtype]:
            sys.exit(f"{contender.name} does other work: a loss is {far[contender.name]:.3f} away")
    return far


def race(
    contenders: Sequence[Contender], folder: Path, steps: int, rounds: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """(timings by name, versions of the libraries)."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    firsts: dict[str, list[float]] = {c.name: [] for c in contenders}
    most: dict[str, int] = {c.name: 0 for c in contenders}
    versions: dict[str, str] = {}
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            said = run(contender, folder, steps + WARM)
            ends, name = said["ends"], contender.name
            seconds[name] += [b - a for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]
            firsts[name].append(ends[0])
            most[name] = max(most[name], said["device_bytes"] or said["host_bytes"])
            versions |= said["versions"]
            print(f"round {number + 1}, {name}: {statistics.median(seconds[name]):.3f} s", file=sys.stderr, flush=True)
    timings = {}
    for name, all_seconds in seconds.items():
        low, middle, high = statistics.quantiles(all_seconds, n=4)
        timings[name] = Timing(middle, (high - low) / 2, min(firsts[name]), most[name])
    return timings, versions


def run(contender: Contender, folder: Path, steps: int) -> dict[str, Any]:
    """What a contender reports of so many steps."""
    module, *rest = contender.arguments
    with tempfile.TemporaryDirectory() as elsewhere:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", module, str(folder), str(steps), *rest],
            env=_environment(contender.ours),
            cwd=elsewhere,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    if ended.returncode:
        sys.exit(f"{contender.name} failed:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def _environment(ours: bool) -> Mapping[str, str]:
    """That of a training command of ours, or one in which nothing is set."""
    from espalier.__main__ import KEPT_MEMORY, keeps_memory

    plain = {name: value for name, value in os.environ.items() if name not in KEPT_MEMORY}
    plain["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    return plain | KEPT_MEMORY if ours and keeps_memory(plain) else plain


def peak_flops() -> float:
    """FLOP/s of float32 products of XLA on this CPU, or the stated bfloat16 peak of the GPU."""
    program = """
import time, jax, jax.numpy as jnp
from sharding.topology import peak_flops
device = jax.devices()[0]
if device.platform != "cpu":
    print(peak_flops(device))
else:
    x, y = jnp.ones((4096, 1024)), jnp.ones((1024, 1024))
    product, times = jax.jit(jnp.dot), []
    for _ in range(40):
        began = time.perf_counter()
        product(x, y).block_until_ready()
        times.append(time.perf_counter() - began)
    print(2 * 4096 * 1024 * 1024 / sorted(times)[10])
"""
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program], env=_environment(True), capture_output=True, text=True, check=True
    )
    return float(ended.stdout.split()[-1])


def hardware() -> str:
    """Processor, cores, GPU, Python."""
    try:
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        cpu = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} cores of {cpu[1] if cpu else platform.processor() or 'an unnamed CPU'}", _gpu()]
    return ", ".join([part for part in parts if part] + [f"Python {platform.python_version()}"])


def _gpu() -> str:
    try:
        names = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(names, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def table(found: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    lines = [f"On {found['hardware']}; {found['rounds']} rounds of {found['steps']} steps.\n"]
    for name, work in found["works"].items():
        timings = {who: Timing(**timing) for who, timing in work["timings"].items()}
        floor = work["flops"] / work["peak_flops"]
        versions = ", ".join(f"{library} {version}" for library, version in sorted(work["versions"].items()))
        lines += [
            f"**{name}**: {_words(WORKS[name])}. {versions}.\n",
            "| | tokens/s | step | first step after | memory | of the floor | losses within |",
            "|---|---|---|---|---|---|---|",
        ]
        for who, timing in timings.items():
            cells = (
                who,
                f"{work['tokens'] / timing.step:,.0f}",
                f"{1e3 * timing.step:.0f} ± {1e3 * timing.spread:.0f} ms",
                f"{timing.first:.1f} s",
                f"{timing.bytes / 1e9:.2f} GB",
                f"{floor / timing.step:.0%}",
                f"{work['differences'][who]:.0e}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        peak = work["peak_flops"] / 1e9
        lines.append(
            f"\nFloor: {work['flops'] / 1e9:.1f} GFLOP a step ÷ {peak:,.0f} GFLOP/s, what XLA's products reach here "
            f"(on a GPU: its stated peak) = {1e3 * floor:.0f} ms.\n"
        )
    return "\n".join(lines)


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Bars of tokens a second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    works = found["works"]
    most = max(len(work["timings"]) for work in works.values())
    figure = Figure(figsize=(7.4, 0.5 + (0.3 * most + 0.7) * len(works)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, work) in zip(figure.subplots(len(works), 1, squeeze=False)[:, 0], works.items(), strict=True):
        names = list(work["timings"])[::-1]
        values = [work["tokens"] / work["timings"][who]["step"] for who in names]
        colours = ["#1b6e53" if who.startswith("Espalier") else "#9aa7a1" for who in names]
        axes.bar_label(axes.barh(names, values, color=colours), fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set_title(f"{name}: {_words(WORKS[name])}; tokens/s", fontsize=9, loc="left")
        axes.tick_params(labelsize=8, length=0)
        axes.set_xticks([])
        axes.set_xlim(0, 1.15 * max(values))
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)


def _words(work: Work) -> str:
    kind = "masked LM" if work.objective == "masked_lm" else "causal LM"
    sizes = f"hidden {work.hidden} × {work.layers} layers, vocabulary {work.vocabulary:,}"
    return f"{kind}, {sizes}, {work.rows} rows of {work.length} tokens"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("works", nargs="*", choices=[[], *WORKS], default=["W1", "W2"], help=", ".join(WORKS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a process")
    parser.add_argument("--contenders", default="", help="regular expression: only those whose name it matches")
    parser.add_argument("--folder", type=Path, default=Path("race"), help="where results go")
    asked = parser.parse_args(argv)
    if asked.rounds < 1 or asked.steps < 3:
        parser.error("at least 1 round and 3 steps")
    if not any(re.search(asked.contenders, contender.name) for contender in CONTENDERS):
        parser.error(f"--contenders: none of {', '.join(contender.name for contender in CONTENDERS)}")
    return asked


if __name__ == "__main__":
    main()
