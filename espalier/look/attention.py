"""Where each head looks: its probabilities, how much of what it reads arrives, and all layers together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from espalier.look.asked import Asked, scored
from espalier.models.taps import Taps, in_order
from espalier.predict.loaded import LoadedModel


class Attention(NamedTuple):
    """Of a text of T tokens; row t is of the token that looks, column s of what it looks at."""

    probabilities_LNTS: np.ndarray
    norms_LNTS: np.ndarray
    """‖α f(x)‖, the length of what arrives from s (Kobayashi et al. 2020, equation 5), f of one head."""
    rollout_TS: np.ndarray
    """How much of each input is in the last layer's token t, if heads counted alike (Abnar and Zuidema 2020)."""


def attention(model: LoadedModel, asked: Asked) -> Attention:
    """One pass, whose probabilities and values are read."""
    taps = Taps(read=("attention.probabilities", "attention.values"))
    seen = scored(model, asked, taps=taps)[2]
    alpha_LNTS = np.asarray(seen["attention.probabilities"][:, 0], np.float64)
    v_LSKH = np.asarray(seen["attention.values"][:, 0], np.float64)
    out_LNHD = in_order(
        {
            section: {j: {"out": layer["attention"]["out"]["kernel"]} for j, layer in layers.items()}
            for section, layers in model.params["layers"].items()
        }
    )["out"]
    groups = alpha_LNTS.shape[1] // v_LSKH.shape[2]
    v_LSNH = np.repeat(v_LSKH, groups, axis=2)
    lengths_LNS = np.linalg.norm(np.einsum("LSNH,LNHD->LNSD", v_LSNH, np.asarray(out_LNHD, np.float64)), axis=-1)
    return Attention(alpha_LNTS, alpha_LNTS * lengths_LNS[:, :, None], rollout(alpha_LNTS))


def rollout(alpha_LNTS: np.ndarray) -> np.ndarray:
    """∏ over layers of ½ (mean over heads + I), rows adding up to 1."""
    length = alpha_LNTS.shape[-1]
    found = np.eye(length)
    for alpha_NTS in alpha_LNTS:
        mixed = 0.5 * alpha_NTS.mean(0) + 0.5 * np.eye(length)
        found = mixed / mixed.sum(-1, keepdims=True) @ found
    return found
