"""The train step compiled for absent TPU slices, by the TPU's compiler on this machine's CPU.

libtpu, the library that drives TPUs, contains the compiler and a description of every slice; JAX compiles for them
ahead of time (docs.jax.dev, "Ahead-of-time lowering and compilation"). The compiler reports the memory that a slice
would need. Nothing is executed; times come from plan/time.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.commands.plan.compile.hlo import Tensor, TooLarge, collectives, temporaries, too_large
from sharding.topology import Chip

if TYPE_CHECKING:
    import jax

    from espalier.commands.plan.compile.step import Program


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports; bytes of one device."""

    fits: bool
    peak: float
    """The highest sum of arguments and temporaries, and the program."""
    arguments: float
    """State and batch, allocated throughout."""
    temporary: float
    limit: float
    """What the compiler may use."""
    largest: tuple[Tensor, ...]
    """Arguments and temporaries that take the most, the largest first."""
    seconds: float
    """Of the compilation."""
    kernels: int
    """Calls of custom kernels (attention)."""
    collectives: dict[str, int]
    """Number of collective operations of each kind."""


def compile_step(config: Any, mesh: jax.sharding.Mesh, chip: Chip) -> Compiled:
    """Compile the train step of a pretraining configuration for the devices of `mesh`."""
    from espalier.commands.plan.compile.step import lower_step

    step = lower_step(config, mesh)
    began = time.perf_counter()
    try:
        with _uncached():
            program = step.lowered.compile()
    except Exception as error:
        said = too_large(str(error))
        if said is None:
            raise
        return _refused(said, step, time.perf_counter() - began)
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
        largest=_largest([*_arguments(step), *temporaries(text)]),
        seconds=seconds,
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        collectives=collectives(text),
    )


def _arguments(program: Program) -> Iterator[Tensor]:
    """The part of state and batch on one device, named by path."""
    import jax

    from sharding.rules import path_of

    for path, leaf in jax.tree_util.tree_leaves_with_path(program.arguments):
        shape = leaf.sharding.shard_shape(leaf.shape)
        name = re.sub(r"^\d+/", "", path_of(path))
        yield Tensor(name, f"{leaf.dtype.name}[{','.join(map(str, shape))}]", math.prod(shape) * leaf.dtype.itemsize)


def _largest(tensors: list[Tensor], count: int = 10) -> tuple[Tensor, ...]:
    """The largest tensors; of those outside the state, one of each shape."""
    named = {tensor.name if "/" in tensor.name else tensor.shape: tensor for tensor in tensors}
    return tuple(sorted(named.values(), key=lambda tensor: -tensor.size)[:count])


def _refused(said: TooLarge, step: Program, seconds: float) -> Compiled:
    state = list(_arguments(step))
    arguments = sum(tensor.size for tensor in state)
    return Compiled(
        fits=False,
        # `used` includes the arguments.
        peak=said.used,
        arguments=arguments,
        temporary=max(said.used - arguments, 0.0),
        limit=said.limit,
        largest=_largest([*state, *said.allocations]),
        seconds=seconds,
        kernels=0,
        collectives={},
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Disable JAX's compilation cache: it writes programs of absent devices and cannot read them back."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    # JAX reads the setting once per process, unless the cache is reset.
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_enable_compilation_cache", kept)
