"""What a model looks at in one text, and what its answer is owed to: `./launch.sh look RUN|hf:ID --text "…"`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from espalier import progress
from espalier.commands.asked_model import AskedModel
from espalier.commands.look import pages
from espalier.errors import UserError

SHOWN = 5
"""Words that the terminal names."""


@dataclass(frozen=True)
class LookConfig(AskedModel):
    """Look inside: `look RUN --text "…"` writes a page, and beside it the numbers (.npz).

    Explained is the class of a text, the tag of a word, the answer to a question, the relevance to a query, what a
    masked LM puts at [MASK], or the next word of a causal LM.
    """

    text: str | None = None
    """What the model reads."""
    text_b: str | None = None
    """The second text, of a classifier of pairs."""
    query: str | None = None
    """What a ranker judges the text by."""
    question: str | None = None
    """What is answered out of the text."""
    target: str | None = None
    """Class, tag, word or answer whose score is explained; unset = the most probable one."""
    word: str | None = None
    """The word whose tag is explained; unset = that of the surest entity."""
    lens: str | None = None
    """A tuned lens (`look lens`) by which the layers are read; unset = the logit lens."""
    output: str = "look.html"
    """The page; the numbers go beside it, look.npz."""

    def __post_init__(self):
        if self.text is None:
            raise UserError('no --text given: name what the model is to read, for instance --text "a moving film"')
        pages.page_path(self.output)


def main(config: LookConfig) -> dict[str, Any]:
    """Write page and numbers; returns the `--json` object."""
    from espalier.look.looked import look

    assert config.text is not None
    with progress.waiting(f"loading {config.model}"):
        model = config.loaded()
    given = {name: getattr(config, name) for name in ("target", "text_b", "query", "question", "word", "lens")}
    seen = look(model, config.text, **given)
    path, numbers = seen.write(pages.page_path(config.output))
    asked, why = seen.asked, seen.attribution
    best = sorted(seen.owed, key=lambda one: -abs(one[1]))[:SHOWN]
    rows = {asked.what: f"{asked.name.strip()} ({100 * asked.probability:.1f} %)"}
    rows["owed to"] = ", ".join(f"{word} {value:+.2f}" for word, value in best)
    progress.block(rows | {"page": str(path), "numbers": str(numbers)})
    return {
        "asked": asked.what,
        "answer": asked.name,
        "probability": asked.probability,
        "words": asked.texts,
        "attribution": {name: values.tolist() for name, values in why.words.items()},
        "gap": why.gap,
        "page": str(path),
    }
