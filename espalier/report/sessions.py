"""Where the time of a run went: a bar for each of its starts, and a table of all together (sessions.jsonl)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from espalier.goodput import PARTS, Session, counted, goodput, read_sessions, short
from espalier.progress import plural
from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles

SHOWN = 12
"""Bars that are not folded: those of the last sessions."""
COLOURS = ("var(--accent)", "#c8540f", "#8a5a9e", "#3f63b5", "#d9a514", "#4f9fb8", "var(--bar)")
"""Of the PARTS, in their order."""
STYLE = (
    ".went li{display:grid;grid-template-columns:minmax(8rem,14rem) minmax(0,1fr);gap:.75rem;align-items:center;"
    "padding:.25rem 0;font-size:.85rem}"
    ".went small{display:block;color:var(--soft)}"
    ".went div{display:flex;height:.85rem;border-radius:4px;overflow:hidden}"
    ".key{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;font-size:.85rem;margin:.5rem 0 1rem}"
    ".key i,.parts i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.4rem}"
    ".parts td,.parts th{padding:.25rem 1.2rem .25rem 0;border-bottom:1px solid var(--line);font-weight:400}"
    ".parts td:first-child{white-space:nowrap}.parts .n{text-align:right;white-space:nowrap}"
    "@media(max-width:34rem){.went li{grid-template-columns:1fr;gap:.2rem}}"
) + "".join(
    f".went .{name},.key .{name},.parts .{name}{{background:{c}}}" for name, c in zip(PARTS, COLOURS, strict=True)
)


def session_sections(run: RunFiles) -> list[Section]:
    """Nothing for a run that is older than sessions.jsonl."""
    sessions = read_sessions(run.path / "sessions.jsonl")
    found = goodput(sessions)
    if found is None or found.fraction is None:
        return []
    shares = list(counted(sessions))
    longest = max(sum(each.values()) for each in shares) or 1.0
    bars = [_bar(*each, longest) for each in zip(range(1, len(sessions) + 1), sessions, shares, strict=True)]
    body = f"<ul class=went>{''.join(bars[-SHOWN:])}</ul>"
    if earlier := bars[:-SHOWN]:
        body = page.folded(f"{plural(len(earlier), 'earlier start')}", f"<ul class=went>{''.join(earlier)}</ul>") + body
    there = [name for name in PARTS if found.seconds[name] > 0]
    key = "".join(f"<li><i class={name}></i>{name}</li>" for name in there)
    rows = "".join(
        f"<tr><td><i class={name}></i>{name}</td><td class=n>{short(found.seconds[name])}</td>"
        f"<td class=n>{page.percent(found.seconds[name] / found.total)}</td><td>{escape(PARTS[name])}</td></tr>"
        for name in there
    )
    table = f"<div class=scroll><table class=parts>{rows}</table></div>"
    note = f"{page.percent(found.fraction)} of {short(found.total)} became training that counts (goodput)"
    if found.starts > 1:
        note += f", over {found.starts} starts, with {short(found.between)} between them in which nothing ran"
    if found.lost_steps:
        note += f"; {plural(found.lost_steps, 'step')} had to be done again"
    if found.unrecorded:
        note += f". Of the first {plural(found.unrecorded, 'step')} no times are known"
    return [Section("Where the time went", f"{body}<ul class=key>{key}</ul>{table}", f"{note}.", STYLE)]


def _bar(number: int, session: Session, shares: Mapping[str, float], longest: float) -> str:
    total = sum(shares.values())
    end = {"failed": ", failed", "": ", killed or running"}.get(session.end, "")
    said = ", ".join(f"{name} {short(value)}" for name, value in shares.items() if value > 0)
    parts = "".join(
        f'<span class={name} style="width:{100 * value / longest:.2f}%" title="{name} {short(value)}"></span>'
        for name, value in shares.items()
        if value > 0
    )
    name = f"start {number}: steps {session.start:,} to {session.step:,}<small>{short(total)}{end}</small>"
    return f'<li><span>{name}</span><div role=img aria-label="{said}">{parts}</div></li>'
