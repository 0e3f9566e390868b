"""Peak memory of every preset on TPU slices as it was compiled last, and the largest batch that fits: peaks.json.

python -m espalier.commands.plan.compile.peaks                          # what is recorded, as a table
python -m espalier.commands.plan.compile.peaks --write                  # compile all of it again: two hours on one core
python -m espalier.commands.plan.compile.peaks --write gpt2 v5e         # only what has all of these words in its name
python -m espalier.commands.plan.compile.peaks --write --no-largest     # without the search for the largest batch

`--write` also writes the table into docs/plan.md. A preset that needs MOST_RAISED more than recorded fails
tests/test_plan_compiled.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.commands.plan.plan import Plan

FILE = pathlib.Path(__file__).with_name("peaks.json")
DOCS = pathlib.Path(__file__).parents[4] / "docs" / "plan.md"
BEGIN, END = "<!-- recorded peaks: begin -->", "<!-- recorded peaks: end -->"
COMMAND = "./launch.sh python -m espalier.commands.plan.compile.peaks --write"
MOST_RAISED = 0.03
"""Part of a recorded peak by which it may rise unnoticed."""
GIB = 2**30

SLICES: Mapping[str, Sequence[str]] = {
    "bert-base": ("v5e:4x4", "v6e:4x4", "v5p:2x2x2"),
    "bert-large": ("v5e:8x8", "v6e:8x8", "v5p:2x2x4"),
    "modern-base": ("v5e:8x8", "v6e:4x4", "v5p:2x2x2"),
    "encoder-small": ("v5e:4x4", "v6e:4x4", "v5p:2x2x2"),
    "hybrid": ("v5e:4x4", "v6e:4x4", "v5p:2x2x2"),
    "mntp": ("v5e:4x4", "v6e:4x4", "v5p:2x2x2"),
    "electra-small": ("v5e:4x4",),
    "electra-base": ("v5e:4x4",),
    "diffusion-base": ("v5e:8x8",),
    "gpt2": ("v5e:4x4", "v6e:4x4", "v5p:2x2x2", "v4:2x2x2"),
    "gpt2-medium": ("v5e:8x8", "v6e:8x8", "v5p:2x2x4"),
    "decoder-small": ("v5e:4x4", "v6e:4x4", "v5p:2x2x2"),
    "llama-1b": ("v5e:16x16", "v6e:8x8", "v5p:4x4x4"),
    "llama-8b": ("v5e:16x16", "v6e:16x16", "v5p:4x4x4"),
    "llama-70b": ("v5e:16x16", "v6e:16x16", "v5p:8x8x8"),
    "llama-405b": ("v5p:16x16x16",),
}
"""Where each preset is compiled. A slice of v5e or v6e has at most 256 chips, whose memory cannot hold llama-405b."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """A preset as it is, compiled for a slice; bytes of one device."""

    params: int
    mesh: str
    rows: int
    """Of a batch."""
    length: int
    accumulation: int
    remat: str
    peak: float
    limit: float
    fits: bool
    largest_rows: int | None
    """The largest batch that was compiled and fits, every other setting the same; 0 = not one row a device does; None =
    not looked for. Rows of a device and micro-batch are tried in steps of an eighth of their power of two."""
    largest_peak: float | None
    """With it."""
    versions: str
    """Of JAX and libtpu."""


def name_of(preset: str, topology: str) -> str:
    return f"{preset} {topology}"


def recorded(file: pathlib.Path = FILE) -> dict[str, Peak]:
    """What is recorded, by name_of."""
    return {name: Peak(**values) for name, values in json.loads(file.read_text()).items()}


def raised(name: str, peak: float, known: Mapping[str, Peak]) -> str | None:
    """What to say of a peak, in bytes of a device, that is MOST_RAISED above the recorded one; None if it is not.

    name: as name_of gives it.
    """
    if name not in known:
        return f"{name} is not recorded; {COMMAND} {name}"
    before = known[name]
    if peak <= before.peak * (1 + MOST_RAISED):
        return None
    return (
        f"{name} needs {peak / GIB:.2f} GiB a device, {peak / before.peak - 1:.1%} more than the "
        f"{before.peak / GIB:.2f} recorded with {before.versions}; see with `plan` what takes it, "
        f"or accept it: {COMMAND} {name}"
    )


def measure(preset: str, topology: str, *, largest: bool = True) -> Peak:
    """Compile a preset for a slice, and if asked again with other batches until the largest that fits is known."""
    from espalier.commands.plan.planner import make_plan
    from espalier.commands.plan.settings import PRESETS, PlanSettings

    config = PRESETS[preset]()

    @functools.cache
    def plan(rows: int) -> Plan:
        return make_plan(dataclasses.replace(config, batch_size=rows), PlanSettings(topology=topology, search=False))

    own = plan(config.batch_size)
    mesh = own.asked.mesh
    unit = mesh.replica * mesh.data * mesh.fsdp * config.accumulation

    def analysed(each: int) -> float:
        """Bytes by analysis, for the first guess."""
        asked = dataclasses.replace(config, batch_size=each * unit, mesh=mesh)
        chips = own.hardware.chips
        return make_plan(asked, PlanSettings(chip=own.hardware.chip.name, chips=chips, search=False)).asked.memory.total

    first = config.batch_size // unit
    known = {first: own.asked.peak}
    scale = own.asked.peak / own.asked.memory.total
    guess = largest_below(own.asked.limit, lambda each: analysed(each) * scale)
    while largest and guess and guess not in known:
        known[guess] = plan(guess * unit).asked.peak
        guess = largest_below(own.asked.limit, line_through(known, own.asked.limit))
    fitting = [each for each in known if plan(each * unit).asked.fits]
    most = max(fitting, default=0) if largest else None
    return Peak(
        params=own.params,
        mesh=str(mesh),
        rows=own.rows,
        length=own.length,
        accumulation=own.asked.accumulation,
        remat=own.asked.remat,
        peak=own.asked.peak,
        limit=own.asked.limit,
        fits=own.asked.fits,
        largest_rows=None if most is None else most * unit,
        largest_peak=known[most] if most else None,
        versions=_versions(),
    )


def largest_below(limit: float, peak: Any) -> int:
    """The most rows of a device, of four binary digits, whose peak(rows) is at most the limit; 0 = none."""
    most = 0
    for power in range(20):
        for rows in sorted({2**power + eighth * 2**power // 8 for eighth in range(8)}):
            if peak(rows) > limit:
                return most
            most = rows
    return most


def line_through(known: Mapping[int, float], limit: float) -> Any:
    """rows → peak, by the line through the two known points that lie nearest to the limit."""
    (a, low), (b, high) = sorted(known.items(), key=lambda point: abs(point[1] - limit))[:2]
    slope = (high - low) / (b - a)
    return lambda rows: known.get(rows, low + slope * (rows - a))


def table(known: Mapping[str, Peak]) -> str:
    """What is recorded, as Markdown."""
    lines = [
        "| preset | slice | mesh | rows × tokens | GiB a device | of | largest batch | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in known.items():
        preset, topology = name.split()
        rows = f"{found.rows:,} × {found.length:,}" + (f" in {found.accumulation}" if found.accumulation > 1 else "")
        peak = f"{found.peak / GIB:.1f}" if found.fits else f"{found.peak / GIB:.1f}, does not fit"
        most = "not looked for | " if found.largest_rows is None else "none | "
        if found.largest_rows and found.largest_peak:
            most = f"{found.largest_rows:,} | {found.largest_peak / GIB:.1f}"
        lines.append(f"| {preset} | {topology} | {found.mesh} | {rows} | {peak} | {found.limit / GIB:.2f} | {most} |")
    return "\n".join(lines)


def documented() -> str:
    """The table as docs/plan.md has it."""
    text = DOCS.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    import os

    parser = argparse.ArgumentParser(
        prog="python -m espalier.commands.plan.compile.peaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="compile and record")
    parser.add_argument("--no-largest", action="store_true", help="leave the largest batch as it is recorded")
    parser.add_argument("words", nargs="*", help="of the preset and the slice: gpt2 v5e")
    arguments = parser.parse_args(argv)
    if arguments.write:
        # As `plan` does: nothing of this needs what the machine has.
        os.environ["JAX_PLATFORMS"] = "cpu"
        for preset, topology in wanted(arguments.words):
            found, name = measure(preset, topology, largest=not arguments.no_largest), name_of(preset, topology)
            known = recorded()
            if arguments.no_largest and name in known:
                before = known[name]
                found = dataclasses.replace(found, largest_rows=before.largest_rows, largest_peak=before.largest_peak)
            known |= {name: found}
            _write({name: known[name] for name in names() if name in known})
            print(f"{name}: {found.peak / GIB:.2f} GiB", flush=True)
    print(table(recorded()))


def names() -> list[str]:
    """Of everything that is to be recorded, in order."""
    return [name_of(preset, topology) for preset, slices in SLICES.items() for topology in slices]


def wanted(words: Iterable[str]) -> list[tuple[str, str]]:
    """(preset, topology) of all, or of those that each word names: a preset, a slice, or its chip."""
    found = []
    for preset, slices in SLICES.items():
        for topology in slices:
            if set(words) <= {preset, topology, topology.split(":")[0]}:
                found.append((preset, topology))
    if not found:
        raise SystemExit(f"nothing is called {' '.join(words)}; there are {', '.join(names())}")
    return found


def _write(known: Mapping[str, Peak]) -> None:
    values = {name: dataclasses.asdict(found) for name, found in known.items()}
    FILE.write_text(json.dumps(values, indent=1) + "\n")
    text = DOCS.read_text()
    DOCS.write_text(text.replace(text[text.index(BEGIN) : text.index(END)], f"{BEGIN}\n{table(known)}\n"))


def _versions() -> str:
    import os

    import jax

    folder = pathlib.Path(os.environ.get("TPU_LIBRARY_PATH", "")).parent
    at = next((f.name.split("-")[1].removesuffix(".dist") for f in folder.parent.glob("libtpu-*.dist-info")), None)
    if at is None:
        import importlib.metadata

        at = importlib.metadata.version("libtpu")
    return f"JAX {jax.__version__}, libtpu {at}"


if __name__ == "__main__":
    main()
