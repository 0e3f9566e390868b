"""Which words the score is owed to, by each method, and which of the methods to believe."""

from __future__ import annotations

from html import escape

import numpy as np

from espalier.look.asked import Asked
from espalier.look.attribution import COMPLETE, Attribution
from espalier.report import page
from espalier.report.page import Section

METHODS = {
    "integrated_gradients": "Integrated gradients",
    "occlusion": "Occlusion",
    "gradient_x_input": "Gradient × input",
}

SCALES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Where the scale of a curve may end."""


def sections(asked: Asked, why: Attribution) -> list[Section]:
    return [_why(asked, why), _belief(why)]


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
    greatest = max(values.max() for curves in (why.deletion, why.insertion) for values in curves.values())
    most = next((step for step in SCALES if step >= greatest), 1.0)
    drawn = page.grid(
        [_curve("Taken out, the most important first", why.deletion, most), _curve("Put in", why.insertion, most)]
    )
    note = (
        "The probability of the answer, on average over the words, as they are taken out or put in one by one. A "
        "method that knows what counts is low on the left and high on the right."
    )
    return Section("Which method to believe", drawn + table, note, STYLE)


def _curve(title: str, curves: dict[str, np.ndarray], most: float) -> str:
    """Lines over the number of words, from 0 to `most`."""
    lines = []
    for number, method in enumerate(METHODS):
        values = curves[method]
        steps = max(len(values) - 1, 1)
        points = " ".join(f"{100 * at / steps:.2f},{60 - 60 * value / most:.2f}" for at, value in enumerate(values))
        lines.append(f"<polyline class=k{number} points='{points}'/>")
    legend = "".join(f"<li><i class=k{number}></i>{escape(name)}</li>" for number, name in enumerate(METHODS.values()))
    label = f"{title}: the probability of the answer, from 0 to {page.percent(most)}"
    return (
        f"<h3>{escape(title)}</h3><p class=most>{page.percent(most)}</p>"
        f"<svg class=curve viewBox='-1 -2 102 64' role=img aria-label='{escape(label)}'>"
        "<path d='M0 0H100M0 30H100M0 60H100'/>" + "".join(lines) + f"</svg><ul class=keys>{legend}</ul>"
    )


STYLE = """
h3{font-size:.95rem;margin:1rem 0 .3rem}
.owed{line-height:2.1}
.owed span{padding:.15rem .3rem;border-radius:5px}
.owed .special{color:var(--soft);font-size:.8rem}
.owed .for{background:color-mix(in srgb,#1b8a5a var(--part),transparent)}
.owed .against{background:color-mix(in srgb,#c23b4e var(--part),transparent)}
.curve{width:100%;max-width:26rem}
.most{margin:0;color:var(--soft);font-size:.75rem}
.curve path{stroke:var(--line);stroke-width:.4;fill:none}
.curve polyline{fill:none;stroke-width:1.2;stroke:var(--k)}
.k0{--k:#1b6e53}.k1{--k:#c2571a}.k2{--k:#3c6fc4}
.keys{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.8rem;color:var(--soft)}
.keys i{display:inline-block;width:.9rem;height:.2rem;background:var(--k);margin-right:.35rem;vertical-align:middle}
.belief td,.belief th{padding:.3rem .9rem .3rem 0;text-align:left;font-weight:400}
.belief thead th{color:var(--soft);font-size:.8rem}
"""
