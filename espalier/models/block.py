"""One transformer layer: attention, cross-attention where the config has it, and MLP, with residuals and norms.

Pre-norm: x + f(norm(x)) (Xiong et al. 2020). Post-norm: norm(x + f(x)) (Vaswani et al. 2017, BERT). Both:
x + norm(f(norm(x))) (Gemma Team 2024, section 2). Output: x + norm(f(x)) (OLMo Team 2025, section 3.2).

Under tensor parallelism the stream between attention and MLP lies split by tokens, and each of the two takes whole rows
and gives back its part (Korthikanti et al. 2022): norms and dropout are worked out once, what is kept is a part, and
as much is exchanged as in Megatron's first form, where sums travel whole.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.models.attention import attend
from espalier.models.attention_backend import Backend
from espalier.models.attention_spec import Places, spec_for
from espalier.models.config import LayerKind, ModelConfig
from espalier.models.layers import Einsum, Norm, activation, dropout, gated, make_norm
from espalier.models.rotary import rotate
from espalier.models.taps import Tap, tapped
from sharding.mesh import constrain

LayerCache = dict[str, jax.Array]
"""k, v [B, S, K, H] of one layer; with cross-attention also memory_k and memory_v of the memory."""


class Memory(NamedTuple):
    """Another text that cross-attention reads, such as the states of an encoder."""

    x_BSD: jax.Array | None
    """None: the cache holds its keys and values already."""
    segment_ids_BS: jax.Array
    """A token of segment i of a row reads segment i of the memory's row; 0 = padding."""


class Context(NamedTuple):
    """What every layer of a pass shares."""

    places: Places
    rotary: dict[str, tuple[jax.Array, jax.Array]]
    """Rotary tables by kind of layer; kinds that do not rotate queries and keys are absent."""
    end: jax.Array | None
    """Where in the cache this pass writes; None without a cache."""
    memory: Memory | None = None
    tap: Tap | None = None
    """Of this layer (models.taps)."""
    bias_BNTS: jax.Array | None = None
    """Of the scores of a stack with relative positions (models.relative)."""


