"""The train step compiled for TPU slices that are not here, by the TPU's own compiler on this machine's CPU.

libtpu, the library that drives TPUs, contains the compiler and the description of every slice; JAX compiles for them
ahead of time (docs.jax.dev, "Ahead-of-time lowering and compilation"). What the compiler says of memory is what a slice
would need. Nothing is run, so there is no time in it: that is commands/plan/roofline.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import UserError
from sharding.topology import Chip, chip_named

if TYPE_CHECKING:
    import jax

    from espalier.commands.plan.step import Program
    from sharding.mesh import MeshConfig

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
MOST_CHIPS = 4096
EXAMPLES = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "4x4x4", "8x8x8", "16x16x16"),
}


@dataclass(frozen=True)
class Slice:
    """One or several TPU slices, as `v5e:16x16` names them."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.count

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.devices_per_chip


@dataclass(frozen=True)
class Tensor:
    """A tensor in the memory of one device."""

    name: str
    shape: str
    size: float
    """Bytes."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler says; bytes of one device."""

    fits: bool
    peak: float
    """Arguments and temporaries at their highest together, and the program."""
    arguments: float
    """State and batch, there all the time."""
    temporary: float
    limit: float
    """What the compiler may use."""
    largest: tuple[Tensor, ...]
    """Arguments and temporaries that take the most, the largest first."""
    seconds: float
    """Of the compilation."""
    kernels: int
    """Calls of kernels that are not XLA's own (attention)."""
    collectives: dict[str, int]
    """How many operations of each kind reach other devices."""


def parse_topology(text: str, count: int = 1) -> Slice:
    """`v5e:16x16` as a Slice; UserError that lists what there is."""
    name, _, dimensions = text.strip().lower().partition(":")
    if name not in TPUS:
        raise UserError(f"unknown topology {text!r}; it is one of {_known()}, for instance v5e:4x4")
    chip = chip_named(name)
    examples = ", ".join(f"{name}:{shape}" for shape in EXAMPLES[chip.torus_dimensions])
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", dimensions) or dimensions.count("x") + 1 != chip.torus_dimensions:
        raise UserError(
            f"topology {text!r}: {name} slices have {chip.torus_dimensions} dimensions; for instance {examples}"
        )
    found = Slice(chip, tuple(int(part) for part in dimensions.split("x")), count)
    if count < 1:
        raise UserError(f"slices={count} must be at least 1")
    if found.chips > MOST_CHIPS:
        raise UserError(f"topology {text!r} × {count} has {found.chips} chips; at most {MOST_CHIPS} are planned for")
    return found


def gathers_by_reducing(wanted: Slice, mesh: MeshConfig) -> bool:
    """Whether the compiler gathers what `fsdp` splits by adding up zeros with one part each: all-reduces.

    It does where the axis is the whole of a three-dimensional torus (found by compiling, libtpu 0.0.41). An all-reduce
    moves twice the bytes, and nothing is computed beside it.
    """
    whole = mesh.fsdp == wanted.devices // wanted.count
    return whole and len(wanted.shape) == 3 and min(wanted.shape) >= 4


def devices_of(wanted: Slice) -> list[Any]:
    """The devices of a slice, described by libtpu; UserError where there is no such slice."""
    _find_libtpu()
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": wanted.count} if wanted.count > 1 else {}
    if wanted.chip.name == "v4":
        options["chip_config_name"] = "megacore"
    if math.prod(wanted.shape) < 4:
        options["chips_per_host_bounds"] = (*wanted.shape, 1)[:3]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=wanted.name, **options)
    except Exception as error:
        examples = ", ".join(f"{wanted.chip.name}:{shape}" for shape in EXAMPLES[wanted.chip.torus_dimensions])
        said = " ".join(str(error).split())[:200]
        raise UserError(f"no topology {wanted.name} ({said}); for instance {examples}") from None
    return list(found.devices)


def compile_step(config: Any, mesh: jax.sharding.Mesh, chip: Chip) -> Compiled:
    """Compile the train step of a pretraining configuration for the devices of `mesh`."""
    from espalier.commands.plan.step import lower_step

    step = lower_step(config, mesh)
    began = time.perf_counter()
    try:
        with _uncached():
            program = step.lowered.compile()
    except Exception as error:
        if not re.search(r"Used \S+ of \S+ hbm", str(error)):
            raise
        return _too_large(str(error), step, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    arguments = memory.argument_size_in_bytes
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        fits=True,
        peak=arguments + temporary + memory.generated_code_size_in_bytes,
        arguments=arguments,
        temporary=temporary,
        limit=chip.memory,
        largest=_largest([*_arguments(step), *_temporaries(text)]),
        seconds=seconds,
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        collectives=collectives(text),
    )


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text: str) -> dict[str, int]:
    """How many operations of each kind a compiled program (its HLO text) has; a started and awaited one counts once."""
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}


