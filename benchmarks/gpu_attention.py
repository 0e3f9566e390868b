"""Attention on a GPU: whether each backend is right, and how fast.

    python -m benchmarks.gpu_attention [quick] [tiles]

Each is compared with XLA's attention in float32, in values and gradients; that of bfloat16 says how far off is normal.
That documents do not see each other is shown exactly: what changes in one changes no bit of another, or no more than
two equal runs differ. With `tiles`, the
sizes of the Triton kernel's blocks are tried. Without a GPU the Triton kernel runs step by step. Prints one line of
JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.models import attention_triton
from espalier.models.attention_backend import Run
from espalier.models.attention_cudnn import cudnn_attention
from espalier.models.attention_spec import AttentionSpec, Places
from espalier.models.attention_triton import Tile, Tiles, triton_attention
from espalier.models.attention_xla import run_xla

FURTHER_OFF = 1.5
"""An error in bfloat16 may be so many times that of XLA's attention in bfloat16: another order of sums."""
SHAPES = {
    "bert": (32, 512, 12, 12, 64, AttentionSpec(False, None, None, 64**-0.5)),
    "modernbert local": (16, 1024, 12, 12, 64, AttentionSpec(False, 64, 64, 64**-0.5)),
    "gpt2": (16, 1024, 12, 12, 64, AttentionSpec(True, None, None, 64**-0.5)),
    "llama": (2, 4096, 32, 8, 128, AttentionSpec(True, None, None, 128**-0.5)),
    "gemma2 local": (1, 4096, 8, 4, 256, AttentionSpec(True, 1023, None, 256**-0.5, 50.0)),
}
"""Rows, length, heads, key/value heads, head size, who sees whom."""
QUICK = {"bert": (2, 128, 2, 1, 16, AttentionSpec(False, None, None, 0.25))}


def main(quick: bool, tiles: bool) -> dict[str, Any]:
    gpu = jax.default_backend() == "gpu"
    found: dict[str, Any] = {"device": jax.local_devices()[0].device_kind, "checks": {}, "times": {}}
    for name, (rows, length, heads, kv_heads, size, spec) in (QUICK if quick else SHAPES).items():
        for packed in (True,) if quick else (True, False):
            inputs: Any = inputs_of(rows, length, heads, kv_heads, size, packed)
            kernel: Any = functools.partial(triton_attention, interpret=not gpu)
            runs: dict[str, Any] = {"triton": kernel}
            if gpu and not packed and not spec.softcap and (spec.causal or spec.left is None):
                runs["cudnn"] = cudnn_attention
            for backend, run in runs.items():
                label = f"{name} {'packed' if packed else 'plain'} {backend}"
                found["checks"][label] = checked(run, spec, *inputs)
            if gpu:
                for backend, run in (runs | {"xla": run_xla}).items():
                    label = f"{name} {'packed' if packed else 'plain'} {backend}"
                    found["times"][label] = seconds(run, spec, *inputs)
    if tiles:
        found["tiles"] = tried()
    found["right"] = all(check["right"] for check in found["checks"].values())
    return found


def inputs_of(rows: int, length: int, heads: int, kv_heads: int, size: int, packed: bool):
    """(queries, keys, values, weights of a loss, segment ids); plain rows have padding behind."""
    random = np.random.default_rng(0)
    shapes = [(rows, length, count, size) for count in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]
    segments = np.ones((rows, length), np.int32)
    for row in segments:
        if packed:
            for end in np.cumsum(random.integers(8, length // 2, 8)):
                row[end:] += 1
        row[length - random.integers(0, length // 8) :] = 0
    return *arrays, jnp.asarray(segments)


def gradients(run: Run, spec: AttentionSpec):
    """(queries, keys, values, weights, segments) → (gradients, values), compiled."""

    def loss(q, k, v, weights, segments):
        out = run(q, k, v, spec, Places.of_rows(segments), 0.0, None)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def checked(run: Run, spec: AttentionSpec, q, k, v, weights, segments) -> dict[str, Any]:
    """Errors (root of the mean square) of gradients of q, k, v and of the values; whether documents stay apart."""
    with jax.default_matmul_precision("highest"):
        full = [x.astype(jnp.float32) for x in (q, k, v, weights)]
        exact = jax.tree.leaves(gradients(run_xla, spec)(*full, segments))
    normal = jax.tree.leaves(gradients(run_xla, spec)(q, k, v, weights, segments))
    compiled = gradients(run, spec)
    got = jax.tree.leaves(compiled(q, k, v, weights, segments))

    def errors(found):
        return [
            float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32) - y)))) for x, y in zip(found, exact, strict=True)
        ]

    # All of the second document and of the padding changes, the gradient that comes back to it too.
    changed = ((segments == 2) | (segments == 0))[:, :, None, None]
    others = [jnp.where(changed, 3 * x + 1, x) for x in (q, k, v, weights)]
    first = (segments == 1)[:, :, None, None]
    same, other = (jax.tree.leaves(compiled(*arrays, segments)) for arrays in ((q, k, v, weights), others))

    def differ(found):
        """The most that anything of the first document differs."""
        differences = [jnp.abs(x.astype(jnp.float32) - y) for x, y in zip(got, found, strict=True)]
        return [float(jnp.max(jnp.where(first, x, 0))) for x in differences]

    # cuDNN adds gradients up in any order; what does so in a fixed one differs by nothing.
    apart = all(a <= 4 * b for a, b in zip(differ(other), differ(same), strict=True))
    mine, usual = errors(got), errors(normal)
    near = all(a <= FURTHER_OFF * b + 1e-6 for a, b in zip(mine, usual, strict=True))
    return {"right": near and apart, "apart": apart, "errors": mine, "errors_of_xla": usual}


def seconds(run: Run, spec: AttentionSpec, *inputs, repeats: int = 20) -> dict[str, float]:
    """Of the forward pass, and of forward and backward pass; the least of three rounds."""

    def forward(q, k, v, weights, segments):
        return run(q, k, v, spec, Places.of_rows(segments), 0.0, None)

    found = {}
    for name, function in (("forward", jax.jit(forward)), ("both", gradients(run, spec))):
        jax.block_until_ready(function(*inputs))
        rounds = []
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(repeats):
                out = function(*inputs)
            jax.block_until_ready(out)
            rounds.append((time.perf_counter() - began) / repeats)
        found[name] = min(rounds)
    return found


def tried() -> dict[str, Any]:
    """Head size and kernel → the fastest tiles with their times; what does not compile is left out."""
    found: dict[str, Any] = {}
    for name, size in (("gpt2", 64), ("llama", 128)):
        rows, length, heads, kv_heads, _, spec = SHAPES[name]
        inputs, usual = inputs_of(rows, length, heads, kv_heads, size, True), attention_triton.TILES[size]
        for kernel in Tiles._fields:
            times = {}
            for tile in map(Tile._make, itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))):
                if tile.own < tile.other:
                    continue
                attention_triton.TILES[size] = usual._replace(**{kernel: tile})
                try:
                    times[str(tuple(tile))] = seconds(triton_attention, spec, *inputs, repeats=5)["both"]
                except Exception as error:
                    print(f"{size} {kernel} {tile}: {type(error).__name__}", file=sys.stderr)
            attention_triton.TILES[size] = usual
            best = sorted(times.items(), key=lambda item: item[1])[:5]
            found[f"{size} {kernel}"] = {"usual": str(tuple(getattr(usual, kernel))), "best": dict(best)}
    return found


if __name__ == "__main__":
    print(json.dumps(main("quick" in sys.argv, "tiles" in sys.argv)), flush=True)
