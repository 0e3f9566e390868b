"""The leaf layers: einsum projection, norm, embeddings, activations, dropout.

Parameters are float32; each layer casts them to the compute dtype where it uses them. Norms run in float32.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.models.config import Execution, ModelConfig
from sharding.mesh import constrain, mesh_platform

BFLOAT16 = (8, 7)
"""Bits of its exponent and of its mantissa."""


class Einsum(nn.Module):
    """A linear map with the equation at the call: `Einsum((D, N, H), ...)("BTD,DNH->BTNH", x)`.

    The bias has the kernel's output axes, in the kernel's order, which must be their order in the result too. Where the
    parameters have an adapter (LoRA, Hu et al. 2021) beside the kernel, its product is added: + scale · B A x, with x
    dropped out by adapter_dropout where there is a key.
    """

    shape: tuple[int, ...]
    bias: bool
    stddev: float
    dtype: jnp.dtype
    adapter_dropout: float = 0.0
    factors: jnp.dtype | None = None
    """What both factors of the product are rounded to; unset = dtype."""

    @nn.compact
    def __call__(self, equation: str, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.truncated_normal(self.stddev), self.shape, jnp.float32)
        y = product(equation, x.astype(self.dtype), kernel.astype(self.dtype), self.factors or self.dtype)
        if self.has_variable("params", "lora_a"):
            if key is not None and self.adapter_dropout:
                x = dropout(x, self.adapter_dropout, named_key(key, self.name or ""))
            y = y + self._adapter(equation, x.astype(self.dtype))
        if not self.bias:
            return y
        letters, result = equation.split(",")[1].split("->")
        sizes = dict(zip(letters, self.shape, strict=True))
        outputs = "".join(letter for letter in letters if letter in result)
        bias = self.param("bias", nn.initializers.zeros, tuple(sizes[letter] for letter in outputs), jnp.float32)
        return plus_bias(y, bias.astype(self.dtype), result, outputs)

    def _adapter(self, equation: str, x: jax.Array) -> jax.Array:
        """scale · B A x. The layout of the three is said in training/adapters.py."""
        a, b, scale = (self.get_variable("params", f"lora_{name}") for name in ("a", "b", "scale"))
        source, kernel, result = equation.replace("->", ",").split(",")
        inputs = "".join(letter for letter in kernel if letter not in result)
        counting = kernel[: a.ndim - 1 - len(inputs)]
        outputs = "".join(letter for letter in kernel if letter not in inputs + counting)
        within = "".join(letter for letter in source if letter not in inputs) + counting + "r"
        low = jnp.einsum(f"{source},{counting}r{inputs}->{within}", x, a.astype(self.dtype))
        high = jnp.einsum(f"{within},{counting}{outputs}r->{result}", low, b.astype(self.dtype))
        return high * scale.astype(self.dtype)


def product(equation: str, x: jax.Array, kernel: jax.Array, factors: jnp.dtype) -> jax.Array:
    """einsum of tokens and a kernel of the same dtype, which the result has too; the factors are rounded to `factors`.

    On CPUs with a gradient that XLA computes fast, of which the kernel's part is not rounded.
    """
    if mesh_platform() == "cpu":
        return _product_on_cpu(equation, factors, x, kernel)
    return jnp.einsum(equation, x, kernel) if factors == x.dtype else float32_einsum(equation, x, kernel, factors)


def _einsum_on_cpu(equation: str, factors: jnp.dtype, x: jax.Array, y: jax.Array) -> jax.Array:
    if factors == x.dtype:
        return jnp.einsum(equation, x, y)
    return _einsum(equation, x.astype(factors), y.astype(factors), x.dtype)


_product_on_cpu = jax.custom_vjp(_einsum_on_cpu, nondiff_argnums=(0, 1))


def _product_on_cpu_forward(equation, factors, x, kernel):
    return _einsum_on_cpu(equation, factors, x, kernel), (x, kernel)


def _product_on_cpu_backward(equation, factors, inputs, gradient):
    x, kernel = inputs
    source, weights, result = equation.replace("->", ",").split(",")
    # In a product over all tokens the first factor is transposed in memory: that is the smaller one, and the kernel's
    # gradient, which is smaller still, is laid out afterwards.
    first, second = ((source, x), (result, gradient)) if x.size <= gradient.size else ((result, gradient), (source, x))
    order = "".join(letter for term, _ in (first, second) for letter in term if letter in weights)
    kernel_gradient = jnp.einsum(f"{first[0]},{second[0]}->{order}", first[1], second[1])
    x_gradient = _einsum_on_cpu(f"{result},{weights}->{source}", factors, gradient, kernel)
    return x_gradient, jnp.einsum(f"{order}->{weights}", kernel_gradient)


_product_on_cpu.defvjp(_product_on_cpu_forward, _product_on_cpu_backward)


def plus_bias(y: jax.Array, bias: jax.Array, result: str, letters: str) -> jax.Array:
    """y, whose axes are `result`, + a bias with the axes `letters`, some of these in their order.

    On CPUs its gradient, a sum over tokens, is taken as a product with ones: XLA's sums take ten times as long.
    """
    return (_plus_bias_on_cpu if mesh_platform() == "cpu" else _plus_bias)(y, bias, result, letters)


def _plus_bias(y, bias, result, letters):
    sizes = dict(zip(letters, bias.shape, strict=True))
    return y + bias.reshape([sizes.get(letter, 1) for letter in result])


def _plus_bias_backward(result, letters, _, gradient):
    tokens = "".join(letter for letter in result if letter not in letters)
    ones = jnp.ones([size for letter, size in zip(result, gradient.shape, strict=True) if letter in tokens])
    return gradient, jnp.einsum(f"{tokens},{result}->{letters}", ones.astype(gradient.dtype), gradient)


_plus_bias_on_cpu = jax.custom_vjp(_plus_bias, nondiff_argnums=(2, 3))
_plus_bias_on_cpu.defvjp(lambda y, bias, *how: (_plus_bias(y, bias, *how), None), _plus_bias_backward)


def float32_einsum(equation: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Product of two arrays taken in `dtype`, its result in float32: for scores that go into a softmax.

    Its gradients are products in `dtype` too: by itself JAX would multiply in float32 there, because the result
    is. Each gradient has the dtype of its argument, so that those of float32 parameters are not rounded.
    """
    return _float32_einsum(equation, x, y, dtype)


