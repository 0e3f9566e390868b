"""Where the difference between two texts is made: `./launch.sh look patch RUN|hf:ID --text A --other B`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from espalier import progress
from espalier.commands.asked_model import AskedModel
from espalier.commands.look import pages
from espalier.errors import UserError


@dataclass(frozen=True)
class PatchConfig(AskedModel):
    """Activation patching: `look patch RUN --text A --other B` writes a page that shows where in the model the
    difference between the answers to two texts is made.

    The texts have as many tokens; what the model computed on the first is put into its pass over the second.
    """

    text: str | None = None
    """The first text."""
    other: str | None = None
    """The second, which differs in a word or two."""
    target: str | None = None
    """The answer to the first; unset = the most probable."""
    other_target: str | None = None
    """And to the second."""
    word: str | None = None
    """Of a tagger: the word whose tag is compared, in both texts."""
    output: str = "patch.html"
    """The page; the numbers go beside it, patch.npz."""

    def __post_init__(self):
        if self.text is None or self.other is None:
            raise UserError('two texts are compared: give --text "…" and --other "…"')
        pages.page_path(self.output)


def main(config: PatchConfig) -> dict[str, Any]:
    """Write page and numbers; returns the `--json` object."""
    from espalier.look.asked import Wanted, ask
    from espalier.look.patching import patching
    from espalier.look.sections import patching as page

    assert config.text is not None and config.other is not None
    with progress.waiting(f"loading {config.model}"):
        model = config.loaded()
    first = ask(model, config.text, Wanted(config.target, word=config.word))
    second = ask(model, config.other, Wanted(config.other_target, word=config.word))
    with progress.waiting("patching") as said:
        found = patching(model, first, second, said)
    figures = {
        "first text": first.name.strip(),
        "second text": second.name.strip(),
        "difference, first": f"{found.first:.3f}",
        "difference, second": f"{found.second:.3f}",
    }
    subtitle = f"against “{config.other}”: where the difference is made"
    sections = page.sections(first, second, found)
    arrays = {place.replace(".", "_"): values for place, values in found.restored.items()}
    written = pages.write(config.output, config.text, subtitle, sections, figures.items(), arrays)
    progress.block(figures | written)
    return {
        "answers": [first.name, second.name],
        "differences": [found.first, found.second],
        "restored": {place: values.tolist() for place, values in found.restored.items()},
        "page": written["page"],
    }
