"""Which words a score is owed to: gradient × input, integrated gradients, occlusion; and which of them to believe."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.tokenizer import special_ids
from espalier.look.asked import Asked, embedded, score_of
from espalier.predict.loaded import LoadedModel

STEPS, MOST_STEPS, BATCH = 32, 1024, 32
"""Of the integral, at first and at most; and of one program."""
COMPLETE = 0.01
"""The part of the difference of scores that may be missing."""


class Attribution(NamedTuple):
    """Of one logit, a number for each word (Asked.words)."""

    words: dict[str, np.ndarray]
    """Method → [W]: integrated_gradients, gradient_x_input, occlusion."""
    deletion: dict[str, np.ndarray]
    """Method → [W + 1]: the probability of the target after the most important words became the baseline one by one."""
    insertion: dict[str, np.ndarray]
    """Likewise, after they came into the baseline."""
    baseline: str
    """What stands in place of a word that is not there."""
    score: float
    """The logit on the text."""
    baseline_score: float
    """And on the baseline."""
    steps: int
    """Of the integral."""
    gap: float
    """The part of score - baseline_score that integrated gradients do not account for."""


def attribution(model: LoadedModel, asked: Asked) -> Attribution:
    """Integrated gradients from the baseline (Sundararajan et al. 2017), whose steps are doubled until they account for
    the difference of scores; gradient × input; occlusion, what the logit loses where a word becomes the baseline.

    All at the vectors that enter the stack. Special tokens stay in the baseline, words become [PAD]; where there is no
    such token, zeros.
    """
    pad: Any = model.tokenizer.pad_token_id
    ids_T = asked.batch["input_ids"][0]
    inside_T = np.zeros(len(ids_T), bool)
    for begin, end in asked.words:
        inside_T[begin:end] = True
    if model.head == "masked_lm":
        # Without the mask there is nothing to be asked.
        inside_T[list(asked.places)] = False
    x_TD = embedded(model, asked, ids_T)
    pads = pad is not None and pad != special_ids(model.tokenizer).eos
    filler: Any = pad if pads else 0
    empty_T = np.where(inside_T, np.int32(filler), ids_T)
    empty_TD = embedded(model, asked, empty_T) if pads else x_TD * ~inside_T[:, None]

    score = score_of(model, asked)
    slope = jax.grad(lambda params, x_TD: score(params, x_TD)[0], argnums=1)
    logits, slopes = (partial(jax.jit(jax.vmap(one, (None, 0))), model.params) for one in (score, slope))
    full, none = (float(value) for value in logits(jnp.stack([x_TD, empty_TD]))[0])
    difference_TD, steps = x_TD - empty_TD, STEPS
    while True:
        # The midpoint rule.
        parts = (np.arange(steps) + 0.5) / steps
        means = [
            slopes(empty_TD + jnp.asarray(parts[first : first + BATCH], jnp.float32)[:, None, None] * difference_TD)
            for first in range(0, steps, BATCH)
        ]
        integrated_T = np.asarray((sum(mean.sum(0) for mean in means) / steps * difference_TD).sum(-1), np.float64)
        gap = abs(integrated_T.sum() - (full - none)) / max(abs(full - none), 1e-9)
        if gap <= COMPLETE or steps >= MOST_STEPS:
            break
        steps *= 2
    product_T = np.asarray((slopes(x_TD[None])[0] * x_TD).sum(-1), np.float64)

    def of_words(values_T: np.ndarray) -> np.ndarray:
        return np.array([values_T[begin:end].sum() for begin, end in asked.words])

    left_WT = np.ones((len(asked.words), len(ids_T)), bool)
    for row_T, (begin, end) in zip(left_WT, asked.words, strict=True):
        row_T[begin:end] = False
    left_WT |= ~inside_T
    lost_W = full - _measured(logits, x_TD, empty_TD, left_WT)[0]
    words = {
        "integrated_gradients": of_words(integrated_T),
        "gradient_x_input": of_words(product_T),
        "occlusion": lost_W,
    }
    curves = {name: _curves(logits, x_TD, empty_TD, asked, values_W, inside_T) for name, values_W in words.items()}
    return Attribution(
        words,
        {name: curve[0] for name, curve in curves.items()},
        {name: curve[1] for name, curve in curves.items()},
        str(model.tokenizer.pad_token) if pads else "zeros",
        full,
        none,
        steps,
        float(gap),
    )


def _measured(logits, x_TD, empty_TD, kept_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logit, probability), [N], of the text with the tokens `kept`, the others from the baseline."""
    found = []
    for first in range(0, len(kept_NT), BATCH):
        kept = kept_NT[first : first + BATCH]
        rows = jnp.where(jnp.asarray(np.pad(kept, ((0, BATCH - len(kept)), (0, 0))))[..., None], x_TD, empty_TD)
        found.append([np.asarray(values)[: len(kept)] for values in logits(rows)])
    logit, probability = (np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True))
    return logit, probability


def _curves(logits, x_TD, empty_TD, asked: Asked, values_W: np.ndarray, inside_T: np.ndarray):
    order = np.argsort(-values_W, kind="stable")
    rank_T = np.full(len(inside_T), -1)
    for rank, word in enumerate(order):
        rank_T[slice(*asked.words[word])] = rank
    counts = np.arange(len(order) + 1)[:, None]
    gone = (rank_T >= 0) & inside_T & (rank_T < counts)
    come = ~inside_T | (rank_T < counts)
    return _measured(logits, x_TD, empty_TD, ~gone)[1], _measured(logits, x_TD, empty_TD, come)[1]
