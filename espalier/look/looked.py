"""All that is found out about one text, and where it goes: a page, a notebook's cell, arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espalier import progress
from espalier.files import replacing
from espalier.look.asked import Asked, Wanted, ask
from espalier.look.attention import Attention, attention
from espalier.look.attribution import Attribution, attribution
from espalier.look.lens import Lens
from espalier.look.lens import lens as read_layers
from espalier.look.sections import attention as attention_section
from espalier.look.sections import attribution as attribution_sections
from espalier.look.sections import lens as lens_section
from espalier.look.tuned_lens import load
from espalier.predict.loaded import LoadedModel
from espalier.report import page
from espalier.report.inline import Page

LONG = 80
"""Characters of a title."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What a model looks at in a text, and what its answer is owed to. The last value of a notebook's cell is shown."""

    model: LoadedModel
    text: str
    asked: Asked
    attribution: Attribution
    attention: Attention
    lens: Lens

    @property
    def owed(self) -> list[tuple[str, float]]:
        """Each word with what it adds to the score (integrated gradients), in the order of the text."""
        values_W = self.attribution.words["integrated_gradients"]
        return list(zip(self.asked.texts, map(float, values_W), strict=True))

    def arrays(self) -> dict[str, np.ndarray]:
        """Every figure by name: probabilities_LNTS, integrated_gradients, chance_E, …"""
        found: dict[str, Any] = {"tokens": np.array(self.asked.tokens), "words": np.array(self.asked.texts)}
        found |= self.attention._asdict() | self.attribution.words | self.lens._asdict()
        found |= {f"{kind}_{name}": values for kind in ("deletion", "insertion") for name, values in self._curves(kind)}
        return found

    def write(self, path: Path) -> tuple[Path, Path]:
        """Write the page, and the arrays beside it as .npz; returns both paths."""
        with replacing(path) as file:
            file.write(self.html())
        numbers = path.with_suffix(".npz")
        with replacing(numbers, "wb") as file:
            np.savez_compressed(file, **self.arrays())  # type: ignore[arg-type]
        return path, numbers

    def html(self) -> str:
        """The page, which loads nothing from elsewhere."""
        asked, why = self.asked, self.attribution
        shown = [(asked.what, asked.name.strip() or repr(asked.name)), ("probability", page.percent(asked.probability))]
        shown += [("score", page.number(why.score)), ("of an empty text", page.number(why.baseline_score))]
        sections = [
            *attribution_sections.sections(asked, why),
            lens_section.section(asked, self.lens, self.model.tokenizer),
            attention_section.section(asked, self.attention),
        ]
        return page.page_of(
            self._title, "What the model looks at, and what its answer is owed to", sections, page.tiles(shown)
        )

    @property
    def _title(self) -> str:
        return self.text if len(self.text) <= LONG else f"{self.text[: LONG - 1]}…"

    def _curves(self, kind: str) -> Any:
        return getattr(self.attribution, kind).items()

    def __repr__(self) -> str:
        """One line: its arrays would fill a screen, or a notebook's file."""
        asked = self.asked
        return f"Looked({self._title!r}: {asked.what} {asked.name.strip()!r}, {asked.probability:.1%})"

    def _repr_html_(self) -> str:
        return Page(self.html())._repr_html_()


def look(
    model: LoadedModel,
    text: str,
    *,
    target: str | None = None,
    text_b: str | None = None,
    query: str | None = None,
    question: str | None = None,
    word: str | None = None,
    lens: str | None = None,
) -> Looked:
    """What a model looks at in a text, what each layer would say, and which words its answer is owed to.

    Explained is its class, the tag of a word, its answer to a question, its relevance to a query, the word at the first
    [MASK], or the next word; `target` names another than the most probable. text_b: the second text of a pair. word:
    whose tag. lens: the file of a tuned lens, by which layers are read (`look lens`). UserError where the model is for
    something else, or the text or the target will not do.

    >>> import espalier
    >>> seen = espalier.look(espalier.load(run), "To be, or [MASK] to be")
    >>> seen.asked.what, len(seen.owed)
    ('word at [MASK]', 7)
    """
    tuned = None if lens is None else load(lens, model.config)
    asked = ask(model, text, Wanted(target, text_b, query, question, word))
    with progress.waiting("reading the heads"):
        heads = attention(model, asked)
    with progress.waiting("reading the layers"):
        layers = read_layers(model, asked, tuned)
    with progress.waiting("asking what the answer is owed to"):
        why = attribution(model, asked)
    return Looked(model, text, asked, why, heads, layers)
