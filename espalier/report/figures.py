"""Curves as PNG, drawn twice: for light and for dark pages.

Names are not drawn: they may be in any script and must not cover a curve. `legend` gives the page the colour of each.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

SMOOTHED_FROM = 60
"""Curves of more points get a moving mean, and the points themselves are drawn pale."""

PALETTES = (
    {"ink": "#1d2321", "soft": "#5d6864", "line": "#dfe3df", "colours": ("#1b6e53", "#c8540f", "#3f63b5", "#8a5a9e")},
    {"ink": "#e6ebe8", "soft": "#9aa7a1", "line": "#333c38", "colours": ("#6cc5a1", "#f0954f", "#8aa8f0", "#c79ad8")},
)
"""Light and dark. Curves take the colours in order; people with red-green colour blindness can tell them apart."""


class Curve(NamedTuple):
    """Values over steps; marked: with a dot at every point."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    marked: bool = False


class Bar(NamedTuple):
    """A horizontal reference line and its name."""

    name: str
    value: float


def draw(curves: Sequence[Curve], ylabel: str, *, bar: Bar | None = None, wide: bool = True) -> tuple[str, str]:
    """(light, dark) base64 PNGs of the curves over steps. wide: full width of the page, else a phone or half of it."""
    return tuple(base64.b64encode(_png(curves, ylabel, bar, wide, palette)).decode() for palette in PALETTES)  # type: ignore[return-value]


def legend(curves: Sequence[Curve], bar: Bar | None = None) -> list[tuple[str, int | None]]:
    """(name, number of its colour; None = the dashed line) of what `draw` draws; [] if that is one curve."""
    colours = len(PALETTES[0]["colours"])
    entries: list[tuple[str, int | None]] = [(curve.name, number % colours) for number, curve in enumerate(curves)]
    entries += [(bar.name, None)] if bar else []
    return entries if len(entries) > 1 else []


def _png(curves: Sequence[Curve], ylabel: str, bar: Bar | None, wide: bool, palette: dict) -> bytes:
    # The object interface: pyplot has global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 10.5 if wide else 9.5
    figure = Figure(figsize=(7.4, 3.5) if wide else (4.0, 2.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for colour, curve in zip(palette["colours"] * len(curves), curves, strict=False):
        _plot(axes, curve, colour)
    if bar is not None:
        axes.axhline(bar.value, color=palette["soft"], linewidth=1.1, linestyle=(0, (4, 3)))
    _frame(axes, curves, bar, palette, size)
    axes.set_ylabel(ylabel, color=palette["soft"], fontsize=size)
    axes.set_xlabel("step", color=palette["soft"], fontsize=size)
    out = io.BytesIO()
    figure.savefig(out, format="png", transparent=True)
    return out.getvalue()


def _plot(axes, curve: Curve, colour: str) -> None:
    if curve.marked:
        axes.plot(curve.steps, curve.values, color=colour, linewidth=1.6, marker="o", markersize=3.6)
    elif len(curve.values) > SMOOTHED_FROM:
        axes.plot(curve.steps, curve.values, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(curve.steps, _moving_mean(curve.values), color=colour, linewidth=1.7)
    else:
        marker = "o" if len(curve.values) == 1 else None
        axes.plot(curve.steps, curve.values, color=colour, linewidth=1.7, marker=marker)


def _frame(axes, curves: Sequence[Curve], bar: Bar | None, palette: dict, size: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette["line"])
    axes.grid(axis="y", color=palette["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=palette["soft"], labelsize=size - 1, length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.margins(x=0.02)


def _tick(value: float, _position: int | None = None) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit:
            return f"{value / unit:.4g}{letter}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _moving_mean(values: Sequence[float]) -> list[float]:
    """The mean over a window of a twentieth of the points around each."""
    half = max(1, len(values) // 40)
    return [
        sum(values[max(0, i - half) : i + half + 1]) / len(values[max(0, i - half) : i + half + 1])
        for i in range(len(values))
    ]
