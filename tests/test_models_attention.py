"""Attention against brute force in numpy: who sees whom, the scores, what is passed back, dropout."""

import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILIES, close, strict_and_quick  # noqa: F401

from espalier.models.attention import BACKENDS, XLA, attend
from espalier.models.attention_backend import Use
from espalier.models.attention_spec import AttentionSpec, Places, spec_for
from espalier.models.config import Execution
from espalier.models.layers import dropout

B, T, N, K, H = 2, 9, 4, 2, 8
# Row 0: two documents and padding; row 1: padding on the left, as in a prompt.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1]], np.int32)
INDEX = np.arange(T, dtype=np.int32)[None]
ROWS = Places(SEGMENTS, SEGMENTS, INDEX, INDEX)  # pyright: ignore[reportArgumentType]
SPECS = {
    "bidirectional": AttentionSpec(False, None, None, 0.3),
    "causal": AttentionSpec(True, None, None, 0.3),
    "window": AttentionSpec(False, 2, 2, 0.3),
    "lopsided": AttentionSpec(False, 1, 3, 0.3),
    "causal window": AttentionSpec(True, 1, None, 0.3),
    "softcap": AttentionSpec(True, None, None, 0.3, softcap=0.7),
}


def brute_force(spec, q, k, v, places):
    """One pair of tokens at a time, in float64."""
    q_segments, k_segments, q_index, k_index = places
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        weights, values = [], []
        for s in range(k.shape[1]):
            behind = q_index[0, t] - k_index[0, s]
            if k_segments[b, s] == 0 or q_segments[b, t] != k_segments[b, s]:
                continue
            if spec.left is not None and behind > spec.left:
                continue
            if (spec.causal and behind < 0) or (spec.right is not None and -behind > spec.right):
                continue
            score = spec.scale * np.dot(q[b, t, n], k[b, s, n // (N // K)])
            if spec.softcap:
                score = spec.softcap * np.tanh(score / spec.softcap)
            weights.append(np.exp(score))
            values.append(v[b, s, n // (N // K)])
        if weights:
            out[b, t, n] = np.average(values, axis=0, weights=weights)
    return out


def random_qkv(queries=T) -> Any:
    rng = np.random.default_rng(0)
    shapes = ((B, queries, N, H), (B, T, K, H), (B, T, K, H))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("name", SPECS)
def test_attention_equals_brute_force(name):
    """The reference; a kernel is compared with it, for it wants longer rows (tests/test_models_splash.py)."""
    got = jax.jit(lambda q, k, v: attend(SPECS[name], q, k, v, ROWS))(*random_qkv())
    close(got, brute_force(SPECS[name], *random_qkv(), places=ROWS))


def test_queries_further_on_than_the_keys_they_see():
    """As with a cache: three queries at rows 4 to 6 of nine keys, of which the last two are not yet written."""
    k_segments = np.where(INDEX < 7, 1, 0).astype(np.int32).repeat(B, axis=0)
    places = Places(*(jnp.asarray(x, jnp.int32) for x in (np.ones((B, 3)), k_segments, [[4, 5, 6]], INDEX)))
    got = attend(SPECS["causal window"], *random_qkv(3), places)
    close(got, brute_force(SPECS["causal window"], *random_qkv(3), places=places))


def test_a_query_that_sees_nothing_yields_zero_and_passes_no_gradient():
    def squares(q, k, v):
        out = attend(SPECS["causal"], q, k, v, ROWS)
        return jnp.square(out - 1).sum(), out

    q, k, v = random_qkv()
    # Huge values in the padding: whatever they are multiplied by must be exactly zero.
    k[SEGMENTS == 0] = v[SEGMENTS == 0] = q[SEGMENTS == 0] = 1e15
    gradients, out = jax.jit(jax.grad(squares, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert (np.asarray(out)[SEGMENTS == 0] == 0).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[SEGMENTS == 0] == 0).all()
        assert (np.abs(np.asarray(gradient)[SEGMENTS == 1]).max(axis=(1, 2)) > 0).any()


def test_specs_of_the_layers():
    assert spec_for(FAMILIES["modernbert"], "local") == AttentionSpec(False, 3, 3, 8**-0.5)
    assert spec_for(FAMILIES["modernbert"], "global") == AttentionSpec(False, None, None, 8**-0.5)
    assert spec_for(FAMILIES["llama"], "global") == AttentionSpec(True, None, None, 8**-0.5)


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = jnp.ones((200, 333), jnp.float32)
    y = np.asarray(dropout(x, 0.1, jax.random.key(0)))
    dropped = (y == 0).mean()
    assert abs(dropped - 26 / 256) < 4 * (0.1 / y.size) ** 0.5
    assert abs(y.mean() - 1) < 0.005
    # Neighbours share a random word; whether one is dropped must say nothing about the next.
    assert abs(((y[:, 1:] == 0) & (y[:, :-1] == 0)).mean() - dropped**2) < 0.002
    assert (y != np.asarray(dropout(x, 0.1, jax.random.key(1)))).any()
    assert dropout(x, 0.1, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_acts_on_the_probabilities():
    q, k, v = random_qkv()
    ones = np.ones_like(v)
    out = attend(SPECS["bidirectional"], q, k, ones, ROWS, dropout_rate=0.5, dropout_key=jax.random.key(0))
    sums = np.asarray(out)[SEGMENTS != 0]
    # Values are all one, so that a row's output is the sum of the probabilities it kept, times two.
    assert np.ptp(sums, axis=-1).max() < 1e-6
    assert 0.5 < sums.std() / 0.35 < 2 and abs(sums.mean() - 1) < 0.2


def test_every_backend_has_a_name_on_the_command_line():
    names = typing.get_args(typing.get_type_hints(Execution)["attention"])
    assert names == ("auto", "xla", "splash", "cudnn", "triton") and {"auto", *BACKENDS} == set(names)
    assert list(BACKENDS.values())[-1] is XLA


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cudnn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_backend_says_that_it_keeps_is_what_it_keeps(name, dtype):
    """Against the arrays of the vector-Jacobian product, but for the result and one bit or number a token."""
    length, heads, kv_heads, size = 256, 4, 2, 128
    for softcap, rate in ((None, 0.0), (3.0, 0.5)) if name == "xla" else ((None, 0.0),):
        spec = AttentionSpec(True, 20, None, 0.3, softcap)
        use = Use("tpu", length, 1, heads, kv_heads, size, (spec,), dtype, rate, "row")

        def kept(q, k, v, segments, spec=spec, rate=rate):
            def run(q, k, v):
                key = jax.random.key(0) if rate else None
                places = Places.of_rows(segments)
                return attend(spec, q, k, v, places, backend=BACKENDS[name], dropout_rate=rate, dropout_key=key)

            return jax.tree.leaves(jax.vjp(run, q, k, v)[1])

        arrays = [jax.ShapeDtypeStruct((1, length, n, size), dtype) for n in (heads, kv_heads, kv_heads)]
        leaves = jax.eval_shape(kept, *arrays, jax.ShapeDtypeStruct((1, length), jnp.int32))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.size > length)
        if name == "triton":
            # The very result, which is kept once.
            total -= length * heads * size * jnp.dtype(dtype).itemsize
        # From 0.12 on, JAX differentiates tanh by its result alone: one array of scores less than what is counted.
        less = 4 * heads * length**2 if softcap and jax.__version_info__ >= (0, 12) else 0
        assert BACKENDS[name].keeps(use) - less == total
