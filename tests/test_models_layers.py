"""What the layers keep for the backward pass: no more than it needs, and the gradients are those of plain autodiff."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

import clm.presets
import mlm.presets
from espalier.models.config import HiddenAct, ModelConfig
from espalier.models.layers import (
    Norm,
    activation,
    dropout,
    gated,
    gelu,
    plus_bias,
    product,
    zero_unless,
)
from espalier.models.memory import step_memory
from sharding.mesh import MeshConfig, build_mesh

PLAIN = {"gelu": gelu, "gelu_new": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu, "tanh": jnp.tanh}
PLAIN |= {"relu2": lambda x: jnp.where(x > 0, x * x, 0)}
SHAPE = (4, 512)


def draw(number: int, scale: float = 3.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(number), SHAPE)


def kept(function, *arguments) -> list[tuple[int, ...]]:
    """Shapes of the arrays that wait for the backward pass."""
    shapes = jax.eval_shape(lambda *xs: jax.tree.leaves(jax.vjp(function, *xs)[1]), *arguments)
    return [leaf.shape for leaf in shapes if leaf.size > 1]


@pytest.mark.parametrize("name", PLAIN)
def test_an_activation_keeps_its_slope_alone(name):
    x, weight = draw(0), draw(1)
    ours, plain = activation(name), PLAIN[name]
    np.testing.assert_array_equal(ours(x), plain(x))
    gradients = [jax.grad(lambda x, f=f: (f(x) * weight).sum())(x) for f in (ours, plain)]
    # GPT-2's form takes the difference of numbers near 1, up to nine times over.
    np.testing.assert_allclose(*gradients, rtol=1e-6, atol=1e-6 * float(jnp.abs(gradients[1]).max()))
    assert kept(ours, x) == [SHAPE]
    # Second derivatives are those of the function too.
    curves = [jax.grad(lambda x, f=f: jax.jvp(f, (x,), (weight,))[1].sum())(x) for f in (ours, plain)]
    np.testing.assert_allclose(*curves, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_a_gated_activation_keeps_a_slope_for_each_argument(name):
    gate, up, weight = draw(0), draw(1), draw(2)

    def loss(function):
        return lambda gate, up: (function(gate, up) * weight).sum()

    ours = jax.grad(loss(gated(name)), (0, 1))(gate, up)
    plain = jax.grad(loss(lambda gate, up: PLAIN[name](gate) * up), (0, 1))(gate, up)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)
    assert kept(gated(name), gate, up) == [SHAPE, SHAPE]


@pytest.mark.parametrize("name", typing.get_args(HiddenAct))
def test_an_activation_is_that_of_transformers(name):
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    np.testing.assert_allclose(
        activation(name)(jnp.asarray(x)), ACT2FN[name](torch.from_numpy(x)).numpy(), rtol=2e-6, atol=2e-6
    )


def test_plain_autodiff_would_keep_several():
    assert kept(jax.nn.gelu, draw(0)).count(SHAPE) > 3


@pytest.mark.parametrize(("kind", "bias"), [("layernorm", True), ("layernorm", False), ("rmsnorm", False)])
def test_a_norm_keeps_what_came_in(kind, bias):
    x = draw(0).astype(jnp.bfloat16)
    norm = Norm(kind, 1e-5, bias, jnp.dtype(jnp.bfloat16))
    params = norm.init(jax.random.key(0), x)
    # x in its own type, and scale and bias [D] at most.
    shapes = kept(lambda params, x: norm.apply(params, x), params, x)
    assert shapes.count(SHAPE) == 1 and set(shapes) <= {SHAPE, SHAPE[1:]}


def test_dropout_keeps_what_it_kept():
    x, key = draw(0), jax.random.key(1)
    out, gradient = jax.value_and_grad(lambda x: dropout(x, 0.25, key).sum())(x)
    assert set(np.unique(gradient)) == {0, np.float32(256 / 192)} and float(out) == pytest.approx(
        float((x * gradient).sum()), rel=1e-4
    )
    kinds = jax.eval_shape(lambda x: jax.tree.leaves(jax.vjp(lambda x: dropout(x, 0.25, key), x)[1]), x)
    assert [leaf.dtype for leaf in kinds if leaf.shape == SHAPE] == [bool]


def test_zeroing_keeps_one_number_a_token():
    seen = jnp.array([[True, False, True]])[:, :, None, None]
    x = jnp.full((1, 3, 2, 4), jnp.nan).at[:, ::2].set(1.0)
    gradient = jax.grad(lambda x: zero_unless(seen, x).sum())(x)
    np.testing.assert_array_equal(gradient[0, :, 0, 0], [1, 0, 1])
    np.testing.assert_array_equal(zero_unless(seen, x)[0, :, 0, 0], [1, 0, 1])
    assert kept(lambda x: zero_unless(seen, x), x) == [seen.shape]


@pytest.mark.parametrize(
    ("config", "length", "arrays"),
    [
        # bfloat16: q, k, v and the result in the kernel, which takes heads of 64 as 128; the result once more after it;
        # the residual stream twice and its norms; the MLP's slopes and its result. Float32: a logarithm a head.
        (clm.presets.gpt2(), 1024, lambda c: 2 * ((4 * 2 + 5) * c.hidden_size + 2 * c.intermediate_size) + 4 * 12),
        (
            mlm.presets.modern_base(),
            1024,
            lambda c: 2 * ((4 * 2 + 5) * c.hidden_size + 3 * c.intermediate_size) + 4 * 12,
        ),
    ],
)
def test_a_layer_keeps_what_its_products_need(config, length, arrays):
    model: ModelConfig = config.model.fitted(config.model.vocab_size, length)
    head = "causal_lm" if model.causal else "masked_lm"
    memory = step_memory(model, head, {}, rows=1, length=length, attention="splash")
    assert memory.kept == pytest.approx(model.num_hidden_layers * length * arrays(model), rel=0.01)


EQUATIONS = {
    "BTD,DNH->BTNH": ((2, 3, 4), (4, 2, 5), "NH"),
    "BTD,CDKH->BTCKH": ((2, 3, 4), (2, 4, 2, 5), "CKH"),
    "BTNH,NHD->BTD": ((2, 3, 2, 5), (2, 5, 4), "D"),
    "BTD,DF->BTF": ((2, 3, 4), (4, 16), "F"),
    "BTF,FD->BTD": ((2, 3, 16), (16, 4), "D"),
    "BTD,CDF->BTCF": ((2, 3, 4), (2, 4, 6), "CF"),
}
"""Of every product with parameters in a layer: shapes of both factors, and the axes of its bias."""


@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradients_of_products_on_cpus_are_those_of_einsum(equation):
    x_shape, kernel_shape, letters = EQUATIONS[equation]
    x, kernel = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate((x_shape, kernel_shape)))
    result = equation.split("->")[1]
    plain = jnp.einsum(equation, x, kernel)
    axes = [result.index(letter) for letter in letters]
    bias, weight = (jax.random.normal(jax.random.key(n), plain.shape) for n in (2, 3))
    bias = bias[tuple(slice(None) if axis in axes else 0 for axis in range(plain.ndim))]
    spread = [axis for axis in range(plain.ndim) if axis not in axes]

    def ours(x, kernel, bias):
        return plus_bias(product(equation, x, kernel, x.dtype), bias, result, letters)

    def theirs(x, kernel, bias):
        return jnp.einsum(equation, x, kernel) + jnp.expand_dims(bias, spread)

    np.testing.assert_array_equal(ours(x, kernel, bias), theirs(x, kernel, bias))
    gradients = [
        jax.grad(lambda *inputs, f=f: (f(*inputs) * weight).sum(), argnums=(0, 1, 2))(x, kernel, bias)
        for f in (ours, theirs)
    ]
    for mine, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_bfloat16_factors_are_rounded_and_nothing_else(equation, devices):
    """Against products of the rounded factors in float64; the kernel's gradient is that of factors as they are."""
    x_shape, kernel_shape, _ = EQUATIONS[equation]
    x, kernel = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate((x_shape, kernel_shape)))
    source, weights, result = equation.replace("->", ",").split(",")
    weight = jax.random.normal(jax.random.key(2), jnp.einsum(equation, x, kernel).shape)

    def sum_of(x, kernel):
        y = product(equation, x, kernel, jnp.dtype(jnp.bfloat16))
        return (y * weight).sum(), y

    def exact(equation, *factors, rounded=True):
        return np.einsum(equation, *(np.float64(f.astype(jnp.bfloat16) if rounded else f) for f in factors))

    with jax.set_mesh(build_mesh(MeshConfig(), jax.devices()[:devices])):
        gradients, y = jax.jit(jax.grad(sum_of, argnums=(0, 1), has_aux=True))(x, kernel)
    assert y.dtype == gradients[0].dtype == gradients[1].dtype == jnp.float32
    np.testing.assert_allclose(y, exact(equation, x, kernel), atol=1e-5)
    np.testing.assert_allclose(gradients[0], exact(f"{result},{weights}->{source}", weight, kernel), atol=1e-5)
    kernel_gradient = exact(f"{source},{result}->{weights}", x, weight, rounded=False)
    np.testing.assert_allclose(gradients[1], kernel_gradient, atol=1e-5)