def shapes_of(text: str, operation: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, shape) of every result of an operation in HLO text, those in tuples too."""
    found = []
    for result in re.findall(rf"= (.*?) {operation}(?:-start)?\(", text):
        found += [(kind, _shape(sizes)) for kind, sizes in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", result)]
    return found


BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


def _temporaries(text: str) -> Iterator[Tensor]:
    """What the program holds for a while: stacks that a loop fills, layer by layer, and the largest single results."""
    stacks = re.findall(r"= ([a-z]+\d+)\[([\d,]+)\]\S* custom-call\(\).*AllocateBuffer", text)
    for (kind, sizes), count in Counter(stacks).items():
        yield _stacked(f"{kind}[{sizes}]", count, math.prod(_shape(sizes)) * BYTES.get(kind, 4))
    pattern = r"= ([a-z]+\d+)\[([\d,]+)\]\S* (?:fusion|convolution|custom-call)\(.*?op_name=\"([^\"]*)\""
    for kind, sizes, name in re.findall(pattern, text):
        if (kind, sizes) not in stacks:
            yield Tensor(_short_name(name), f"{kind}[{sizes}]", math.prod(_shape(sizes)) * BYTES.get(kind, 4))


def _stacked(shape: str, count: int, size: float) -> Tensor:
    layers = _shape(shape[shape.index("[") + 1 : -1])[0]
    times = f", {count} of them" if count > 1 else ""
    return Tensor(f"kept for the backward pass by {layers} layers{times}", shape, count * size)


def _arguments(program: Program) -> Iterator[Tensor]:
    """State and batch as they lie on one device, named by their paths."""
    import jax

    from sharding.rules import path_of

    for path, leaf in jax.tree_util.tree_leaves_with_path(program.arguments):
        shape = leaf.sharding.shard_shape(leaf.shape)
        name = re.sub(r"^\d+/", "", path_of(path))
        yield Tensor(name, f"{leaf.dtype.name}[{','.join(map(str, shape))}]", math.prod(shape) * leaf.dtype.itemsize)


def _largest(tensors: list[Tensor], count: int = 10) -> tuple[Tensor, ...]:
    """The largest, one of each shape of what is not part of the state."""
    named = {tensor.name if "/" in tensor.name else tensor.shape: tensor for tensor in tensors}
    return tuple(sorted(named.values(), key=lambda tensor: -tensor.size)[:count])


def _too_large(message: str, step: Program, seconds: float) -> Compiled:
    """What the compiler's complaint says: the whole need, and its largest allocations."""
    used, limit = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", message).groups()  # type: ignore[union-attr]
    found = re.findall(r"Size: (\S+)\s+Operator: op_name=\"([^\"]*)\".*?\n\s+Shape: (\S+?)\{.*?\n", message, flags=re.S)
    sizes = {shape: _bytes(size) for size, _, shape in found}
    times = Counter(shape for *_, shape in found)
    allocations = [
        _stacked(shape, times[shape], sizes[shape])
        if name.startswith("broadcast")
        else Tensor(_short_name(name), shape, sizes[shape])
        for _, name, shape in found
    ]
    state = list(_arguments(step))
    arguments = sum(tensor.size for tensor in state)
    return Compiled(
        fits=False,
        # The compiler counts arguments as they come in the program's own need.
        peak=_bytes(used),
        arguments=arguments,
        temporary=max(_bytes(used) - arguments, 0.0),
        limit=_bytes(limit),
        largest=_largest([*state, *allocations]),
        seconds=seconds,
        kernels=0,
        collectives={},
    )


def _bytes(text: str) -> float:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(text.rstrip("KMGT")) * units.get(text[-1], 1)


def _shape(sizes: str) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes.split(",") if size)


def _short_name(name: str) -> str:
    """The end of JAX's path of an operation, without the transformations around it."""
    return "/".join(re.sub(r"\b(jit|jvp|transpose|checkpoint|rematted_computation)\b|[()]", "", name).split("/")[-4:])


def _known() -> str:
    return ", ".join(f"{name}:{'AxB' if chip_named(name).torus_dimensions == 2 else 'AxBxC'}" for name in TPUS)


def _find_libtpu() -> None:
    """Tell JAX where libtpu is, and libtpu that no TPU is meant; UserError where it is not."""
    # It would ask the metadata server of a cloud, and let one process at a time load it, as if each held the chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "TPU_LIBRARY_PATH" in os.environ:
        return
    folder = Path(sys.prefix) / ".espalier" / "libtpu" / "libtpu" / "libtpu.so"
    if folder.is_file():
        os.environ["TPU_LIBRARY_PATH"] = str(folder)
        return
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "--topology compiles with libtpu, which is not installed; `./launch.sh plan` installs it, or name its file "
            "in TPU_LIBRARY_PATH"
        ) from None


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's cache of compiled programs: it writes those of absent devices and cannot read them back."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    # JAX looks at the setting once in a process, unless its state is reset.
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_enable_compilation_cache", kept)