def dropouts(config: ModelConfig) -> int:
    """Random keys that a layer needs: attention probabilities, attention output, MLP output; cross-attention's two."""
    return 5 if config.cross_attention else 3


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads, over the tokens themselves or over a memory."""

    config: ModelConfig
    kind: LayerKind
    dtype: jnp.dtype
    backend: Backend
    cross: bool = False
    """Keys and values are of context.memory; positions play no part."""
    factors: jnp.dtype | None = None
    """What products with parameters round their factors to; unset = dtype."""

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache: LayerCache | None, key: jax.Array | None):
        c = self.config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.kv_heads, c.head_size
        # Scores begin as large as if √head_dim divided them, whatever does (Raffel et al. 2020: nothing).
        q_stddev = c.initializer_range * (c.attention_divisor / H) ** 0.5
        kind = self.dtype, c.adapter_dropout, self.factors

        def linear(shape: tuple[int, ...], name: str, stddev: float = c.initializer_range) -> Einsum:
            return Einsum(shape, c.attention_bias, stddev, *kind, name=name)

        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        q_BTNH = linear((D, N, H), "q", q_stddev)("BTD,DNH->BTNH", x_BTD, key)
        q_BTNH = constrain(q_BTNH, "batch", "sequence", "tensor", None)
        source_BTD, spec, places = x_BTD, spec_for(c, self.kind), context.places
        if self.cross:
            assert context.memory is not None
            source_BTD, segments_BS = context.memory
            spec = dataclasses.replace(spec, causal=False, left=None, right=None)
            index_1S = jnp.arange(segments_BS.shape[1], dtype=jnp.int32)[None, :]
            places = Places(places.q_segments_BT, segments_BS, places.q_index_BT, index_1S)
        settings = ("rmsnorm", c.norm_eps, False, self.dtype, c.norm_plus_one, 2 if c.qk_norm_over == "all" else 1)
        if c.qk_norm:
            q_BTNH = Norm(*settings, name="q_norm")(q_BTNH)
        if source_BTD is None:
            assert cache is not None
            k_BTKH, v_BTKH = (cache[name].astype(self.dtype) for name in ("memory_k", "memory_v"))
        else:
            source_BTD = constrain(source_BTD, "batch", "sequence", None)
            kv_BTCKH = linear((2, D, K, H), "kv")("BTD,CDKH->BTCKH", source_BTD, key)
            kv_BTCKH = constrain(kv_BTCKH, "batch", "sequence", None, "tensor", None)
            k_BTKH, v_BTKH = kv_BTCKH[:, :, 0], kv_BTCKH[:, :, 1]
            if c.qk_norm:
                k_BTKH = Norm(*settings, name="k_norm")(k_BTKH)
        if self.kind in context.rotary and not self.cross:
            q_BTNH = rotate(q_BTNH, context.rotary[self.kind])
            k_BTKH = rotate(k_BTKH, context.rotary[self.kind])
        q_BTNH = constrain(q_BTNH, "batch", "sequence", "tensor", None)
        # Under sequence parallelism every device needs the keys and values of the whole row.
        k_BTKH, v_BTKH = (constrain(y, "batch", None, "tensor", None) for y in (k_BTKH, v_BTKH))

        if cache is not None and self.cross:
            cache = cache | {
                name: new.astype(cache[name].dtype) for name, new in (("memory_k", k_BTKH), ("memory_v", v_BTKH))
            }
        elif cache is not None:
            assert context.end is not None
            start = (0, context.end, 0, 0)
            cache = cache | {
                name: jax.lax.dynamic_update_slice(cache[name], new.astype(cache[name].dtype), start)
                for name, new in (("k", k_BTKH), ("v", v_BTKH))
            }
            k_BTKH, v_BTKH = cache["k"].astype(self.dtype), cache["v"].astype(self.dtype)
        tap = None if self.cross else context.tap
        v_BTKH = tapped(tap, "attention.values", v_BTKH)
        out_BTNH = attend(
            spec,
            q_BTNH,
            k_BTKH,
            v_BTKH,
            places,
            backend=self.backend,
            dropout_rate=c.attention_dropout,
            dropout_key=key,
            tap=tap,
            bias_BNTS=None if self.cross else context.bias_BNTS,
        )
        out_BTNH = tapped(tap, "attention.heads", out_BTNH)
        bias = c.attention_bias if c.attention_out_bias is None else c.attention_out_bias
        out = Einsum((N, H, D), bias, output_stddev(c), *kind, name="out")
        return constrain(out("BTNH,NHD->BTD", out_BTNH, key), "batch", "sequence", None), cache


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    config: ModelConfig
    dtype: jnp.dtype
    factors: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BTD, key: jax.Array | None = None, tap: Tap | None = None):
        c = self.config
        D, F = c.hidden_size, c.intermediate_size
        kind = self.dtype, c.adapter_dropout, self.factors

        def linear(shape: tuple[int, ...], name: str, stddev: float = c.initializer_range) -> Einsum:
            return Einsum(shape, c.mlp_bias, stddev, *kind, name=name)

        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        if c.gated_mlp:
            # C next to F, not in front: one product without transposing its result (a quarter faster on CPU).
            gate_up_BTCF = linear((2, D, F), "gate_up")("BTD,CDF->BTCF", x_BTD, key)
            gate_up_BTCF = constrain(gate_up_BTCF, "batch", "sequence", None, "tensor")
            h_BTF = gated(c.hidden_act)(gate_up_BTCF[:, :, 0], gate_up_BTCF[:, :, 1])
        else:
            up_BTF = constrain(linear((D, F), "up")("BTD,DF->BTF", x_BTD, key), "batch", "sequence", "tensor")
            h_BTF = activation(c.hidden_act)(up_BTF)
        h_BTF = tapped(tap, "mlp.hidden", h_BTF)
        out = linear((F, D), "down", output_stddev(c))
        return constrain(out("BTF,FD->BTD", h_BTF, key), "batch", "sequence", None)


class Block(nn.Module):
    """A layer of the stack; returns (x_BTD, its cache). keys [dropouts(config)]: turn dropout on."""

    config: ModelConfig
    kind: LayerKind
    first: bool
    """Whether this is the first layer of the stack, which may go without an attention norm."""
    dtype: jnp.dtype
    backend: Backend
    factors: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache: LayerCache | None = None, keys: jax.Array | None = None):
        c = self.config
        attention = Attention(c, self.kind, self.dtype, self.backend, factors=self.factors, name="attention")
        mlp = MLP(c, self.dtype, self.factors, name="mlp")
        key = [None] * dropouts(c) if keys is None else keys
        first_norm = not self.first or c.first_attention_norm
        tap = context.tap
        x_BTD = tapped(tap, "stream", x_BTD)

        y_BTD, cache = attention(self._before("attention", x_BTD, first_norm), context, cache, key[0])
        x_BTD = self._after("attention", x_BTD, y_BTD, key[1], first_norm, tap)
        if c.cross_attention:
            cross = Attention(c, self.kind, self.dtype, self.backend, True, self.factors, name="cross_attention")
            y_BTD, cache = cross(self._before("cross_attention", x_BTD), context, cache, key[3])
            x_BTD = self._after("cross_attention", x_BTD, y_BTD, key[4])
        x_BTD = self._after("mlp", x_BTD, mlp(self._before("mlp", x_BTD), key[2], tap), key[2], tap=tap)
        return x_BTD, cache

    def _before(self, name: str, x_BTD: jax.Array, normed: bool = True) -> jax.Array:
        """What attention or the MLP takes of the residual stream."""
        c = self.config
        if c.norm_position not in ("pre", "both") or not normed:
            return x_BTD
        return make_norm(c, self.dtype, f"{name}_norm")(x_BTD)

    def _after(
        self, name: str, x_BTD: jax.Array, y_BTD: jax.Array, dropout_key, normed: bool = True, tap: Tap | None = None
    ) -> jax.Array:
        """The residual stream with what attention or the MLP gave."""
        c = self.config
        if c.norm_position in ("both", "output"):
            y_BTD = make_norm(c, self.dtype, f"{name}_post_norm")(y_BTD)
        y_BTD = tapped(tap, f"{name}.out", y_BTD)
        x_BTD = x_BTD + dropout(y_BTD, c.hidden_dropout, dropout_key)
        if c.norm_position == "post" and normed:
            x_BTD = make_norm(c, self.dtype, f"{name}_norm")(x_BTD)
        return constrain(x_BTD, "batch", "tokens", None)


def output_stddev(config: ModelConfig) -> float:
    """Initial scale of what writes to the residual stream: pre-norm stacks divide by √(2L) (GPT-2, section 2.3).

    0 where the config wants layers that begin as the identity.
    """
    if config.zero_outputs:
        return 0.0
    if config.norm_position in ("post", "output"):
        return config.initializer_range
    return config.initializer_range * (2 * config.num_hidden_layers) ** -0.5
