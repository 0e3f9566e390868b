"""Where each head looks: all heads small, and one of them with its tokens (heads.js)."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np

from espalier.look.asked import Asked
from espalier.look.attention import Attention
from espalier.report.page import Section

WEIGHTS = 4_000_000
"""Numbers of all heads together that the page holds; of a longer text it shows the last tokens."""


def section(asked: Asked, heads: Attention) -> Section:
    layers, count, length, _ = heads.probabilities_LNTS.shape
    most = max(8, int((WEIGHTS / (2 * layers * count)) ** 0.5))
    first = max(0, length - most)

    def packed(values: np.ndarray) -> list:
        """Numbers from 0 to 255, of each map its greatest being 255."""
        part = values[..., first:, first:]
        greatest = np.maximum(part.max((-1, -2), keepdims=True), 1e-12)
        return np.round(255 * part / greatest).astype(int).tolist()

    data = {
        "tokens": asked.tokens[first:],
        "maps": {
            "norms": packed(heads.norms_LNTS),
            "probabilities": packed(heads.probabilities_LNTS),
            "rollout": packed(heads.rollout_TS[None, None]),
        },
    }
    cut = f" Of {length:,} tokens the last {length - first:,} are shown." if first else ""
    note = (
        "Each square is a head of a layer, the first layer at the top: rows look, columns are looked at. Choose one to "
        "see its tokens. Probabilities alone mislead (Jain and Wallace 2019): a head may look at a token and read next "
        "to nothing there, so that the length of what arrives, ‖α f(x)‖ (Kobayashi et al. 2020), is shown first. "
        "Rollout follows all layers (Abnar and Zuidema 2020). None of these is an explanation by itself." + cut
    )
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    script = files("espalier.look.sections").joinpath("heads.js").read_text(encoding="utf-8")
    body = (
        "<div id=heads><div class=kinds role=group aria-label='What is shown'></div><div class=overview></div>"
        "<div class=one hidden></div></div><noscript><p>These maps need JavaScript; look.npz has them.</p></noscript>"
        f"<script type=application/json id=maps>{content}</script>"
    )
    return Section("Attention", body, note, STYLE, script)


STYLE = """
h3{font-size:.95rem;margin:1rem 0 .3rem}
.kinds{display:flex;flex-wrap:wrap;gap:.4rem;margin-bottom:.8rem}
#heads button{font:inherit;color:inherit;background:none;border:1px solid var(--line);border-radius:6px;cursor:pointer}
.kinds button{padding:.25rem .7rem}
#heads button[aria-pressed=true]{border-color:var(--accent);color:var(--accent)}
.overview{display:grid;gap:.35rem;max-width:34rem}
.overview button{padding:2px;aspect-ratio:1;min-width:0}
.overview canvas,.one canvas{width:100%;height:100%;display:block;image-rendering:pixelated}
.one{margin-top:1rem}
.one .lines{line-height:2.1}
.one .lines button{padding:.1rem .3rem;margin:.1rem;border-color:transparent}
.one .lines button[aria-pressed=true]{border-color:var(--accent)}
.one .map{max-width:20rem}
"""
