"""The page of `look`: what the score is owed to, and every head's attention, in one file that loads nothing else."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from espalier.look.asked import Asked
from espalier.look.attention import Attention
from espalier.look.attribution import COMPLETE, Attribution
from espalier.report import page
from espalier.report.page import Section

METHODS = {
    "integrated_gradients": "Integrated gradients",
    "occlusion": "Occlusion",
    "gradient_x_input": "Gradient × input",
}
WEIGHTS = 4_000_000
"""Numbers of all heads together that the page holds; of a longer text it shows the last tokens."""


def write(path: Path, title: str, asked: Asked, why: Attribution, heads: Attention) -> Path:
    """The page."""
    shown = [("answer", asked.name.strip() or repr(asked.name)), ("probability", page.percent(asked.probability))]
    shown += [("logit", page.number(why.score)), ("of an empty text", page.number(why.baseline_score))]
    sections = [_why(asked, why), _belief(why), _attention(asked, heads)]
    subtitle = "What the model looks at, and what its answer is owed to"
    return page.write_page(path, title, subtitle, sections, page.tiles(shown))


def _why(asked: Asked, why: Attribution) -> Section:
    complete = (
        f"They account for the difference of the logits within {page.percent(why.gap)} ({why.steps:,} steps)."
        if why.gap <= COMPLETE
        else f"Even {why.steps:,} steps leave {page.percent(why.gap)} of the difference of the logits unaccounted for: "
        "do not rely on them here."
    )
    note = (
        f"Green speaks for “{asked.name.strip()}”, red against it. A word that is not there is {why.baseline}. "
        "Integrated gradients (Sundararajan et al. 2017) share out the whole difference between this text and an empty "
        f"one. {complete} "
        "Occlusion is what the logit loses without the word."
    )
    body = "".join(
        f"<h3>{escape(name)}</h3>{_text(asked, why.words[method], method)}" for method, name in METHODS.items()
    )
    return Section("Which words it is owed to", body, note, STYLE)


def _text(asked: Asked, values_W: np.ndarray, method: str) -> str:
    """The words on a ground that says how much they count, with their numbers as titles."""
    most = max(np.abs(values_W).max(initial=0), 1e-12)
    of_word = {
        begin: (end, text, value) for (begin, end), text, value in zip(asked.words, asked.texts, values_W, strict=True)
    }
    parts, at = [], 0
    while at < len(asked.tokens):
        end, text, value = of_word.get(at, (at + 1, asked.tokens[at], None))
        text = escape(text.strip() or "␣")
        if value is None:
            parts.append(f"<span class=special>{text}</span>")
        else:
            part = 100 * abs(value) / most
            side = "for" if value > 0 else "against"
            parts.append(f"<span class={side} style='--part:{part:.0f}%' title='{value:+.4f}' tabindex=0>{text}</span>")
        at = end
    written = page.language("".join(asked.tokens))
    return f"<p class=owed{written} data-method={method}>{' '.join(parts)}</p>"


def _belief(why: Attribution) -> Section:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{page.percent(why.deletion[key].mean())}</td>"
        f"<td>{page.percent(why.insertion[key].mean())}</td></tr>"
        for key, name in METHODS.items()
    )
    table = (
        "<div class=scroll><table class=belief><thead><tr><th></th><th>words taken out</th><th>words put in</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div>"
    )
    drawn = page.grid([_curve("Taken out, the most important first", why.deletion), _curve("Put in", why.insertion)])
    note = (
        "The probability of the answer, on average over the words, as they are taken out or put in one by one. A "
        "method that knows what counts is low on the left and high on the right."
    )
    return Section("Which method to believe", drawn + table, note, STYLE)


def _curve(title: str, curves: dict[str, np.ndarray]) -> str:
    """Lines over the number of words, from 0 to 1."""
    lines = []
    for number, method in enumerate(METHODS):
        values = curves[method]
        steps = max(len(values) - 1, 1)
        points = " ".join(f"{100 * at / steps:.2f},{60 - 60 * value:.2f}" for at, value in enumerate(values))
        lines.append(f"<polyline class=k{number} points='{points}'/>")
    legend = "".join(f"<li><i class=k{number}></i>{escape(name)}</li>" for number, name in enumerate(METHODS.values()))
    return (
        f"<h3>{escape(title)}</h3><svg class=curve viewBox='-1 -2 102 64' role=img aria-label='{escape(title)}'>"
        "<path d='M0 0H100M0 30H100M0 60H100'/>" + "".join(lines) + f"</svg><ul class=keys>{legend}</ul>"
    )


def _attention(asked: Asked, heads: Attention) -> Section:
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
    script = files("espalier.look").joinpath("heads.js").read_text(encoding="utf-8")
    body = (
        "<div id=heads><div class=kinds role=group aria-label='What is shown'></div><div class=overview></div>"
        "<div class=one hidden></div></div><noscript><p>These maps need JavaScript; look.npz has them.</p></noscript>"
        f"<script type=application/json id=maps>{content}</script><script>{script}</script>"
    )
    return Section("Attention", body, note, STYLE)


STYLE = """
h3{font-size:.95rem;margin:1rem 0 .3rem}
.owed{line-height:2.1}
.owed span{padding:.15rem .3rem;border-radius:5px}
.owed .special{color:var(--soft);font-size:.8rem}
.owed .for{background:color-mix(in srgb,#1b8a5a var(--part),transparent)}
.owed .against{background:color-mix(in srgb,#c23b4e var(--part),transparent)}
.curve{width:100%;max-width:26rem}
.curve path{stroke:var(--line);stroke-width:.4;fill:none}
.curve polyline{fill:none;stroke-width:1.2;stroke:var(--k)}
.k0{--k:#1b6e53}.k1{--k:#c2571a}.k2{--k:#3c6fc4}
.keys{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.8rem;color:var(--soft)}
.keys i{display:inline-block;width:.9rem;height:.2rem;background:var(--k);margin-right:.35rem;vertical-align:middle}
.belief td,.belief th{padding:.3rem .9rem .3rem 0;text-align:left;font-weight:400}
.belief thead th{color:var(--soft);font-size:.8rem}
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
