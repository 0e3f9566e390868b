"""One transformer layer: attention and MLP with their residuals and norms, as the config asks.

Pre-norm: x + f(norm(x)) (Xiong et al. 2020). Post-norm: norm(x + f(x)) (Vaswani et al. 2017, BERT). Both:
x + norm(f(norm(x))) (Gemma Team 2024, section 2). Output: x + norm(f(x)) (OLMo Team 2025, section 3.2).

Under tensor parallelism the stream between attention and MLP lies split by tokens, and each of the two takes whole rows
and gives back its part (Korthikanti et al. 2022): norms and dropout are worked out once, what is kept is a part, and
as much is exchanged as in Megatron's first form, where sums travel whole.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.models.attention import attend
from espalier.models.attention_backend import Backend
from espalier.models.attention_spec import Places, spec_for
from espalier.models.config import LayerKind, ModelConfig
from espalier.models.layers import Einsum, Norm, activation, dropout, gated, make_norm, rotate
from sharding.mesh import constrain

DROPOUTS = 3
"""Random keys a layer needs: attention probabilities, attention output, MLP output."""
LayerCache = dict[str, jax.Array]
"""k, v [B, S, K, H] of one layer."""


class Context(NamedTuple):
    """What every layer of a pass shares."""

    places: Places
    rotary: dict[str, tuple[jax.Array, jax.Array]]
    """Rotary tables by kind of layer; kinds that do not turn queries and keys are not in it."""
    end: jax.Array | None
    """Where in the cache this pass writes; None without a cache."""


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads."""

    config: ModelConfig
    kind: LayerKind
    dtype: jnp.dtype
    backend: Backend

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache: LayerCache | None, key: jax.Array | None):
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.kv_heads, c.head_size

        def linear(shape: tuple[int, ...], name: str) -> Einsum:
            return Einsum(shape, c.attention_bias, c.initializer_range, self.dtype, name=name)

        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        q_BTNH = constrain(linear((D, N, H), "q")("BTD,DNH->BTNH", x_BTD), "batch", "sequence", "tensor", None)
        kv_BTCKH = linear((2, D, K, H), "kv")("BTD,CDKH->BTCKH", x_BTD)
        kv_BTCKH = constrain(kv_BTCKH, "batch", "sequence", None, "tensor", None)
        k_BTKH, v_BTKH = kv_BTCKH[:, :, 0], kv_BTCKH[:, :, 1]
        if c.qk_norm:
            settings = ("rmsnorm", c.norm_eps, False, self.dtype, c.norm_plus_one, 2 if c.qk_norm_over == "all" else 1)
            q_BTNH = Norm(*settings, name="q_norm")(q_BTNH)
            k_BTKH = Norm(*settings, name="k_norm")(k_BTKH)
        if self.kind in context.rotary:
            q_BTNH = rotate(q_BTNH, context.rotary[self.kind])
            k_BTKH = rotate(k_BTKH, context.rotary[self.kind])
        q_BTNH = constrain(q_BTNH, "batch", "sequence", "tensor", None)
        # Under sequence parallelism every device needs the keys and values of the whole row.
        k_BTKH, v_BTKH = (constrain(y, "batch", None, "tensor", None) for y in (k_BTKH, v_BTKH))

        if cache is not None:
            assert context.end is not None
            start = (0, context.end, 0, 0)
            cache = {
                name: jax.lax.dynamic_update_slice(cache[name], new.astype(cache[name].dtype), start)
                for name, new in (("k", k_BTKH), ("v", v_BTKH))
            }
            k_BTKH, v_BTKH = cache["k"].astype(self.dtype), cache["v"].astype(self.dtype)
        out_BTNH = attend(
            spec_for(c, self.kind),
            q_BTNH,
            k_BTKH,
            v_BTKH,
            context.places,
            backend=self.backend,
            dropout_rate=c.attention_dropout,
            dropout_key=key,
        )
        bias = c.attention_bias if c.attention_out_bias is None else c.attention_out_bias
        out = Einsum((N, H, D), bias, output_stddev(c), self.dtype, name="out")
        return constrain(out("BTNH,NHD->BTD", out_BTNH), "batch", "sequence", None), cache


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        D, F = c.hidden_size, c.intermediate_size

        def linear(shape: tuple[int, ...], name: str, stddev: float = c.initializer_range) -> Einsum:
            return Einsum(shape, c.mlp_bias, stddev, self.dtype, name=name)

        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        if c.gated_mlp:
            # C next to F, not in front: one product without transposing its result (a quarter faster on CPU).
            gate_up_BTCF = linear((2, D, F), "gate_up")("BTD,CDF->BTCF", x_BTD)
            gate_up_BTCF = constrain(gate_up_BTCF, "batch", "sequence", None, "tensor")
            h_BTF = gated(c.hidden_act)(gate_up_BTCF[:, :, 0], gate_up_BTCF[:, :, 1])
        else:
            up_BTF = constrain(linear((D, F), "up")("BTD,DF->BTF", x_BTD), "batch", "sequence", "tensor")
            h_BTF = activation(c.hidden_act)(up_BTF)
        out = linear((F, D), "down", output_stddev(c))
        return constrain(out("BTF,FD->BTD", h_BTF), "batch", "sequence", None)


class Block(nn.Module):
    """A layer of the stack; returns (x_BTD, its cache). keys [DROPOUTS]: turn dropout on."""

    config: ModelConfig
    kind: LayerKind
    first: bool
    """Whether this is the first layer of the stack, which may go without an attention norm."""
    dtype: jnp.dtype
    backend: Backend

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache: LayerCache | None = None, keys: jax.Array | None = None):
        c = self.config
        attention = Attention(c, self.kind, self.dtype, self.backend, name="attention")
        mlp = MLP(c, self.dtype, name="mlp")
        mlp_norm = make_norm(c, self.dtype, "mlp_norm")
        attention_norm = make_norm(c, self.dtype, "attention_norm")
        if self.first and not c.first_attention_norm:
            attention_norm = _identity
        key = [None] * DROPOUTS if keys is None else keys

        if c.norm_position != "post":
            attention_post_norm, mlp_post_norm = _identity, _identity
            if c.norm_position == "output":
                attention_norm, mlp_norm = _identity, _identity
            if c.norm_position != "pre":
                attention_post_norm = make_norm(c, self.dtype, "attention_post_norm")
                mlp_post_norm = make_norm(c, self.dtype, "mlp_post_norm")
            y_BTD, cache = attention(attention_norm(x_BTD), context, cache, key[0])
            x_BTD = x_BTD + dropout(attention_post_norm(y_BTD), c.hidden_dropout, key[1])
            x_BTD = constrain(x_BTD, "batch", "tokens", None)
            x_BTD = x_BTD + dropout(mlp_post_norm(mlp(mlp_norm(x_BTD))), c.hidden_dropout, key[2])
        else:
            y_BTD, cache = attention(x_BTD, context, cache, key[0])
            x_BTD = attention_norm(x_BTD + dropout(y_BTD, c.hidden_dropout, key[1]))
            x_BTD = constrain(x_BTD, "batch", "tokens", None)
            x_BTD = mlp_norm(x_BTD + dropout(mlp(x_BTD), c.hidden_dropout, key[2]))
        return constrain(x_BTD, "batch", "tokens", None), cache


def output_stddev(config: ModelConfig) -> float:
    """Initial scale of what writes to the residual stream: pre-norm stacks divide by √(2L) (GPT-2, section 2.3)."""
    if config.norm_position in ("post", "output"):
        return config.initializer_range
    return config.initializer_range * (2 * config.num_hidden_layers) ** -0.5


def _identity(x):
    return x
