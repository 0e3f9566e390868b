"""What an attention backend says of itself: how it runs, what it refuses, what it keeps for the backward pass.

A backend is one file with one `Backend`, and one entry in `models.attention.BACKENDS` and `Execution.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from espalier.models.attention_spec import AttentionSpec, Places, spec_for
from espalier.models.config import ModelConfig
from sharding.mesh import mesh_capability, mesh_platform

Keys = Literal["row", "cache", "memory"]
"""Where keys come from: the queries' own row, a cache, or another text."""


@dataclass(frozen=True)
class Use:
    """What attention is wanted for, known before it runs: by this a backend is chosen and its memory is counted."""

    platform: str
    """cpu, gpu or tpu."""
    length: int
    """Tokens of a whole row."""
    parts: int
    """Devices over which the tokens of a row are split."""
    heads: int
    kv_heads: int
    head_size: int
    specs: tuple[AttentionSpec, ...]
    """Of every kind of layer; a backend must honour all of them."""
    dtype: str
    """Compute type."""
    dropout: float
    """Rate at which probabilities are dropped; 0 where dropout is off."""
    keys: Keys
    packed: bool = True
    """Whether a row may hold several documents; otherwise it is one, from the first place on, with padding behind."""
    mixed: bool = False
    """Whether some rows of a causal model see both sides: the indices of their queries are not those of their keys."""
    bias: bool = False
    """Whether something is added to the scores (models.relative)."""
    capability: float | None = None
    """Compute capability of an NVIDIA GPU: 9.0 is Hopper; None = another device."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        length: int,
        *,
        dtype: str,
        dropping: bool,
        keys: Keys = "row",
        packed: bool = True,
        mixed: bool = False,
        platform: str | None = None,
        capability: float | None = None,
        parts: int | None = None,
    ) -> Use:
        """The use of a model on rows of `length` tokens. platform with capability, parts: default: those of the mesh in
        use."""
        mesh = jax.sharding.get_abstract_mesh()
        in_use = 1 if mesh.empty else mesh.shape["sequence"]
        return cls(
            platform=platform or mesh_platform(),
            length=length,
            parts=in_use if parts is None else parts,
            heads=config.num_attention_heads,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            specs=tuple(spec_for(config, kind) for kind in dict.fromkeys(config.layers)),
            dtype=dtype,
            dropout=config.attention_dropout if dropping else 0.0,
            keys=keys,
            packed=packed,
            mixed=mixed,
            bias=config.position_embedding == "relative",
            capability=capability if platform else mesh_capability(),
        )

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize


class Run(Protocol):
    """Softmax attention [B, T, N, H] with N / K query heads to each key/value head.

    A query that sees nothing yields zero and passes zero gradient. dropout_key None = no dropout.
    """

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        spec: AttentionSpec,
        places: Places,
        dropout_rate: float,
        dropout_key: jax.Array | None,
        /,
    ) -> jax.Array: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    """As in --execution.attention."""
    platforms: tuple[str, ...]
    """Where it runs; empty = everywhere."""
    reason: str
    """Why it is chosen where nothing better is refused, in words."""
    fused: bool
    """Scores never reach the device's memory, and blocks of them that nobody may see are left out."""
    run: Run
    refuses: Callable[[Use], str | None]
    """Why this use cannot be honoured, in words; None if it is. Asked on its own platforms only."""
    keeps: Callable[[Use], int]
    """Bytes that a layer keeps of a row on one device between forward and backward pass, besides the result.

    heads and kv_heads of the use are then those of the device."""

    biased: bool = False
    """Whether it can add a bias to the scores."""

    def refusal(self, use: Use) -> str | None:
        """Why the backend cannot be used, its platform included; None if it can."""
        if self.platforms and use.platform not in self.platforms:
            where = " and ".join(f"{platform.upper()}s" for platform in self.platforms)
            return f"{self.name} attention is a kernel for {where} and this is a {use.platform.upper()}"
        if use.bias and not self.biased:
            return f"{self.name} attention adds no bias to scores, as relative positions ask for"
        return self.refuses(use)
