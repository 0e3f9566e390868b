"""The report of a masked-LM run: masked words with the model's guesses, and the loss of word frequencies alone.

samples.json       {"samples": [{"tokens": [str], "masked": [{"index": int, "truth": str, "guesses":
                   [[str, probability]]}]}], "unigram_entropy": nats}, a token includes the space before it
                   (" word", "ing")
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from espalier.report import page
from espalier.report.figures import Bar
from espalier.report.page import SHOWN, Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport


def sections(run: RunFiles) -> list[Section]:
    """Held-out text with masked words."""
    samples = run.json("samples.json").get("samples")
    if not samples:
        return []
    masked = [slot for sample in samples for slot in sample["masked"]]
    right = sum(slot["guesses"][:1] != [] and slot["guesses"][0][0] == slot["truth"] for slot in masked)
    note = (
        "Held-out text with masked words, shown with the original words; green if the model's first guess is right "
        f"({right} of {len(masked)}). Below each text, the guesses for each masked word with their probabilities."
    )
    return [Section("Masked words", masked_words(samples), note, STYLE)]


def baseline(run: RunFiles) -> tuple[Bar, str] | None:
    """The loss of guessing by word frequencies, over the same held-out text."""
    entropy = run.json("samples.json").get("unigram_entropy")
    note = "Dashed line: the loss of a model that has learnt only the frequency of each token."
    return (Bar(f"word frequencies alone: {entropy:.2f}", entropy), note) if entropy else None


def masked_words(samples: Sequence[dict]) -> str:
    """Excerpts with masked words: the original words, green if the first guess is right, and the guesses.

    The excerpts beyond SHOWN, and the words beyond SHOWN of each, are folded.
    """
    cards = []
    for sample in samples:
        slots = {slot["index"]: slot for slot in sample["masked"]}
        whole = (slots[at]["truth"] if at in slots else token for at, token in enumerate(sample["tokens"]))
        language = page.language("".join(whole))
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
                f"<small>{escape(page.percent(probability, 0))}</small></li>"
                for word, probability in slot["guesses"]
            )
            rows.append(f"<tr><th><mark class={kind}>{escape(shown)}</mark></th><td><ol>{guesses}</ol></td></tr>")
        shown_rows, others = page.split(rows)
        tables = f"<table class=guesses>{shown_rows}</table>"
        if others:
            tables += page.folded(f"{len(rows) - SHOWN} more masked words", f"<table class=guesses>{others}</table>")
        cards.append(f"<article{language}><p>{''.join(text)}</p>{tables}</article>")
    first, others = page.split(cards)
    body = f"<div class=samples>{first}</div>"
    if others:
        body += page.folded(f"{len(cards) - SHOWN} more texts", f"<div class=samples>{others}</div>")
    return body


def _visible(token: str) -> str:
    """A token without the space before it; a token of spaces or line breaks as signs."""
    return token.strip(" ").replace("\n", "↵") or "␣"


STYLE = """
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
.samples details{border:0;padding:0}
.samples+details{margin-top:1rem}.samples+details .samples{margin-top:.6rem}
"""

REPORT = TaskReport(
    title=lambda config: "Masked language model",
    unit="masked token",
    sections=sections,
    baseline=baseline,
    pipeline="fill-mask",
    loader="AutoModelForMaskedLM",
    words="pretrained by masked language modelling",
    metric_names={"accuracy": "accuracy (masked tokens)"},
    card_settings=lambda config: {"mask rate": config.get("masking", {}).get("rate")},
)
