"""Which texts fire each feature, and which words it makes likelier.

features.jsonl    a feature a line: {"feature", "density": part of the tokens, "strength": mean where it fires,
                  "words": [[word, logit]], "texts": [{"at": int, "tokens": [str], "values": [float]}]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.token_tables import token_texts
from espalier.features import autoencoder as sparse
from espalier.features.objective import NAME, stream, takes_part
from espalier.files import replacing
from espalier.models.logits import of_states
from espalier.models.transformer import normed
from espalier.pretraining.objective import Setup

TEXTS = 6
"""Of a feature, each from another row."""
BEFORE, BEHIND = 12, 6
"""Tokens around the one that fires most."""
WORDS = 6
RAISED = 256
"""Features whose words are found by one program."""
FEATURES = "features.jsonl"


class Found(NamedTuple):
    """What fires F features, in S texts each, the strongest first; W = BEFORE + 1 + BEHIND tokens."""

    density_F: np.ndarray
    strength_F: np.ndarray
    best_FS: np.ndarray
    """0 where there are fewer texts."""
    ids_FSW: np.ndarray
    """-1 outside of the text."""
    values_FSW: np.ndarray


def write_examples(folder: Path, setup: Setup, params: Any, batches: Sequence[dict], layer: int) -> None:
    """Write features.jsonl into a run."""
    params = jax.tree.map(jnp.asarray, params)
    found = examples(setup, params, batches, layer)
    raised = raised_words(setup, params, layer, found.strength_F)
    assert setup.tokenizer is not None
    texts = token_texts(setup.tokenizer)
    with replacing(folder / FEATURES) as file:
        for row in rows(found, raised, texts):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows(found: Found, raised: tuple[np.ndarray, np.ndarray], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of features.jsonl. raised: of `raised_words`. texts: id → what a person would write."""

    def word(token: int) -> str:
        return texts[token] if token < len(texts) else "?"

    result = []
    for number in range(len(found.density_F)):
        shown = []
        for best, ids_W, values_W in zip(
            found.best_FS[number], found.ids_FSW[number], found.values_FSW[number], strict=True
        ):
            if best <= 0:
                continue
            there = ids_W >= 0
            shown.append(
                {
                    "at": int(there[:BEFORE].sum()),
                    "tokens": [word(int(token)) for token in ids_W[there]],
                    "values": [round(float(value), 3) for value in values_W[there]],
                }
            )
        words = [[word(int(i)), round(float(x), 3)] for i, x in zip(raised[0][number], raised[1][number], strict=True)]
        result.append(
            {
                "feature": number,
                "density": float(found.density_F[number]),
                "strength": round(float(found.strength_F[number]), 4),
                "words": words if shown else [],
                "texts": shown,
            }
        )
    return result


def examples(setup: Setup, params: Any, batches: Sequence[dict], layer: int, count: int = TEXTS) -> Found:
    """One pass over texts as they are: nothing in them is masked."""

    @jax.jit
    def fired(params: Any, batch: dict):
        part_BT = takes_part(batch)
        f_BTF = sparse.features(params[NAME], stream(setup, params, batch, layer)[0])
        f_BTF = jnp.where(part_BT[..., None], f_BTF, 0.0)
        at_BF = f_BTF.argmax(1)
        place_BFW = at_BF[..., None] + jnp.arange(-BEFORE, BEHIND + 1)
        inside = (place_BFW >= 0) & (place_BFW < f_BTF.shape[1])
        near = jnp.clip(place_BFW, 0, f_BTF.shape[1] - 1)
        rows = jnp.arange(len(at_BF))[:, None, None]
        segment_BFW = batch["segment_ids"][rows, near]
        same = inside & (segment_BFW == jnp.take_along_axis(batch["segment_ids"], at_BF, axis=1)[..., None])
        ids_BFW = jnp.where(same, batch["input_ids"][rows, near], -1)
        values_BFW = jnp.where(same, f_BTF[rows, near, jnp.arange(f_BTF.shape[2])[None, :, None]], 0.0)
        return f_BTF.max(1), ids_BFW, values_BFW, (f_BTF > 0).sum((0, 1)), f_BTF.sum((0, 1)), part_BT.sum()

    best, ids, values = np.empty((0, 0)), np.empty((0, 0, 0)), np.empty((0, 0, 0))
    times, total, tokens = 0.0, 0.0, 0
    for batch in batches:
        most_BF, ids_BFW, values_BFW, times_F, total_F, part = (np.asarray(x) for x in fired(params, dict(batch)))
        times, total, tokens = times + times_F.astype(np.float64), total + total_F.astype(np.float64), tokens + part
        parts = [most_BF.T, ids_BFW.swapaxes(0, 1), values_BFW.swapaxes(0, 1)]
        if best.size:
            parts = [np.concatenate(pair, axis=1) for pair in zip((best, ids, values), parts, strict=True)]
        order_FS = np.argsort(-parts[0], axis=1, kind="stable")[:, :count]
        best = np.take_along_axis(parts[0], order_FS, axis=1)
        ids, values = (np.take_along_axis(part, order_FS[..., None], axis=1) for part in parts[1:])
    times, total = np.asarray(times), np.asarray(total)
    return Found(times / max(int(tokens), 1), total / np.maximum(times, 1), best, ids, values)


def raised_words(setup: Setup, params: Any, layer: int, strength_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ids [F, WORDS] and by how much their logits rise, if a feature is added to the mean stream as strongly as it
    fires on average and the head reads that, as in the logit lens (nostalgebraist 2020)."""
    model, own = setup.model, params[NAME]
    head = "causal_lm" if model.causal else "masked_lm"
    size = min(WORDS, model.vocab_size)

    @jax.jit
    def rises(params: Any, added_ND: jax.Array):
        mean_D = params[NAME]["statistics"]["mean"]
        x_1ND = jnp.concatenate([mean_D[None], mean_D + added_ND])[None]
        segments = jnp.ones(x_1ND.shape[:2], jnp.int32)
        logits = of_states(model, head, params, normed(model, params, x_1ND), segments, setup.execution)[0]
        rise, ids = jax.lax.top_k(logits[1:, : model.vocab_size] - logits[:1, : model.vocab_size], size)
        return ids, rise

    scale = np.asarray(own["statistics"]["scale"])
    added_FD = scale * strength_F[:, None].astype(np.float32) * np.asarray(sparse.unit(own["decoder"]["kernel"]))
    found = []
    for first in range(0, len(added_FD), RAISED):
        some = added_FD[first : first + RAISED]
        padded = np.pad(some, ((0, min(RAISED, len(added_FD)) - len(some)), (0, 0)))
        found.append([np.asarray(part)[: len(some)] for part in rises(params, jnp.asarray(padded))])
    ids, rise = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return ids, rise
