"""Attention on GPUs. The Triton kernel, run step by step on CPUs, equals the reference and keeps documents apart; its
code is made for a GPU that is not here. What cuDNN is asked for is compared by JAX's own definition of it; its kernel
runs on a GPU alone (benchmarks/gpu.py).
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_gpu import h100
from tiny_models import GPT, MODERN, close, strict_and_quick  # noqa: F401

from espalier.errors import UserError
from espalier.models.attention import XLA, attend, choose_backend
from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_cudnn import CUDNN, cudnn_attention
from espalier.models.attention_spec import AttentionSpec, Places, visible
from espalier.models.attention_triton import TRITON, triton_attention
from espalier.models.attention_triton_kernels import visited
from espalier.models.attention_xla import run_xla
from sharding.mesh import MeshConfig, build_mesh
from sharding.topology import CHIPS

B, T, N, K, H = 2, 256, 4, 2, 16
INTERPRETED = dataclasses.replace(TRITON, run=functools.partial(triton_attention, interpret=True))
SPECS = {
    "bidirectional": AttentionSpec(False, None, None, 0.3),
    "causal": AttentionSpec(True, None, None, 0.3),
    "window": AttentionSpec(False, 20, 20, 0.3),
    "causal window": AttentionSpec(True, 30, None, 0.3),
    "softcap": AttentionSpec(True, None, None, 0.3, softcap=0.7),
}
DOCUMENTS = [(0, 50), (50, 128), (128, 230)]
"""Of row 0, with padding behind: borders inside and at the ends of blocks. Row 1 is one document."""


def segments() -> np.ndarray:
    rows = np.ones((B, T), np.int32)
    for number, (begin, _) in enumerate(DOCUMENTS):
        rows[0, begin:] = number + 1
    rows[0, DOCUMENTS[-1][1] :] = 0
    return rows


def random_qkv(dtype="float32") -> tuple[list[jax.Array], np.ndarray]:
    """(queries, keys and values, weights of a loss)."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    *qkv, weights = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return [jnp.asarray(x, dtype) for x in qkv], weights


def values_and_gradients(spec: AttentionSpec, backend: Backend, qkv, weights, places: Places, mesh=None, **drop) -> Any:
    """(gradients of queries, keys and values, values)."""

    def loss(q, k, v):
        out = attend(spec, q, k, v, places, backend=backend, **drop)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        return jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv))


@pytest.mark.parametrize("name", ["bidirectional", "causal window"])
def test_a_packed_row_is_its_documents_alone(name):
    """Values and gradients, each document worked out by the reference in a row of its own."""
    qkv, weights = random_qkv()
    gradients, out = values_and_gradients(
        SPECS[name], INTERPRETED, qkv, weights, Places.of_rows(jnp.asarray(segments()))
    )
    for begin, end in DOCUMENTS:
        alone = [x[:1, begin:end] for x in (*qkv, weights)]
        row = Places.of_rows(jnp.ones((1, end - begin), jnp.int32))
        expected = values_and_gradients(SPECS[name], XLA, alone[:3], alone[3], row)
        close(jax.tree.map(lambda x, begin=begin, end=end: x[:1, begin:end], (gradients, out)), expected)
    for x in (*gradients, out):
        assert (x[0, DOCUMENTS[-1][1] :] == 0).all()


@pytest.mark.parametrize("name", SPECS)
def test_kernel_equals_reference(name):
    """With segments that do not follow each other, too: which blocks are visited must not rest on an order."""
    places = Places.of_rows(jnp.asarray(np.concatenate([segments()[:1], segments()[:1, ::-1] % 3])))
    got, expected = (values_and_gradients(SPECS[name], each, *random_qkv(), places) for each in (INTERPRETED, XLA))
    close(got, expected)


