"""What the model would say after each of its layers."""

from __future__ import annotations

from html import escape

from transformers import PreTrainedTokenizerFast

from espalier.look.asked import Asked
from espalier.look.lens import Lens
from espalier.report import page
from espalier.report.page import Section

SHOWN = 256
"""Tokens of the table; of a longer text the last."""


def section(asked: Asked, found: Lens, tokenizer: PreTrainedTokenizerFast) -> Section:
    layers = len(found.chance_E)
    rows = [(_after(at), float(found.chance_E[at]), "") for at in reversed(range(layers))]
    body = f"<h3>“{escape(asked.name.strip())}” after each layer</h3>{page.bars(rows)}"
    note = (
        "The model's own head reads the stream after each layer, through a map that was trained for it (the tuned "
        "lens, Belrose et al. 2023)."
        if found.tuned
        else "The model's own head reads the stream after each layer, as if the others were not there (the logit lens, "
        "nostalgebraist 2020). Early layers need not speak the head's language: little there does not mean that "
        "little is known there; a tuned lens (the command look lens) learns to translate."
    )
    if len(found.places_P):
        body += _table(asked, found, tokenizer)
    return Section("What each layer would say", body, note, STYLE)


def _table(asked: Asked, found: Lens, tokenizer: PreTrainedTokenizerFast) -> str:
    first = max(0, len(found.places_P) - SHOWN)
    names: dict[int, str] = {}

    def word(token: int) -> str:
        if token not in names:
            names[token] = str(tokenizer.decode([token])).strip() or "␣"
        return names[token]

    head = "".join(
        f"<th scope=col{page.language(asked.tokens[at])}>{escape(asked.tokens[at].strip() or '␣')}</th>"
        for at in found.places_P[first:]
    )
    rows = []
    for layer in reversed(range(len(found.chance_E))):
        cells = []
        for place in range(first, len(found.places_P)):
            best = [
                (word(int(token)), float(chance))
                for token, chance in zip(found.ids_EPK[layer, place], found.chances_EPK[layer, place], strict=True)
            ]
            all_of_them = ", ".join(f"{text} {page.percent(chance)}" for text, chance in best)
            said = (
                f"{all_of_them}; what is said in the end: {page.percent(found.final_EP[layer, place])}, "
                f"{found.divergence_EP[layer, place]:.2f} nats from it"
            )
            cells.append(
                f"<td style='--part:{100 * best[0][1]:.0f}%' title='{escape(said, quote=True)}'"
                f"{page.language(best[0][0])}>{escape(best[0][0])}</td>"
            )
        rows.append(f"<tr><th scope=row>{_after(layer)}</th>{''.join(cells)}</tr>")
    cut = f" Of {len(found.places_P):,} the last {SHOWN} are shown." if first else ""
    return (
        "<h3>The most probable word</h3><p class=note>Columns are the tokens at which it is read: masks, or of a "
        "decoder every token, under which stands what would follow. The stronger the ground, the more probable."
        f"{cut}</p>"
        f"<div class=scroll tabindex=0><table class=lens><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _after(layer: int) -> str:
    return f"layer {layer}" if layer else "embeddings"


STYLE = """
h3{font-size:.95rem;margin:1rem 0 .3rem}
.lens th,.lens td{padding:.25rem .5rem;white-space:nowrap;font-weight:400;border-bottom:1px solid var(--line)}
.lens td{background:color-mix(in srgb,#1b8a5a var(--part),transparent)}
.lens thead th{color:var(--soft)}
.lens tbody th{position:sticky;left:0;background:var(--paper);color:var(--soft)}
"""
