"""The building blocks of a report: one self-contained HTML page, readable on a phone, in light and in dark.

A section is a title and a piece of HTML; `write_page` makes a file of them. Everything that comes
from a run is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from espalier.files import replacing
from espalier.training.figures import PALETTES

NARROW, DARK = "(max-width:34rem)", "(prefers-color-scheme:dark)"
SHOWN = 4
"""How many texts, and hidden words of each, stand there unfolded."""
LONG = 160
"""Characters beyond which the value of a setting is folded."""


class Section(NamedTuple):
    """A part of the page; `note` stands under the title, both plain text. body: HTML."""

    title: str
    body: str
    note: str = ""


def write_page(path: Path, title: str, subtitle: str, sections: Iterable[Section], tiles: str = "") -> Path:
    """Write the page whole or not at all. title, subtitle: plain text. tiles: from `tiles`, above the first section."""
    head = f"<p class=mark>Espalier</p><h1>{escape(title)}</h1><p class=sub>{escape(subtitle)}</p>"
    parts = [f"<header>{head}{tiles}</header>"]
    for section in sections:
        note = f"<p class=note>{escape(section.note)}</p>" if section.note else ""
        parts.append(f"<section><h2>{escape(section.title)}</h2>{note}{section.body}</section>")
    page = (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f'<meta name=color-scheme content="light dark"><title>{escape(title)} · Espalier</title>'
        f"<style>{STYLE}{COLOURS}</style>"
        f"<main>{''.join(parts)}</main></html>\n"
    )
    with replacing(path) as file:
        file.write(page)
    return path


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
    """A drawing as base64 PNGs, for light and for dark, and below it what its lines are.

    description: what a person who cannot see it is told. legend: as training.figures.legend has it. on_phones: the
    same in a form that stays legible on a narrow screen.
    """
    png = "data:image/png;base64,"
    light, dark = drawn
    sources = [(DARK, dark)]
    if on_phones:
        sources = [(f"{NARROW} and {DARK}", on_phones[1]), (NARROW, on_phones[0]), *sources]
    listed = "".join(
        f"<li><i class={'bar' if colour is None else f'c{colour}'}></i>{_marked('span', name)}</li>"
        for name, colour in legend
    )
    parts = "".join(f'<source media="{media}" srcset="{png}{data}">' for media, data in sources)
    return f'<picture>{parts}<img alt="{escape(description)}" src="{png}{light}"></picture>' + (
        f"<ul class=legend>{listed}</ul>" if listed else ""
    )


def grid(bodies: Sequence[str]) -> str:
    """Pieces of HTML side by side where there is room."""
    return f"<div class=grid>{''.join(f'<div>{body}</div>' for body in bodies)}</div>"


def entries(items: Iterable[tuple[str, str, str]]) -> str:
    """A list of (title, small remark, text)."""
    parts = (
        f"<li><strong>{escape(title)}</strong> <small>{escape(remark)}</small>{_marked('p', text)}</li>"
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
            f"<li{kind}><span{_language(name)}>{escape(name)}{small}</span><i><b style='width:{width:.1f}%'></b></i>"
            f"<em>{percent(value)}</em></li>"
        )
    return f"<ul class=bars>{''.join(parts)}</ul>"


def confusion_table(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """Rows are true labels, columns predicted ones; the shade is the part of the row."""
    head = "".join(f"<th>{_marked('span', label)}</th>" for label in labels)
    turned = " class=tall" if len(labels) > 5 or max(map(len, labels)) > 12 else ""
    rows = []
    for i, (label, counts) in enumerate(zip(labels, matrix, strict=True)):
        total = max(sum(counts), 1)
        cells = "".join(
            f"<td class={'hit' if i == j else 'miss'} style='--part:{100 * count / total:.0f}%'>{count or '·'}</td>"
            for j, count in enumerate(counts)
        )
        rows.append(f"<tr>{_marked('th', label)}{cells}<td class=sum>{percent(counts[i] / total, 0)}</td></tr>")
    return (
        f"<div class=scroll><table class=confusion><thead{turned}><tr><td class=corner>true ↓ &nbsp;predicted →</td>"
        f"{head}<th><span>recall</span></th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def masked_words(samples: Sequence[dict]) -> str:
    """Excerpts with hidden words: what stood there, green where the first guess is right, and the guesses.

    Beyond SHOWN excerpts, or SHOWN words of one, the rest is folded away.
    """
    cards = []
    for sample in samples:
        slots = {slot["index"]: slot for slot in sample["masked"]}
        language = _language("".join(slots[at]["truth"] if at in slots else t for at, t in enumerate(sample["tokens"])))
        text, rows = [], []
        for index, token in enumerate(sample["tokens"]):
            slot = slots.get(index)
            written = slot["truth"] if slot else token
            shown, space = _visible(written), " " if written.startswith(" ") and text else ""
            if slot is None:
                special = shown[:1] in "[<" and shown[-1:] in "]>" and len(shown) > 2
                text.append(f"{space}<s>{escape(shown)}</s>" if special else space + escape(shown))
                continue
            right = bool(slot["guesses"]) and slot["guesses"][0][0] == slot["truth"]
            kind = "right" if right else "wrong"
            text.append(f"{space}<mark class={kind}>{escape(shown)}</mark>")
            guesses = "".join(
                f"<li{' class=truth' if word == slot['truth'] else ''}><bdi>{escape(_visible(word))}</bdi> "
                f"<small>{escape(percent(probability, 0))}</small></li>"
                for word, probability in slot["guesses"]
            )
            rows.append(f"<tr><th><mark class={kind}>{escape(shown)}</mark></th><td><ol>{guesses}</ol></td></tr>")
        shown_rows, others = _split(rows)
        tables = f"<table class=guesses>{shown_rows}</table>"
        if others:
            tables += _folded(f"{len(rows) - SHOWN} more hidden words", f"<table class=guesses>{others}</table>")
        cards.append(f"<article{language}><p>{''.join(text)}</p>{tables}</article>")
    first, others = _split(cards)
    body = f"<div class=samples>{first}</div>"
    return body + (_folded(f"{len(cards) - SHOWN} more texts", f"<div class=samples>{others}</div>") if others else "")


def texts(items: Iterable[str]) -> str:
    """Generated texts, as they are."""
    return "".join(
        _marked("blockquote", text.strip()) if text.strip() else "<blockquote>(nothing)</blockquote>" for text in items
    )


def settings(config: dict) -> str:
    """A configuration, its groups (nested dictionaries) folded away under the settings of the run itself."""
    plain = [(name, value) for name, value in config.items() if not isinstance(value, dict)]
    parts = [_definitions(plain)] if plain else []
    for name, values in config.items():
        if isinstance(values, dict):
            parts.append(_folded(name, _definitions(values.items())))
    return "".join(parts)


def number(value: Any, digits: int = 4) -> str:
    """A number as people write it: 12,345, 0.0003, 3.142, 1.2 M; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1e7 else f"{value / 1e6:,.1f} M"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.{digits}g}"