@pytest.mark.parametrize("by_key", [False, True])
def test_no_block_is_visited_that_nobody_may_see(by_key):
    """The first, the end, and the run that is seen whole, of each block, by looking at every pair of tokens."""
    places = Places.of_rows(jnp.asarray(segments()))
    own, other = (32, 16) if by_key else (16, 32)
    for spec in SPECS.values():
        q_block, k_block = (other, own) if by_key else (own, other)
        pairs = np.asarray(visible(spec, places)).reshape(B, T // q_block, q_block, T // k_block, k_block)
        some, whole = pairs.any((2, 4)), pairs.all((2, 4))
        if by_key:
            some, whole = some.swapaxes(1, 2), whole.swapaxes(1, 2)
        bounds = np.asarray(visited(spec, places, q_block, k_block, by_key))
        for b, i in np.ndindex(*bounds.shape[:2]):
            first, first_whole, end_whole, end = bounds[b, i]
            assert range(first, end) == range(
                *(some[b, i].nonzero()[0][[0, -1]] + [0, 1]) if some[b, i].any() else (0, 0)
            )
            assert whole[b, i, first_whole:end_whole].all() and end_whole - first_whole == whole[b, i].sum()


def test_kernel_in_bfloat16_is_as_good_as_the_reference():
    """Both against the reference in float32: the kernel errs no more than XLA's attention in bfloat16 does."""
    spec, places = SPECS["causal"], Places.of_rows(jnp.asarray(segments()))
    (halves, weights), (full, _) = random_qkv("bfloat16"), random_qkv("bfloat16")
    exact = values_and_gradients(spec, XLA, [x.astype(jnp.float32) for x in full], weights, places)

    def errors(backend):
        got = values_and_gradients(spec, backend, halves, weights, places)
        return [
            np.abs(x.astype(np.float32) - y).mean() for x, y in zip(*map(jax.tree.leaves, (got, exact)), strict=True)
        ]

    for kernel, reference in zip(errors(INTERPRETED), errors(XLA), strict=True):
        assert 0 < kernel < 1.2 * reference


@pytest.mark.parametrize("config", [MeshConfig(1, 2, 2, sequence=2)], ids=str)
def test_kernel_on_a_mesh_equals_reference(config):
    """Rows, heads and queries split; a part of a row finds its place by its indices."""
    spec = SPECS["causal window"]
    (qkv, weights), places = random_qkv(), Places.of_rows(jnp.asarray(segments()))
    (*qkv, weights), places = jax.tree.map(lambda x: jnp.tile(x, (2,) + (1,) * (x.ndim - 1)), ((*qkv, weights), places))
    places = Places(*places[:2], *(index[:1] for index in places[2:]))
    got = values_and_gradients(spec, INTERPRETED, qkv, weights, places, build_mesh(config))
    close(got, values_and_gradients(spec, XLA, qkv, weights, places))


def test_rows_and_heads_of_any_size_and_another_text():
    """Rows that no block divides, heads that are no power of two, and keys of a memory."""
    rng = np.random.default_rng(1)
    shapes = ((2, 70, 3, 12), (2, 33, 3, 12), (2, 33, 3, 12), (2, 70, 3, 12))
    *qkv, weights = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    q_segments, k_segments = (rng.integers(0, 3, size=shape[:2]).astype(np.int32) for shape in shapes[:2])
    places = Places(*map(jnp.asarray, (q_segments, k_segments, np.arange(70)[None], np.arange(33)[None])))
    places = Places(*(x.astype(jnp.int32) for x in places))
    got, expected = (
        values_and_gradients(SPECS["bidirectional"], backend, qkv, weights, places) for backend in (INTERPRETED, XLA)
    )
    close(got, expected)


def dropping(q_BTNH, k_BSKH, v_BSKH, spec, places, rate, key) -> jax.Array:
    """The reference with the probabilities dropped that the kernel drops, by its hash in NumPy."""
    with jax.ensure_compile_time_eval():
        numbers = np.asarray(jax.random.bits(key, (B, N), jnp.uint32)).astype(np.uint64)
    index, low = np.arange(T, dtype=np.uint64), np.uint64(2**32 - 1)

    def mixed(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) & low
        return x ^ (x >> np.uint64(16))

    rows_BNT = mixed(numbers[:, :, None] + index * np.uint64(0x9E3779B9) & low)
    cells_BNTS = mixed(rows_BNT[..., None] + index * np.uint64(0x85EBCA77) & low)
    kept_BNTS = np.where(cells_BNTS >= rate * 2**32, 1 / (1 - rate), 0).astype(np.float32)
    dropped = kept_BNTS == 0
    assert abs(dropped.mean() - rate) < 4 * (rate / dropped.size) ** 0.5
    for axis in range(4):
        # Whether one is dropped says nothing about its neighbour: key, query, head or row.
        both = np.take(dropped, range(1, dropped.shape[axis]), axis) & np.take(
            dropped, range(dropped.shape[axis] - 1), axis
        )
        assert abs(both.mean() - rate**2) < 5 * (rate**2 / both.size) ** 0.5

    def drop(place, p_BNTS):
        return p_BNTS * kept_BNTS

    tap: Any = drop
    return run_xla(q_BTNH, k_BSKH, v_BSKH, spec, places, 0.0, None, tap)


def test_dropout_is_that_of_a_hash_and_the_same_on_a_mesh():
    """All kernels drop the same: gradients are those of the values. On four devices it is what it is on one."""
    (qkv, weights), places, key = random_qkv(), Places.of_rows(jnp.asarray(segments())), jax.random.key(3)
    spec, drop = SPECS["causal window"], {"dropout_rate": 0.3, "dropout_key": key}
    got = values_and_gradients(spec, INTERPRETED, qkv, weights, places, **drop)
    close(got, values_and_gradients(spec, dataclasses.replace(XLA, run=dropping), qkv, weights, places, **drop))
    mesh = build_mesh(MeshConfig(2, 1, 2, sequence=2))
    close(got, values_and_gradients(spec, INTERPRETED, qkv, weights, places, mesh, **drop))
    without = values_and_gradients(spec, INTERPRETED, qkv, weights, places, dropout_rate=0.3)
    assert np.abs(got[1] - without[1]).max() > 0.1, "without a key nothing is dropped"


@pytest.mark.parametrize(("name", "size", "heads"), [("window", 64, 4), ("softcap", 128, 6), ("bidirectional", 256, 2)])
def test_kernels_are_made_for_a_gpu(name, size, heads):
    """Forward and backward pass become programs for a GPU, with no [T, T] outside of the kernels."""

    def gradients(q, k, v, segments):
        def loss(q, k, v):
            key = jax.random.key(0) if name == "window" else None
            return triton_attention(q, k, v, SPECS[name], Places.of_rows(segments), 0.1, key).astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    length = 512
    arrays = [jax.ShapeDtypeStruct((B, length, n, size), "bfloat16") for n in (heads, 2, 2)]
    with jax.sharding.use_abstract_mesh(h100()):
        traced = jax.jit(gradients).trace(*arrays, jax.ShapeDtypeStruct((B, length), jnp.int32))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("forward", "query", "key"):
        assert f"attention_{kernel}_kernel" in program
    assert f"{length}x{length}x" not in program


def test_what_cudnn_is_asked_for_equals_reference(monkeypatch):
    """Lengths, windows and grouped heads, by JAX's own definition of what the function does."""
    defined = jax.nn.dot_product_attention

    def by_definition(*arrays, implementation, **settings):
        assert implementation == "cudnn" and "mask" not in settings and "bias" not in settings
        return defined(*arrays, **settings, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_definition)
    qkv, weights = random_qkv()
    rows = np.ones((B, T), np.int32)
    rows[0, 200:] = 0
    for name in ("bidirectional", "causal", "causal window"):
        places = Places.of_rows(jnp.asarray(rows))
        got, expected = (values_and_gradients(SPECS[name], backend, qkv, weights, places) for backend in (CUDNN, XLA))
        close(got, expected)
    rows[0] = 0
    empty = Places.of_rows(jnp.asarray(rows))
    for x in jax.tree.leaves(values_and_gradients(SPECS["causal"], CUDNN, qkv, weights, empty)):
        assert (x[0] == 0).all() and np.isfinite(x).all()


def test_cudnn_gets_lengths_and_a_causal_window(monkeypatch):
    """The call in a program for a GPU; that there is one, and which, is all that JAX wants to know beforehand."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda least: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda which: False)

    def run(q, k, v, segments):
        return cudnn_attention(q, k, v, SPECS["causal window"], Places.of_rows(segments), 0.0, None)

    arrays = [jax.ShapeDtypeStruct((B, T, n, 64), "bfloat16") for n in (N, K, K)]
    traced = jax.jit(run).trace(*arrays, jax.ShapeDtypeStruct((B, T), jnp.int32))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in program.splitlines() if "__cudnn$fmha" in line]
    assert '"mask_type": "PADDING_CAUSAL"' in call.replace("\\22", '"') and f"{B}x{N}x{T}x{T}" not in call
    assert '"sliding_window_length": 31' in call.replace("\\22", '"')


def choose(model=GPT, requested="auto", chip="h100", length=T, dropping=False, **settings) -> tuple[str, str]:
    (capability,) = (each.capability for each in CHIPS if each.name == chip)
    settings = {"dtype": "bfloat16", "dropping": dropping, "platform": "gpu", "capability": capability} | settings
    backend, reason = choose_backend(requested, Use.of(dataclasses.replace(model, head_dim=64), length, **settings))
    return backend.name, reason


def test_cudnn_where_rows_are_plain_and_the_kernel_where_they_are_packed():
    assert Use.of(GPT, T, dtype="bfloat16", dropping=False).packed, "rows are packed unless it is said"
    assert choose()[0] == "triton" and choose(packed=False)[0] == "cudnn"
    assert choose(MODERN)[0] == choose(MODERN, packed=False)[0] == "triton", "windows to both sides"
    capped = dataclasses.replace(GPT, attn_logit_softcapping=3.0)
    assert choose(capped, packed=False)[0] == "triton"
    dropping = dataclasses.replace(GPT, attention_dropout=0.1)
    assert choose(dropping, packed=False, dropping=True)[0] == "triton"
    assert choose(packed=False, parts=2)[0] == choose(packed=False, keys="memory")[0] == "triton"
    with pytest.raises(UserError, match="cudnn: a row may hold several documents, and in cuDNN's attention they would"):
        choose(requested="cudnn")
    with pytest.raises(UserError, match="cudnn: .*windows for causal rows alone; try --execution.attention auto"):
        choose(MODERN, requested="cudnn", packed=False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"keys": "cache"}, "reads no cache"),
        ({"dtype": "float32"}, "multiplies in bfloat16, and not in float32"),
        ({"chip": "t4"}, "compute capability 8.0"),
        ({"capability": None}, "compute capability 8.0"),
    ],
)
def test_what_no_kernel_honours_is_left_to_xla_with_the_reason(changed, words):
    name, reason = choose(packed=False, **changed)
    assert name == "xla" and words in reason
