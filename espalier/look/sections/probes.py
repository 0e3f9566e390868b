"""What each layer knows."""

from __future__ import annotations

import numpy as np

from espalier.look.probes import Probes
from espalier.look.sections import drawn
from espalier.report import page
from espalier.report.page import Section


def sections(found: Probes) -> list[Section]:
    layers = len(found.accuracy_E)
    level = np.ones(layers)
    curves = {
        "probe": found.accuracy_E,
        "control task": found.control_E,
        "the most frequent tag of each word": found.by_word * level,
        "the most frequent tag": found.majority * level,
    }
    lines = drawn.lines("Accuracy", curves, ("embeddings", f"layer {layers - 1}"))
    rows = [
        (f"layer {at}" if at else "embeddings", f"{a:.3f}", f"{c:.3f}", f"{a - c:+.3f}")
        for at, (a, c) in enumerate(zip(found.accuracy_E, found.control_E, strict=True))
    ]
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    table = (
        "<div class=scroll tabindex=0><table class=probes><thead><tr><th></th><th>accuracy</th><th>control task</th>"
        f"<th>selectivity</th></tr></thead><tbody>{body}</tbody></table></div>"
    )
    note = (
        f"A linear probe of each layer, learnt from {page.number(found.words[0])} words and measured on "
        f"{page.number(found.words[1])} others. In the control task every word has a tag of its own at random (Hewitt "
        "and Liang 2019): what a probe gets there it has learnt by heart, so that the difference, its selectivity, "
        "is what tells of the layer."
    )
    return [Section("What each layer knows of the tags", lines + table, note, STYLE)]


STYLE = (
    drawn.STYLE
    + """
.probes th,.probes td{padding:.25rem 1.2rem .25rem 0;font-weight:400;text-align:left}
.probes thead th{color:var(--soft);font-size:.8rem}
"""
)