def percent(part: float, digits: int = 1) -> str:
    """A part of 1 in percent, with the narrow blank before the sign that keeps both on one line."""
    shown = f"{100 * part:.{digits}f}"
    return f"{'<1' if shown == '0' and part > 0 else shown}\u202f%"


def _definitions(items: Iterable[tuple[str, Any]]) -> str:
    rows = []
    for name, value in items:
        shown = _plain(value)
        body = escape(shown)
        if len(shown) > LONG:
            whole = f"{len(value):,} values" if isinstance(value, list | tuple) else "all of it"
            body = f"{escape(shown[: LONG // 2])} … {_folded(whole, body)}"
        rows.append(f"<div><dt>{escape(str(name))}</dt><dd dir=auto>{body}</dd></div>")
    return f"<dl class=settings>{''.join(rows)}</dl>"


def _folded(title: str, body: str) -> str:
    """HTML that a click or the space key shows; no script."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _split(parts: Sequence[str]) -> tuple[str, str]:
    """The first SHOWN of them and the others, unless that is a single one, for which nobody should have to click."""
    count = SHOWN if len(parts) > SHOWN + 1 else len(parts)
    return "".join(parts[:count]), "".join(parts[count:])


def _marked(tag: str, text: str) -> str:
    """An element with text of a run, which may be in any language and direction."""
    return f"<{tag}{_language(text)}>{escape(text)}</{tag}>"


def _language(text: str) -> str:
    """The attributes of text of which only the script tells the language: what fonts, line breaks and voices go by.

    Han characters without others of their neighbours count as Chinese. Where few are East Asian, the language is
    unknown (""), and not the page's English.
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


