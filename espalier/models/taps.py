"""Places inside a pass that can be read, and changed while it runs.

`apply(…, taps=Taps(read=("attention.probabilities",)))` also returns what stood at these places, of all layers. A
change is a function of what stands there and of an array of its own for each layer: a head times 0, the states of
another text, what a sparse autoencoder makes of them. Without taps nothing of this is in the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from espalier.models.config import ModelConfig

PLACES = {
    "stream": "what enters a layer, [B, T, D]",
    "attention.probabilities": "of each query head, float32 [B, N, T, S]",
    "attention.values": "[B, S, K, H]",
    "attention.heads": "what each head gives, before it is projected, [B, T, N, H]",
    "attention.out": "what attention adds to the stream, [B, T, D]",
    "mlp.hidden": "behind the activation, [B, T, F]",
    "mlp.out": "what the MLP adds to the stream, [B, T, D]",
}
"""Of each layer."""
EMBEDDINGS = "embeddings"
"""A place before the layers: what enters the stack, [B, T, D]."""


@dataclass(frozen=True)
class Taps:
    """What is read and changed in a pass."""

    read: tuple[str, ...] = ()
    """Names in PLACES, or EMBEDDINGS."""
    change: Mapping[str, Callable[[jax.Array, Any], jax.Array]] = field(default_factory=dict)
    """Place → (what stands there, its array of this layer) → what stands there instead, of the same shape and dtype."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Place → arrays [L, …] (of EMBEDDINGS without L) that its change is handed, layer by layer; unset = None."""

    def __post_init__(self):
        unknown = {*self.read, *self.change, *self.given} - {*PLACES, EMBEDDINGS}
        assert not unknown, f"no places {', '.join(sorted(unknown))}; there are {', '.join(PLACES)} and {EMBEDDINGS}"
        assert self.given.keys() <= self.change.keys(), "arrays are given to changes"

    def concern(self, place: str) -> bool:
        return place in self.read or place in self.change


class Tap:
    """The taps within one layer, while it is traced."""

    def __init__(self, taps: Taps, given: Mapping[str, Any]):
        self._taps, self._given = taps, given
        self.seen: dict[str, jax.Array] = {}

    def __call__(self, place: str, x: jax.Array) -> jax.Array:
        if place in self._taps.change:
            changed = self._taps.change[place](x, self._given.get(place))
            assert changed.shape == x.shape, f"{place}: {x.shape} became {changed.shape}"
            x = changed.astype(x.dtype)
        if place in self._taps.read:
            self.seen[place] = x
        return x

    def concern(self, place: str) -> bool:
        return self._taps.concern(place)


def tapped(tap: Tap | None, place: str, x: jax.Array) -> jax.Array:
    """x, or what a tap makes of it."""
    return x if tap is None else tap(place, x)


def in_order(sections: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, jax.Array]:
    """section → layer of it → place → array ([R, …] in the period) as place → [L, …], in the order of the stack."""
    parts: dict[str, list[jax.Array]] = {}
    for section, layers in sections.items():
        for place in next(iter(layers.values())):
            found = [layers[str(j)][place] for j in range(len(layers))]
            # The layers of a period follow each other, R times.
            stacked = jnp.stack(found, axis=1) if section == "period" else jnp.stack(found)
            parts.setdefault(place, []).append(
                stacked.reshape(-1, *stacked.shape[2:]) if section == "period" else stacked
            )
    return {place: jnp.concatenate(found) for place, found in parts.items()}


def of_section(config: ModelConfig, given: Mapping[str, Any], section: str) -> dict[str, Any]:
    """place → arrays [L, …] as layer of the section → place → array, [R, …] in the period."""
    prefix, period = len(config.prefix_layers), len(config.layer_period)
    begins = {"prefix": 0, "period": prefix, "suffix": prefix + period * config.repeats}
    size = {"prefix": prefix, "period": period, "suffix": len(config.suffix_layers)}[section]
    of_layers = {place: arrays for place, arrays in given.items() if place != EMBEDDINGS}

    def part(leaf: jax.Array, j: int) -> jax.Array:
        first = begins[section] + j
        return leaf[first : begins["suffix"] : period] if section == "period" else leaf[first]

    return {str(j): jax.tree.map(lambda leaf, j=j: part(leaf, j), of_layers) for j in range(size)}
