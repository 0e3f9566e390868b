"""Whether a kernel computes on the device that is here what the reference does: tried on a short row before it is used.

Drivers, compilers and GPUs are many, and attention that is a little wrong trains a little worse without a word.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_spec import Places
from espalier.models.attention_xla import run_xla

LENGTH = 256
"""Tokens of the row: several blocks of a kernel."""
WORSE = 2.0
"""How many times as far from the values in float32 a kernel may be as the reference in the same compute type."""


def disagreement(backend: Backend, use: Use) -> str | None:
    """Why the backend may not be used, in words; None where it agrees in values and gradients.

    Compiles small programs, once a process for all lengths of a kind of attention.
    """
    small = dataclasses.replace(
        use, length=LENGTH, parts=1, heads=use.heads // use.kv_heads, kv_heads=1, dropout=0.0, keys="row"
    )
    return _disagreement(backend, small)


@functools.cache
def _disagreement(backend: Backend, use: Use) -> str | None:
    # In a thread of its own there is neither the trace that asks nor its mesh.
    with ThreadPoolExecutor(1) as elsewhere:
        try:
            return elsewhere.submit(_compared, backend, use).result()
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            return f"{backend.name} attention does not run on this {use.platform.upper()} ({reason})"


def _compared(backend: Backend, use: Use) -> str | None:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, use.length, heads, use.head_size) for heads in (use.heads, use.kv_heads, use.kv_heads, use.heads)]
    *exact, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    index_T = jnp.arange(use.length)
    # Two documents, or one, and padding behind.
    segments_T = jnp.where(index_T < 100, 1, 2 if use.packed else 1) * (index_T < 230)
    places = Places.of_rows(segments_T[None].astype(jnp.int32))
    for spec in use.specs:

        def results(run, dtype, spec=spec):
            def loss(q, k, v):
                out = run(q, k, v, spec, places, 0.0, None)
                return jnp.sum(out.astype(jnp.float32) * weights), out

            inputs = [x.astype(use.dtype).astype(dtype) for x in exact]
            gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
            return [x.astype(jnp.float32) for x in (out, *gradients)]

        right, usual, found = results(run_xla, "float32"), results(run_xla, use.dtype), results(backend.run, use.dtype)
        names = ("values", "gradients of queries", "gradients of keys", "gradients of values")
        for name, x, y, z in zip(names, right, usual, found, strict=True):
            off, allowed = float(jnp.abs(z - x).mean()), WORSE * float(jnp.abs(y - x).mean()) + 1e-6
            if not off <= allowed:
                return (
                    f"{backend.name} attention does not agree with the reference on this {use.platform.upper()}: its "
                    f"{name} are off by {off:.1e} on the average, where {allowed:.1e} is rounding"
                )
    return None