def _visible(token: str) -> str:
    """A token without the blank before it; one that is nothing but blanks or line breaks by signs."""
    return token.strip(" ").replace("\n", "↵") or "␣"


COLOURS = "{}@media(prefers-color-scheme:dark){{{}}}".format(
    *("".join(f".c{number}{{color:{colour}}}" for number, colour in enumerate(p["colours"])) for p in PALETTES)
)
STYLE = """
:root{--paper:#fbfbf9;--card:#fff;--ink:#1d2321;--soft:#5d6864;--line:#e2e5e1;--accent:#1b6e53;--fill:#dfece6;
--right:#d5eddf;--right-ink:#0f5c3d;--wrong:#fbe3d3;--wrong-ink:#8f3d0c;--bar:#b9c3be;--han:serif}
@media(prefers-color-scheme:dark){:root{--paper:#141816;--card:#1b201e;--ink:#e6ebe8;--soft:#9aa7a1;--line:#2d3532;
--accent:#6cc5a1;--fill:#22362e;--right:#1d4533;--right-ink:#9fe3c2;--wrong:#4a2c1b;--wrong-ink:#f3b893;--bar:#4d5954}}
:lang(zh){--han:"Songti SC","Noto Serif CJK SC","Noto Serif SC",SimSun}
:lang(ja){--han:"Hiragino Mincho ProN","Noto Serif CJK JP","Noto Serif JP","Yu Mincho"}
:lang(ko){--han:AppleMyungjo,"Noto Serif CJK KR","Noto Serif KR",Batang}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:50rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
.mark{margin:0;color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.09em;text-transform:uppercase}
h1{margin:.15rem 0 .2rem;font-size:clamp(1.6rem,5vw,2.2rem);line-height:1.15;letter-spacing:-.02em}
.sub{margin:0;color:var(--soft);max-width:42rem}
h2{margin:3rem 0 .3rem;font-size:1.2rem;letter-spacing:-.01em}
.note{margin:0 0 1rem;color:var(--soft);font-size:.9rem;max-width:42rem}
dl,dd,ul,ol{margin:0;padding:0;list-style:none}
.tiles{display:flex;flex-wrap:wrap;margin:1.75rem 0 0;gap:1px;
background:var(--line);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.tiles div{flex:1 1 8.5rem;background:var(--card);padding:.75rem .9rem}
.tiles dt{color:var(--soft);font-size:.78rem}
.tiles dd{font-size:1.3rem;font-weight:600;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
picture,img{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.legend i{flex:none;width:1.3rem;border-top:3px solid}.legend .bar{border-top:2px dashed var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr));gap:1rem 1.5rem;align-items:start}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top}
.entries{display:grid;gap:.8rem}.entries small{color:var(--soft)}
.entries p{margin:.1rem 0 0;font-family:ui-serif,Georgia,"Times New Roman",var(--han),serif}
.bars li{display:grid;grid-template-columns:minmax(8rem,15rem) minmax(0,1fr) 4.2rem;gap:.75rem;align-items:center;
padding:.45rem 0}
.bars small{display:block;color:var(--soft);font-size:.78rem;line-height:1.3}
.bars i{background:var(--line);border-radius:4px;height:.85rem;overflow:hidden}
.bars b{display:block;height:100%;background:var(--bar);border-radius:4px}
.bars em{font-style:normal;text-align:right;font-variant-numeric:tabular-nums}
.bars .own b{background:var(--accent)}.bars .own em,.bars .own span{font-weight:600}.bars .own small{font-weight:400}
.confusion{font-size:.85rem}
.confusion th{font-weight:500;min-width:4rem;max-width:14rem;padding-right:.6rem;vertical-align:middle}
.confusion thead th{color:var(--soft);vertical-align:bottom;text-align:center;padding:.3rem}
.confusion thead th{min-width:0;overflow-wrap:normal}
.confusion .tall span{writing-mode:vertical-rl;text-orientation:sideways;transform:rotate(180deg);max-height:14rem;
overflow-wrap:anywhere}
.confusion .corner{text-align:left;vertical-align:bottom;color:var(--soft);font-size:.75rem;white-space:nowrap}
.confusion td{min-width:2.9rem;padding:.5rem .4rem;text-align:center;border:2px solid var(--paper);border-radius:6px}
.confusion .hit{background:color-mix(in srgb,var(--accent) calc(var(--part)*.62),var(--card))}
.confusion .miss{background:color-mix(in srgb,var(--wrong-ink) calc(var(--part)*.62),var(--card))}
.confusion .sum{color:var(--soft)}
.samples{display:grid;gap:1rem}
.samples article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.1rem .6rem}
.samples p{margin:0 0 .7rem;font-family:ui-serif,Georgia,"Times New Roman",var(--han),serif;
font-size:1.05rem;line-height:1.7}
.samples s{color:var(--soft);text-decoration:none;font:.72rem ui-monospace,Menlo,Consolas,monospace}
mark{padding:.08em .3em;border-radius:5px}
mark.right{background:var(--right);color:var(--right-ink)}mark.wrong{background:var(--wrong);color:var(--wrong-ink)}
.guesses{width:100%;table-layout:fixed}
.guesses th{width:30%;font-weight:400}
.guesses th,.guesses td{border-top:1px solid var(--line);padding:.3rem .5rem .3rem 0}
.guesses ol{display:flex;flex-wrap:wrap;gap:.1rem 1rem}.guesses small{color:var(--soft)}.guesses .truth{font-weight:600}
blockquote{margin:0 0 1rem;padding:.8rem 1.1rem;background:var(--card);border:1px solid var(--line);border-radius:10px;
white-space:pre-wrap;font-family:ui-serif,Georgia,"Times New Roman",var(--han),serif}
.settings{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));column-gap:2rem;font-size:.86rem}
.settings div{display:flex;justify-content:space-between;gap:1rem;padding:.25rem 0;border-bottom:1px solid var(--line)}
.settings dt{color:var(--soft);min-width:5rem}
.settings dd{text-align:right;font-variant-numeric:tabular-nums}
details{border-bottom:1px solid var(--line);padding:.15rem 0}
details[open]{padding-bottom:1rem}
.samples details,.settings details{border:0;padding:0}
.samples+details{margin-top:1rem}.samples+details .samples{margin-top:.6rem}
.settings details summary{padding:.1rem 0;color:var(--accent)}
summary{cursor:pointer;padding:.4rem 0;font-weight:500;font-size:.92rem}
@media(max-width:34rem){main{padding-left:1rem;padding-right:1rem;padding-top:1.5rem}
.bars li{grid-template-columns:minmax(0,1fr) 4.2rem}.bars li span{grid-column:1/-1}
.settings{grid-template-columns:1fr}}
@media print{details::details-content{content-visibility:visible;height:auto}section{break-inside:avoid}}
"""
