"""All that is to be known of a GPU, by one command: `./launch.sh python -m benchmarks.gpu`.

It checks the attention kernels against XLA's attention, and times training steps of encoders and decoders from 17M to
7B parameters: tokens/s, milliseconds, model FLOPs by the chip's peak (MFU), memory, and what `plan` expected. Each
measurement has a process of its own and a limit of time; what fails is written down and the next one runs. Results are
gpu.json and gpu.md. About ten minutes on an H100; a first compilation of each step is most of it.

--quick: a few tiny ones, also on a CPU. --only: names that match. --tiles: tries block sizes of the Triton kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_step import CASES, QUICK, summary

PEAK = "peak 989 TFLOP/s in bfloat16 (H100 SXM, H200); of another chip that of sharding/topology.py"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Checks attention on a GPU and times training.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, also on a CPU")
    parser.add_argument("--only", default="", help="a regular expression on names of measurements")
    parser.add_argument("--tiles", action="store_true", help="try block sizes of the Triton kernel")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--limit", type=float, default=240, help="seconds of a measurement at most")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of gpu.json and gpu.md")
    given = parser.parse_args(arguments)
    cases = {name: case for name, case in (QUICK if given.quick else CASES).items() if re.search(given.only, name)}
    results: dict[str, Any] = {"attention": None, "steps": {}}
    given.out.mkdir(parents=True, exist_ok=True)

    if re.search(given.only, "attention"):
        options = ["quick"] * given.quick + ["tiles"] * given.tiles
        limit = given.limit * (5 if given.tiles else 1)
        results["attention"] = measured("attention", "benchmarks.gpu_attention", options, limit)
        written(given.out, results)
    memory = None if given.quick else device_memory()
    for name, case in cases.items():
        if memory is not None and case.memory > memory:
            results["steps"][name] = {"error": f"wants {case.memory:g} GB of memory, and here are {memory:.0f}"}
        else:
            arguments = [name, str(2 if given.quick else given.steps)]
            results["steps"][name] = summary(case) | measured(name, "benchmarks.gpu_step", arguments, given.limit)
        written(given.out, results)
    print((given.out / "gpu.md").read_text())
    failed = [name for name, result in results["steps"].items() if "error" in result]
    wrong = results["attention"] is not None and not results["attention"].get("right")
    return 1 if failed or wrong else 0


def measured(name: str, module: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """The line of JSON that a process of its own printed; {"error": why} where it did not."""
    print(f"{name} …", flush=True)
    # Nothing else runs on the GPU: a large model needs more than the three quarters that JAX takes by itself.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    try:
        command = [sys.executable, "-m", module, *arguments]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, cwd=Path(__file__).parents[1]
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:g} s"}
    if ended.returncode:
        said = [line for line in ended.stderr.strip().splitlines() if line.strip()]
        return {"error": said[-1][:500] if said else f"exit code {ended.returncode}"}
    return json.loads(ended.stdout.strip().splitlines()[-1])


def device_memory() -> float | None:
    """GB of the first GPU, asked of the driver, so that this process takes none of it; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return float(said.split()[0]) * 2**20 / 1e9


def written(folder: Path, results: dict[str, Any]) -> None:
    """Write gpu.json and gpu.md."""
    (folder / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "gpu.md").write_text(table(results))


def table(results: dict[str, Any]) -> str:
    """The results in markdown."""
    steps: dict[str, Any] = results["steps"]
    done = [result for result in steps.values() if "error" not in result]
    lines = ["# On a GPU", ""]
    if done:
        versions = ", ".join(f"{name} {version}" for name, version in done[0]["versions"].items())
        lines += [
            f"{done[0]['device']}, {versions}; {PEAK}. Medians of steps; model FLOPs, pairs that see each other.",
            "",
        ]
    lines += [
        "| step | parameters | rows × tokens | attention | ms | planned | tokens/s | MFU | target | GB | planned |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in steps.items():
        if "error" in result:
            lines.append(f"| {name} | {result['error'].replace('|', '/')} |" + " |" * 9)
            continue
        mfu, target = ("–" if share is None else f"{share:.1%}" for share in (result["mfu"], result["target"]))
        milliseconds, planned = (f"{1000 * result[kind]:.1f}" for kind in ("step_seconds", "planned_seconds"))
        memory, expected = (f"{result[kind] / 1e9:.1f}" for kind in ("peak_bytes", "planned_bytes"))
        lines.append(
            f"| {name} | {result['parameters'] / 1e6:,.0f}M | {result['rows']} × {result['length']} "
            f"| {result['attention'].split(':')[0]} | {milliseconds} | {planned} | {result['tokens_per_second']:,.0f} "
            f"| {mfu} | {target} | {memory} | {expected} |"
        )
    for name, packed in steps.items():
        plain = steps.get(name.replace(" packed", " plain"), {})
        if name.endswith(" packed") and "step_seconds" in packed and "step_seconds" in plain:
            share = packed["tokens_per_second"] / plain["tokens_per_second"]
            lines += ["", f"{name.removesuffix(' packed')}: packed rows at {share:.2f} × the speed of plain ones."]
    return "\n".join(lines + attention_lines(results["attention"])) + "\n"


def attention_lines(found: dict[str, Any] | None) -> list[str]:
    """Checks and times of the kernels in markdown."""
    if found is None:
        return []
    if "error" in found:
        return ["", f"Attention: {found['error']}"]
    lines = [
        "",
        "| attention | right | documents apart | error / XLA's | forward, ms | with backward, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in found["checks"] | found["times"]:
        check, times = found["checks"].get(name), found["times"].get(name)
        ratio = max(a / b for a, b in zip(check["errors"], check["errors_of_xla"], strict=True)) if check else None
        marks = [("yes" if check[kind] else "NO") if check else "–" for kind in ("right", "apart")]
        words = [f"{1000 * times[kind]:.2f}" if times else "–" for kind in ("forward", "both")]
        lines.append(" | ".join([f"| {name}", *marks, f"{ratio:.2f}" if ratio else "–", *words]) + " |")
    for name, tiles in found.get("tiles", {}).items():
        best = ", ".join(f"{tile} {1000 * seconds:.2f} ms" for tile, seconds in tiles["best"].items())
        lines += ["", f"{name}: {best}; now {tiles['usual']}"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
