"""Drawings that several sections have: lines over steps, and maps of numbers. Plain SVG and tables, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from espalier.report import page

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Where an axis may end, times a power of ten."""


def lines(title: str, curves: Mapping[str, np.ndarray], ends: tuple[str, str], percent: bool = True) -> str:
    """Curves over evenly spaced steps, upwards from 0. ends: what the first and the last step are, in words."""
    greatest = max((float(np.nanmax(values)) for values in curves.values() if len(values)), default=1.0)
    most = 1.0 if percent and greatest > 0.5 else _above(greatest)
    drawn = []
    for number, values in enumerate(curves.values()):
        steps = max(len(values) - 1, 1)
        points = " ".join(f"{100 * at / steps:.2f},{60 - 60 * value / most:.2f}" for at, value in enumerate(values))
        drawn.append(f"<polyline class=k{number % 6} points='{points}'/>")
    top = page.percent(most) if percent else page.number(most)
    legend = "".join(f"<li><i class=k{number % 6}></i>{escape(name)}</li>" for number, name in enumerate(curves))
    label = f"{title}, from 0 to {top}, from {ends[0]} to {ends[1]}"
    return (
        f"<h3>{escape(title)}</h3><p class=most>{top}</p>"
        f"<svg class=curve viewBox='-1 -2 102 64' role=img aria-label='{escape(label, quote=True)}'>"
        f"<path d='M0 0H100M0 30H100M0 60H100'/>{''.join(drawn)}</svg>"
        f"<p class=ends><span>{escape(ends[0])}</span><span>{escape(ends[1])}</span></p>"
        f"<ul class=keys>{legend}</ul>"
    )


def heat(values_RC: np.ndarray, rows: Sequence[str], columns: Sequence[str], shown: Sequence[str] = ()) -> str:
    """A table whose cells are the stronger the greater their number: green above 0, red below.

    shown: formats a number, as str.format does, where it is written into its cell; else it is the cell's title.
    """
    most = float(np.abs(values_RC).max(initial=0)) or 1.0
    head = "".join(f"<th scope=col{page.language(name)}>{escape(name)}</th>" for name in columns)
    body = []
    for name, row in zip(rows, values_RC, strict=True):
        cells = []
        for column, value in zip(columns, row, strict=True):
            side, part = "for" if value >= 0 else "against", 100 * abs(value) / most
            said = escape(f"{name}, {column}: {value:.4g}", quote=True)
            text = escape(shown[0].format(value)) if shown else ""
            cells.append(f"<td class={side} style='--part:{part:.0f}%' title='{said}'>{text}</td>")
        body.append(f"<tr><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        f"<div class=scroll tabindex=0><table class=heat><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _above(value: float) -> float:
    """The least round number that is no smaller."""
    if not value > 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(scale * power for scale in SCALES if scale * power >= value * (1 - 1e-9)))


STYLE = """
h3{font-size:.95rem;margin:1rem 0 .3rem}
.most{margin:0;color:var(--soft);font-size:.75rem}
.ends{display:flex;justify-content:space-between;max-width:26rem;margin:0;color:var(--soft);font-size:.75rem}
.curve{width:100%;max-width:26rem;display:block}
.curve path{stroke:var(--line);stroke-width:.4;fill:none}
.curve polyline{fill:none;stroke-width:1.2;stroke:var(--k)}
.k0{--k:#1b6e53}.k1{--k:#c2571a}.k2{--k:#3c6fc4}.k3{--k:#8a4fb0}.k4{--k:#a08a1f}.k5{--k:#7a7f7c}
.keys{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.8rem;color:var(--soft)}
.keys i{display:inline-block;width:.9rem;height:.2rem;background:var(--k);margin-right:.35rem;vertical-align:middle}
.for{background:color-mix(in srgb,#1b8a5a var(--part),transparent)}
.against{background:color-mix(in srgb,#c23b4e var(--part),transparent)}
.heat th,.heat td{padding:.2rem .45rem;font-weight:400;font-size:.8rem;white-space:nowrap;text-align:center}
.heat td{border:1px solid var(--paper);min-width:1.5rem;height:1.5rem}
.heat th{color:var(--soft)}
.heat tbody th{position:sticky;left:0;background:var(--paper);text-align:left}
"""
