"""The TPU's attention kernel, run step by step on CPUs, equals the reference: values, gradients, meshes, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GPT, MODERN, close, strict_and_quick  # noqa: F401

from espalier.errors import UserError
from espalier.models.attention import AttentionSpec, attend, choose_backend
from espalier.models.splash import block_size
from sharding.mesh import MeshConfig, build_mesh

pytestmark = pytest.mark.corner
B, T, N, K, H = 2, 512, 4, 2, 16
INDEX = np.arange(T, dtype=np.int32)[None]
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
    boundaries = (segments(), segments(), INDEX, INDEX)

    def loss(q, k, v):
        out = attend(spec, q, k, v, *boundaries, backend=backend)
        return jnp.sum(out * weights), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    if mesh is None:
        return jax.device_get(run(q, k, v))
    with jax.set_mesh(mesh):
        return jax.device_get(run(q, k, v))


@pytest.mark.parametrize("name", SPECS)
def test_kernel_equals_reference(name):
    close(values_and_gradients(SPECS[name], "splash_interpreted"), values_and_gradients(SPECS[name], "xla"))


@pytest.mark.parametrize("config", [MeshConfig(2, 1, 2, sequence=2), MeshConfig(1, 2, 1, sequence=4)], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "bidirectional", "wide window"])
def test_kernel_on_a_mesh_equals_reference(name, config):
    """Rows, heads and queries split; tables of blocks differ from device to device."""
    mesh = build_mesh(config)
    close(values_and_gradients(SPECS[name], "splash_interpreted", mesh), values_and_gradients(SPECS[name], "xla"))


def test_blocks_divide_the_row():
    assert [block_size(length) for length in (128, 384, 640, 1024, 8192)] == [128, 384, 128, 512, 512]


def test_it_is_chosen_on_tpus_only_and_says_why(monkeypatch):
    def choose(model=MODERN, length=T, requested="auto", dropping=False, cached=False):
        return choose_backend(requested, model, length, dropping=dropping, cached=cached)

    assert choose()[0] == "xla" and "CPU" in choose()[1]
    with pytest.raises(UserError, match="kernel for TPUs and this is a CPU; try"):
        choose(requested="splash")
    monkeypatch.setattr("espalier.models.attention.mesh_platform", lambda: "tpu")
    assert choose()[0] == "splash"
    assert choose(requested="xla") == ("xla", "as asked")
    assert choose(length=100)[0] == "xla" and "multiple of 128" in choose(length=100)[1]
    assert choose(cached=True)[0] == "xla"
    dropping = dataclasses.replace(GPT, attention_dropout=0.1)
    assert choose(dropping, dropping=True)[0] == "xla" and "attention_dropout=0.1" in choose(dropping, dropping=True)[1]
