"""The TPU's attention kernel, run step by step on CPUs, equals the reference: values, gradients, meshes, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GPT, MODERN, close, strict_and_quick  # noqa: F401

from espalier.errors import UserError
from espalier.models.attention import XLA, attend, choose_backend
from espalier.models.attention_backend import Keys, Use
from espalier.models.attention_spec import AttentionSpec, Places
from espalier.models.splash import SPLASH, block_size, splash_attention
from sharding.mesh import MeshConfig, build_mesh

B, T, N, K, H = 2, 512, 4, 2, 16
INTERPRETED = dataclasses.replace(SPLASH, run=functools.partial(splash_attention, interpret=True))
SPECS = {
    "bidirectional": AttentionSpec(False, None, None, 0.3),
    "causal": AttentionSpec(True, None, None, 0.3),
    "window": AttentionSpec(False, 20, 20, 0.3),
    "causal window": AttentionSpec(True, 30, None, 0.3),
    "wide window": AttentionSpec(False, T, T - 1, 0.3),
    "softcap": AttentionSpec(True, None, None, 0.3, softcap=0.7),
}


def segments() -> np.ndarray:
    """Row 0: three documents and padding, with borders inside and at the ends of blocks; row 1: a single document."""
    rows = np.ones((B, T), np.int32)
    rows[0, 100:], rows[0, 256:], rows[0, 450:] = 2, 3, 0
    return rows


def values_and_gradients(spec, backend, mesh=None):
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    q, k, v, weights = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    places = Places.of_rows(jnp.asarray(segments()))

    def loss(q, k, v):
        out = attend(spec, q, k, v, places, backend=backend)
        return jnp.sum(out * weights), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    if mesh is None:
        return jax.device_get(run(q, k, v))
    with jax.set_mesh(mesh):
        return jax.device_get(run(q, k, v))


@pytest.mark.parametrize("name", SPECS)
def test_kernel_equals_reference(name):
    close(values_and_gradients(SPECS[name], INTERPRETED), values_and_gradients(SPECS[name], XLA))


@pytest.mark.parametrize("config", [MeshConfig(2, 1, 2, sequence=2), MeshConfig(1, 2, 1, sequence=4)], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "bidirectional", "wide window"])
def test_kernel_on_a_mesh_equals_reference(name, config):
    """Rows, heads and queries split; tables of blocks differ from device to device."""
    mesh = build_mesh(config)
    close(values_and_gradients(SPECS[name], INTERPRETED, mesh), values_and_gradients(SPECS[name], XLA))


def test_blocks_divide_the_row():
    assert [block_size(length) for length in (128, 384, 640, 1024, 8192)] == [128, 384, 128, 512, 512]


def test_it_is_chosen_on_tpus_only_and_says_why():
    def choose(model=MODERN, length=T, requested="auto", platform="tpu", dropping=False, keys: Keys = "row"):
        use = Use.of(model, length, dtype="bfloat16", dropping=dropping, keys=keys, platform=platform)
        backend, reason = choose_backend(requested, use)
        return backend.name, reason

    assert Use.of(MODERN, T, dtype="bfloat16", dropping=False).platform == "cpu"
    assert choose(platform="cpu")[0] == "xla" and "no attention kernel" in choose(platform="cpu")[1]
    with pytest.raises(UserError, match="kernel for TPUs and this is a GPU; try --execution.attention auto"):
        choose(requested="splash", platform="gpu")
    assert choose()[0] == "splash"
    assert choose(requested="xla") == ("xla", "as asked")
    assert choose(length=100)[0] == "xla" and "multiple of 128" in choose(length=100)[1]
    assert choose(keys="cache")[0] == "xla" and choose(keys="memory")[0] == "xla"
    dropping = dataclasses.replace(GPT, attention_dropout=0.1)
    assert choose(dropping, dropping=True)[0] == "xla" and "attention_dropout=0.1" in choose(dropping, dropping=True)[1]
