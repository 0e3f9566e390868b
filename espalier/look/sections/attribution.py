"""Which words the score is owed to, by each method, and which of the methods to believe."""

from __future__ import annotations

from html import escape

import numpy as np

from espalier.look.asked import Asked
from espalier.look.attribution import COMPLETE, Attribution
from espalier.look.sections import drawn
from espalier.report import page
from espalier.report.page import Section

METHODS = {
    "integrated_gradients": "Integrated gradients",
    "occlusion": "Occlusion",
    "gradient_x_input": "Gradient × input",
}


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
    ends = "no word", "every word"
    out, put = (
        drawn.lines(title, {name: curves[key] for key, name in METHODS.items()}, ends)
        for title, curves in (("Taken out, the most important first", why.deletion), ("Put in", why.insertion))
    )
    note = (
        "The probability of the answer, on average over the words, as they are taken out or put in one by one. A "
        "method that knows what counts is low on the left and high on the right."
    )
    return Section("Which method to believe", page.grid([out, put]) + table, note, STYLE)


STYLE = (
    drawn.STYLE
    + """
.owed{line-height:2.1}
.owed span{padding:.15rem .3rem;border-radius:5px}
.owed .special{color:var(--soft);font-size:.8rem}
.belief td,.belief th{padding:.3rem .9rem .3rem 0;text-align:left;font-weight:400}
.belief thead th{color:var(--soft);font-size:.8rem}
"""
)
