"""Which attention heads a model needs: `./launch.sh look heads RUN|hf:ID --data.validation F`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from espalier import progress
from espalier.commands import evaluate
from espalier.commands.asked_model import AskedModel
from espalier.commands.look import pages
from espalier.errors import UserError


@dataclass(frozen=True)
class HeadsConfig(AskedModel):
    """Which heads matter: `look heads RUN --data.validation F` writes a page with each head's importance, and what is
    left of the model as heads are taken out.

    A classifier is judged on labelled texts, a language model on running text.
    """

    task: str | None = None
    """The task whose files are read; unset = that of the run, or the first that trains such a head."""
    rows: int = 512
    """Texts at most."""
    length: int = 128
    """Tokens of a row of running text."""
    output: str = "heads.html"
    """The page; the numbers go beside it, heads.npz."""

    def __post_init__(self):
        if self.rows < 1 or self.length < 16:
            raise UserError(f"rows={self.rows}, length={self.length}: give at least 1 row of 16 tokens")
        pages.page_path(self.output)


def main(config: Any) -> dict[str, Any]:
    """Write page and numbers; returns the `--json` object. config: HeadsConfig with the settings of the task's data."""
    from espalier.look import heads
    from espalier.look.rows import labelled_rows, text_rows
    from espalier.look.sections import heads as page
    from espalier.models.heads import LANGUAGE_MODELS
    from espalier.predict.loaded import on_all_devices

    with progress.waiting(f"loading {config.model}"):
        model = config.loaded()
    heads.check(model)
    if model.head in LANGUAGE_MODELS:
        from espalier.pretraining.evaluate import first_tokens

        limit = model.config.max_length
        length = config.length if limit is None else min(config.length, limit)
        rows = text_rows(model, first_tokens(model, config.data, config.rows * length), length, config.rows)
        of = "Tokens that are right"
    else:
        from finetune.tasks.classify.examples import read_validation

        part = read_validation(config.data, model)
        rows = labelled_rows(part.encoded[: config.rows], part.labels[: config.rows])
        of = "Accuracy"
    with progress.waiting("judging the heads") as said, on_all_devices(model) as model:
        importance_LN = heads.importance(model, rows)
        curves = heads.pruned(model, rows, importance_LN, said)
    whole, none = ((found.nats_S[at], found.right_S[at]) for found, at in ((curves["least"], 0), (curves["least"], -1)))
    half = curves["least"].removed_S.searchsorted(importance_LN.size / 2)
    kept = float(curves["least"].right_S[half])
    figures = {
        "heads": f"{importance_LN.size}",
        of.lower(): f"{100 * whole[1]:.1f} %",
        "without the less important half": f"{100 * kept:.1f} %",
        "without any": f"{100 * none[1]:.1f} %",
    }
    arrays = {"importance_LN": importance_LN, "removed_S": curves["least"].removed_S}
    for name, found in curves.items():
        arrays |= {f"nats_{name}": found.nats_S, f"right_{name}": found.right_S}
    subtitle = f"Which attention heads it needs, on {len(rows):,} texts"
    sections = page.sections(importance_LN, curves, of)
    written = pages.write(config.output, config.model, subtitle, sections, figures.items(), arrays)
    progress.block(figures | written)
    return {
        "importance": importance_LN.tolist(),
        "removed": curves["least"].removed_S.tolist(),
        "loss": curves["least"].nats_S.tolist(),
        "right": curves["least"].right_S.tolist(),
        "page": written["page"],
    }


def command(arguments: Sequence[str]) -> None:
    """`look heads MODEL [flags]`: the flags are those of the data of the model's task."""
    evaluate.command(arguments, HeadsConfig, main, "look heads")
