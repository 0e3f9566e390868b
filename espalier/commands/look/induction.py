"""Heads that continue what was there before, over a run: `./launch.sh look induction RUN`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from espalier import progress
from espalier.commands.asked_model import AskedModel
from espalier.commands.evaluate import PREFIX
from espalier.commands.look import pages


@dataclass(frozen=True)
class InductionConfig(AskedModel):
    """Induction heads of a decoder: `look induction RUN` writes a page with each head's score on repeated random
    tokens, at every checkpoint of the run (or at --step).

    A run keeps as many checkpoints as --checkpoint.keep says.
    """

    output: str = "induction.html"
    """The page; the numbers go beside it, induction.npz."""

    def __post_init__(self):
        pages.page_path(self.output)


def main(config: InductionConfig) -> dict[str, Any]:
    """Write page and numbers; returns the `--json` object."""
    from dataclasses import replace

    import numpy as np

    from espalier.look.induction import induction
    from espalier.look.sections import induction as page

    with progress.waiting(f"loading {config.model}") as said:
        steps: list[int | None] = [config.step]
        if config.step is None and not config.model.startswith(PREFIX):
            from espalier.training.fallback import sound_steps

            steps = [*sound_steps(config.model)] or [None]
        found = {}
        for step in steps:
            said(f"step {step}" if step is not None else "one state")
            found[step] = induction(replace(config, step=step).loaded())
    last = found[steps[-1]]
    layer, head = np.unravel_index(last.score_LN.argmax(), last.score_LN.shape)
    figures = {
        "the strongest": f"layer {layer + 1}, head {head + 1}",
        "its score": f"{last.score_LN.max():.3f}",
        "loss, first half": f"{last.first:.3f}",
        "loss, second half": f"{last.second:.3f}",
    }
    arrays = {
        "steps": np.array([-1 if step is None else step for step in steps]),
        "score_SLN": np.stack([one.score_LN for one in found.values()]),
        "previous_SLN": np.stack([one.previous_LN for one in found.values()]),
        "losses_S2": np.array([(one.first, one.second) for one in found.values()]),
    }
    subtitle = "Heads that continue what was there before"
    written = pages.write(config.output, config.model, subtitle, page.sections(found), figures.items(), arrays)
    progress.block(figures | written)
    return {
        "steps": steps,
        "score": [one.score_LN.tolist() for one in found.values()],
        "first": last.first,
        "second": last.second,
        "page": written["page"],
    }
