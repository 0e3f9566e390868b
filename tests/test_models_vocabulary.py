"""Chunked log-probabilities against a plain log-softmax: values, gradients, and that nothing large is formed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import close, strict_and_quick  # noqa: F401

from espalier.models.vocabulary import logits, token_logprobs

B, T, D, V, PADDED = 3, 10, 16, 200, 256


def inputs(bias, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    features, table = rng.normal(size=(B, T, D)), rng.normal(size=(PADDED, D))
    # Padding rows would win every comparison if they were not left out.
    table[V:] = 50.0
    arrays = [jnp.asarray(features, dtype), jnp.asarray(table, jnp.float32)]
    arrays += [jnp.asarray(rng.normal(size=PADDED), jnp.float32)] if bias else []
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    labels[0, :4] = np.argmax(features[0, :4] @ table[:V].T + (np.asarray(arrays[2])[:V] if bias else 0), axis=-1)
    return arrays, labels, rng.normal(size=(B, T)).astype(np.float32)


def plain(features, table, bias, labels):
    """Straight from the definition."""
    scores = features.astype(jnp.float32) @ table.astype(features.dtype).astype(jnp.float32)[:V].T
    if bias is not None:
        scores = scores + bias[None, None, :V]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], axis=-1)[..., 0]
    return chosen, (scores.argmax(-1) == labels).astype(jnp.float32)


def values_and_gradients(function, bias, dtype):
    arrays, labels, weights = inputs(bias, dtype)

    def total(*arrays):
        logprob, correct = function(*(*arrays, None)[:3], labels)
        # The second result carries no gradient even if someone asks for it.
        return (logprob * weights).sum() + (correct * weights).sum(), (logprob, correct)

    gradients, values = jax.jit(jax.grad(total, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)
    return values, gradients


expected_from = functools.cache(functools.partial(values_and_gradients, plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [10, 4, 1])
def test_chunks_equal_a_plain_log_softmax_in_value_and_gradient(chunk, bias, dtype):
    """Chunks of 10 (all at once), 4 (uneven: 10 tokens make 3 chunks with 2 to spare), 1."""
    chunked = functools.partial(token_logprobs, vocab_size=V, chunk_elements=chunk * B * PADDED)
    (logprob, correct), gradients = values_and_gradients(chunked, bias, dtype)
    (expected, right), expected_gradients = expected_from(bias, dtype)
    assert logprob.dtype == correct.dtype == jnp.float32
    close(logprob, expected)
    assert (np.asarray(correct) == np.asarray(right)).all() and 4 <= right.sum() < B * T
    close(gradients, expected_gradients, 2e-2 if dtype == "bfloat16" else 1e-5)
    assert (np.asarray(gradients[1])[V:] == 0).all()


@pytest.mark.parametrize("chunk", [10, 4])
def test_softcapped_scores_equal_their_definition_in_value_and_gradient(chunk):
    def capped(features, table, bias, labels):
        scores = 5.0 * jnp.tanh((features @ table[:V].T + bias[None, None, :V]) / 5.0)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], axis=-1)[..., 0]
        return chosen, (scores.argmax(-1) == labels).astype(jnp.float32)

    sizes = dict(vocab_size=V, softcap=5.0, chunk_elements=chunk * B * PADDED)
    got = values_and_gradients(functools.partial(token_logprobs, **sizes), True, jnp.float32)
    want = values_and_gradients(capped, True, jnp.float32)
    close(got[0][0], want[0][0])
    close(got[1], want[1])


def test_scores_of_all_tokens_are_never_formed():
    arrays, labels, weights = inputs(True)
    formed = {}
    for chunk in (T, 2):
        limit = chunk * B * PADDED
        loss = jax.grad(
            lambda *a, limit=limit: (token_logprobs(*a, labels, vocab_size=V, chunk_elements=limit)[0] * weights).sum()
        )
        program = jax.jit(loss).lower(*arrays).as_text()
        shapes = re.findall(r"tensor<([\dx]+)xf32>", program)
        formed[chunk] = max(np.prod([int(n) for n in shape.split("x")]) for shape in shapes)
    # In chunks, nothing is larger than the table itself.
    assert formed == {T: B * T * PADDED, 2: PADDED * D}


def test_logits_are_trimmed_to_the_vocabulary():
    (features, table, bias), _, _ = inputs(True)
    got = logits(features[:, -1:], table, bias, V)
    assert got.shape == (B, 1, V) and got.dtype == jnp.float32
    close(got[:, 0], np.asarray(features[:, -1]) @ np.asarray(table[:V]).T + np.asarray(bias[:V]))
