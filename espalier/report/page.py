"""The building blocks of a report: one self-contained HTML page for desktops and phones, light and dark.

A section is a title and a piece of HTML; `write_page` makes a file of them. Whoever turns values of a run into HTML
escapes them: this module, and the sections of a task.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from espalier.files import replacing
from espalier.page_policy import content_policy, meta
from espalier.report.style import COLOURS, STYLE

NARROW, DARK = "(max-width:34rem)", "(prefers-color-scheme:dark)"
SHOWN = 4
"""How many items of a long list are shown unfolded."""
LONG = 160
"""Characters beyond which the value of a setting is folded."""


class Section(NamedTuple):
    """A part of the page."""

    title: str
    """Plain text."""
    body: str
    """HTML."""
    note: str = ""
    """Plain text under the title."""
    style: str = ""
    """CSS of elements that only such sections have; a page includes it once."""
    script: str = ""
    """JavaScript of ours, run behind the body; no other script of the page is (page_policy.py)."""


def write_page(path: Path, title: str, subtitle: str, sections: Iterable[Section], tiles: str = "") -> Path:
    """Write the page (`page_of`) atomically."""
    with replacing(path) as file:
        file.write(page_of(title, subtitle, sections, tiles))
    return path


def page_of(title: str, subtitle: str, sections: Iterable[Section], tiles: str = "") -> str:
    """The page, complete. title, subtitle: plain text. tiles: from `tiles`, above the first section."""
    head = f"<p class=mark>Espalier</p><h1>{escape(title)}</h1><p class=sub>{escape(subtitle)}</p>"
    parts, styles = [f"<header>{head}{tiles}</header>"], [STYLE, COLOURS]
    scripts = []
    for section in sections:
        scripts += [section.script] if section.script else []
        styles += [section.style] if section.style not in styles else []
        note = f"<p class=note>{escape(section.note)}</p>" if section.note else ""
        script = f"<script>{section.script}</script>" if section.script else ""
        parts.append(f"<section><h2>{escape(section.title)}</h2>{note}{section.body}{script}</section>")
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8>{meta(content_policy(scripts))}"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f'<meta name=color-scheme content="light dark"><title>{escape(title)} · Espalier</title>'
        f"<style>{''.join(styles)}</style>"
        f"<main>{''.join(parts)}</main></html>\n"
    )


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """Key figures as (name, value) side by side."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
    return f"<dl class=tiles>{cells}</dl>" if cells else ""


def picture(
    drawn: tuple[str, str],
    description: str,
    legend: Sequence[tuple[str, int | None]] = (),
    on_phones: tuple[str, str] | None = None,
) -> str:
    """A drawing as base64 PNGs for light and dark pages, with its legend below.

    description: the alternative text. legend: from figures.legend. on_phones: the same drawing, legible on a narrow
    screen.
    """
    png = "data:image/png;base64,"
    light, dark = drawn
    sources = [(DARK, dark)]
    if on_phones:
        sources = [(f"{NARROW} and {DARK}", on_phones[1]), (NARROW, on_phones[0]), *sources]
    listed = "".join(
        f"<li><i class={'bar' if colour is None else f'c{colour}'}></i>{marked('span', name)}</li>"
        for name, colour in legend
    )
    parts = "".join(f'<source media="{media}" srcset="{png}{data}">' for media, data in sources)
    return f'<picture>{parts}<img alt="{escape(description)}" src="{png}{light}"></picture>' + (
        f"<ul class=legend>{listed}</ul>" if listed else ""
    )


def grid(bodies: Sequence[str]) -> str:
    """Pieces of HTML side by side, as far as the width allows."""
    return f"<div class=grid>{''.join(f'<div>{body}</div>' for body in bodies)}</div>"


def entries(items: Iterable[tuple[str, str, str]]) -> str:
    """A list of (title, remark in small print, text)."""
    parts = (
        f"<li><strong>{escape(title)}</strong> <small>{escape(remark)}</small>{marked('p', text)}</li>"
        for title, remark, text in items
    )
    return f"<ul class=entries>{''.join(parts)}</ul>"


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars for values from 0 to 1: (name, value, note); the first in the accent colour."""
    parts = []
    for number, (name, value, note) in enumerate(rows):
        kind = " class=own" if number == 0 else ""
        small = f"<small>{escape(note)}</small>" if note else ""
        width = 100 * min(max(value, 0.0), 1.0)
        parts.append(
            f"<li{kind}><span{language(name)}>{escape(name)}{small}</span><i><b style='width:{width:.1f}%'></b></i>"
            f"<em>{percent(value)}</em></li>"
        )
    return f"<ul class=bars>{''.join(parts)}</ul>"


def settings(config: dict) -> str:
    """A configuration: first its own settings, then its groups (nested dictionaries), folded."""
    plain = [(name, value) for name, value in config.items() if not isinstance(value, dict)]
    parts = [_definitions(plain)] if plain else []
    for name, values in config.items():
        if isinstance(values, dict):
            parts.append(folded(name, _definitions(values.items())))
    return "".join(parts)


def number(value: Any, digits: int = 4) -> str:
    """A number for people: 12,345, 0.0003, 3.142, 1.2 M; anything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1e7 else f"{value / 1e6:,.1f} M"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.{digits}g}"


def percent(part: float, digits: int = 1) -> str:
    """A fraction in percent, with a narrow no-break space before the sign."""
    shown = f"{100 * part:.{digits}f}"
    return f"{'<1' if shown == '0' and part > 0 else shown}\u202f%"


def shortened(text: str, limit: int = 240) -> str:
    """The beginning of a text, on one line: up to a blank near the limit, where there is one (Chinese has none)."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    blank = text.rfind(" ", limit * 3 // 4, limit + 1)
    return f"{text[: blank if blank > 0 else limit]} …"


def _definitions(items: Iterable[tuple[str, Any]]) -> str:
    rows = []
    for name, value in items:
        shown = _plain(value)
        body = escape(shown)
        if len(shown) > LONG:
            whole = f"{len(value):,} values" if isinstance(value, list | tuple) else "all of it"
            body = f"{escape(shown[: LONG // 2])} … {folded(whole, body)}"
        rows.append(f"<div><dt>{escape(str(name))}</dt><dd dir=auto>{body}</dd></div>")
    return f"<dl class=settings>{''.join(rows)}</dl>"


def folded(title: str, body: str) -> str:
    """HTML that a click or the space key unfolds, without a script."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def split(parts: Sequence[str]) -> tuple[str, str]:
    """The first SHOWN parts and the others; a single further one is not worth a click and joins the first."""
    count = SHOWN if len(parts) > SHOWN + 1 else len(parts)
    return "".join(parts[:count]), "".join(parts[count:])


def marked(tag: str, text: str) -> str:
    """An element with text of a run, in any language and direction."""
    return f"<{tag}{language(text)}>{escape(text)}</{tag}>"


def language(text: str) -> str:
    """The attributes `lang` and `dir` for text whose language only its script tells: for fonts, line breaks and voices.

    Han characters without kana or hangul count as Chinese. With few East Asian characters, the language is unknown
    (""), not English, the language of the page.
    """
    kana, hangul, han = (
        sum(low <= character <= high for character in text)
        for low, high in (("\u3041", "\u30ff"), ("\uac00", "\ud7a3"), ("\u3400", "\u9fff"))
    )
    east = kana + hangul + han
    if 5 * east <= len(text):
        return ' lang="" dir=auto'
    return f" lang={'ja' if 10 * kana > east else 'ko' if 10 * hangul > east else 'zh'} dir=auto"


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