def _product(equation: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _einsum(equation, x.astype(dtype), y.astype(dtype), jnp.float32)


def _einsum(equation: str, x: jax.Array, y: jax.Array, out: jnp.dtype) -> jax.Array:
    if x.dtype == jnp.bfloat16 and mesh_platform() == "cpu":
        if (parts := _matrices(equation)) is not None:
            return _matrix_product(*parts, x, y).astype(out)
        if out == jnp.float32:
            # XLA:CPU has no kernel for some of these, or is no faster with it. Rounded by an operation of its own,
            # which XLA does not take away as it does two casts.
            x, y = (jax.lax.reduce_precision(z.astype(out), *BFLOAT16) for z in (x, y))
    return jnp.einsum(equation, x, y, preferred_element_type=out)


def _matrices(equation: str) -> tuple[str, str, str, str] | None:
    """(rows, summed, second factor, result) of a product of two matrices, rows × summed the first one's axes in memory.

    None where it is another kind of product, or more than one device takes part: axes that are split are not merged.
    """
    one, two, result = equation.replace("->", ",").split(",")
    summed = one.lstrip(result)
    rows = one.removesuffix(summed)
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    plain = set(summed) == set(two) - set(result) and not set(summed) & set(result) and not set(rows) & set(two)
    return (rows, summed, two, result) if alone and plain and summed else None


def _matrix_product(rows: str, summed: str, two: str, result: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """float32: of bfloat16 factors XLA:CPU has a fast kernel for this kind of product alone."""
    columns = "".join(letter for letter in two if letter in result)
    sizes = dict(zip(rows + summed + two, x.shape + y.shape, strict=True))
    within = math.prod(sizes[letter] for letter in summed)
    # The second factor as it lies in memory already, if it does.
    first = two.startswith(summed)
    y = jnp.einsum(f"{two}->{summed + columns if first else columns + summed}", y)
    y = y.reshape((within, -1) if first else (-1, within))
    over = (((1,), (0 if first else 1,)), ((), ()))
    found = jax.lax.dot_general(x.reshape(-1, within), y, over, preferred_element_type=jnp.float32)
    return jnp.einsum(f"{rows}{columns}->{result}", found.reshape([sizes[letter] for letter in rows + columns]))


def _float32_einsum_forward(equation, x, y, dtype):
    return _product(equation, x, y, dtype), (x, y)


def _float32_einsum_backward(equation, dtype, inputs, gradient):
    x, y = inputs
    terms, result = equation.split("->")
    x_term, y_term = terms.split(",")
    gradient = gradient.astype(dtype)

    def product(term, other, target, like):
        return _einsum(f"{result},{term}->{target}", gradient, other.astype(dtype), like.dtype)

    return product(y_term, y, x_term, x), product(x_term, x, y_term, y)


_float32_einsum = jax.custom_vjp(_product, nondiff_argnums=(0, 3))
_float32_einsum.defvjp(_float32_einsum_forward, _float32_einsum_backward)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis, or the last few together.

    plus_one: the scale is kept as its difference from 1. It has the axes that are normalised over.
    """

    kind: str
    eps: float
    bias: bool
    dtype: jnp.dtype
    plus_one: bool = False
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, over = x.shape[-self.axes :], tuple(range(-self.axes, 0))
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", init, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32) if self.bias else None

        def normalise(x, scale, bias):
            y = x.astype(jnp.float32)
            if self.kind == "layernorm":
                y = y - y.mean(over, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(over, keepdims=True) + self.eps)
            y = y * _over_last(scale + 1 if self.plus_one else scale, y)
            return (y if bias is None else y + _over_last(bias, y)).astype(self.dtype)

        # For the backward pass x is kept and nothing else: several float32 arrays of its size would be otherwise.
        return jax.checkpoint(normalise, prevent_cse=False)(x, scale, bias)


def make_norm(config: ModelConfig, dtype: jnp.dtype, name: str | None = None) -> Norm:
    """The norm that `config` asks for."""
    bias = config.norm_bias and config.norm == "layernorm"
    return Norm(config.norm, config.norm_eps, bias, dtype, config.norm_plus_one, name=name)


class Embed(nn.Module):
    """A table of vectors; looked up by gather, so that its gradient is a scatter-add and no one-hot product."""

    rows: int
    features: int
    stddev: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        shape = (self.rows, self.features)
        table = self.param("embedding", nn.initializers.truncated_normal(self.stddev), shape, jnp.float32)
        # Out-of-range ids are clipped: the default would fill with NaN through an extra pass over the result.
        return jnp.take(table, ids, axis=0, mode="clip").astype(self.dtype)


class Embeddings(nn.Module):
    """Token + learned position + token type, then norm and dropout, as the config asks."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, input_ids_BT, positions_BT, token_type_ids_BT=None, key=None) -> jax.Array:
        c = self.config

        def table(rows: int, name: str) -> Embed:
            return Embed(rows, c.embedding_width, c.initializer_range, self.dtype, name=name)

        x_BTD = table(c.padded_vocab_size, "token")(input_ids_BT)
        if c.scale_embeddings:
            x_BTD = x_BTD * jnp.asarray(c.hidden_size**0.5, self.dtype)
        if c.position_embedding == "learned":
            x_BTD = x_BTD + table(c.max_position_embeddings, "position")(positions_BT + c.position_offset)
        if c.type_vocab_size:
            if token_type_ids_BT is None:  # One row for all: broadcasting keeps a scatter out of the backward pass.
                token_type_ids_BT = jnp.zeros((1, 1), jnp.int32)
            x_BTD = x_BTD + table(c.type_vocab_size, "token_type")(token_type_ids_BT)
        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        if c.embedding_norm:
            x_BTD = make_norm(c, self.dtype, "norm")(x_BTD)
        x_BTD = dropout(x_BTD, c.hidden_dropout, key)
        if c.embedding_width != c.hidden_size:
            project = Einsum((c.embedding_width, c.hidden_size), True, c.initializer_range, self.dtype, name="project")
            x_BTD = project("BTE,ED->BTD", x_BTD)
        return x_BTD


def compute_dtype(execution: Execution) -> jnp.dtype:
    """The dtype of activations: bfloat16 where the hardware gains by it, else float32 (XLA:CPU is no faster)."""
    name = execution.dtype
    if name == "auto":
        name = "float32" if mesh_platform() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def product_dtype(execution: Execution) -> jnp.dtype:
    """What products round their factors to: the narrower of the activations' dtype and what was asked for."""
    compute = compute_dtype(execution)
    return jnp.dtype(execution.products) if compute == jnp.float32 else compute


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key of its own for every name, whatever other names there are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """An activation by its Hugging Face name."""
    return elementwise(_activation(name))


def gated(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """activation(gate) * up (Shazeer 2020) by the activation's Hugging Face name."""
    act = _activation(name)
    return elementwise(lambda gate, up: act(gate) * up)


def _activation(name: str) -> Callable[[jax.Array], jax.Array]:
    functions = {"gelu": gelu, "gelu_new": jax.nn.gelu, "gelu_pytorch_tanh": jax.nn.gelu}
    return (functions | {"silu": jax.nn.silu, "relu": jax.nn.relu, "relu2": relu2, "tanh": jnp.tanh})[name]


def elementwise(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An elementwise function that keeps one array an argument for the backward pass: the slope by it.

    By itself JAX keeps what every operation in it needs, five arrays for GPT-2's GELU.
    """
    wrapped = jax.custom_jvp(lambda *arguments: function(*arguments))

    @wrapped.defjvp
    def _(arguments, tangents):
        def slope(i):
            def by_one(x):
                return function(*arguments[:i], x, *arguments[i + 1 :])

            return jax.jvp(by_one, (arguments[i],), (jnp.ones_like(arguments[i]),))[1]

        terms = [slope(i) * tangent for i, tangent in enumerate(tangents)]
        return function(*arguments), functools.reduce(jnp.add, terms)

    return wrapped


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU (Hendrycks & Gimpel 2016)."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def relu2(x: jax.Array) -> jax.Array:
    """max(x, 0)² (So et al. 2021, Primer)."""
    return jnp.square(jax.nn.relu(x))


def zero_unless(kept: jax.Array, x: jax.Array) -> jax.Array:
    """x where `kept` (its shape broadcasts to that of x), else 0 and no gradient; `kept` alone stays for the latter."""

    def select(kept, x):
        return jnp.where(kept, x, jnp.zeros((), x.dtype))

    # By itself JAX would keep both `kept` and the zeros at the size of x.
    return jax.checkpoint(select, prevent_cse=False)(kept, x)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a random `rate` of `x` and scale up the rest; the identity without a key.

    The rate is rounded to 1/256: four elements then share a random word, which makes dropout four times cheaper.
    """
    if key is None or rate == 0.0:
        return x
    dropped = min(255, max(1, round(rate * 256)))
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return zero_unless(draws >= dropped, x * (256 / (256 - dropped)))


def _over_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)
