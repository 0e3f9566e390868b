"""See what a model looks at and what its answer is owed to: `./launch.sh look RUN|hf:ID --text "…"`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier import cli, progress
from espalier.commands.asked_model import AskedModel
from espalier.errors import UserError


@dataclass(frozen=True)
class LookConfig(AskedModel):
    """Look inside: `look RUN --text "…"` writes a page, and beside it the numbers (.npz).

    Of a classifier its class is explained, of a masked LM what it puts at [MASK], of a causal LM its next word.
    """

    text: str | None = None
    """What the model reads."""
    target: str | None = None
    """Class or word whose score is explained; unset = the most probable one."""
    output: str = "look.html"
    """The page; the numbers go beside it, look.npz."""

    def __post_init__(self):
        if self.text is None:
            raise UserError('no --text given: name what the model is to read, for instance --text "a moving film"')
        if not self.output.endswith(".html"):
            raise UserError(f"--output {self.output} is no .html file; try look.html")
        folder = Path(self.output).expanduser().absolute().parent
        if not folder.is_dir():
            raise UserError(f"--output {self.output}: there is no folder {folder}; make it first")


def main(config: LookConfig) -> dict[str, Any]:
    """Write page and numbers; returns the `--json` object."""
    import numpy as np

    from espalier.files import replacing
    from espalier.look import page
    from espalier.look.asked import ask
    from espalier.look.attention import attention
    from espalier.look.attribution import attribution

    assert config.text is not None
    with progress.waiting(f"loading {config.model}"):
        model = config.loaded()
    asked = ask(model, config.text, config.target)
    with progress.waiting("reading the heads"):
        heads = attention(model, asked)
    with progress.waiting("asking what the answer is owed to"):
        why = attribution(model, asked)
    path = Path(config.output).expanduser()
    page.write(path, config.text if len(config.text) <= 80 else f"{config.text[:79]}…", asked, why, heads)
    numbers = path.with_suffix(".npz")
    words = asked.texts
    with replacing(numbers, "wb") as file:
        arrays: dict[str, Any] = {"tokens": np.array(asked.tokens), "words": np.array(words)}
        arrays |= heads._asdict() | why.words
        np.savez_compressed(file, **arrays)
    rows = {"answer": f"{asked.name.strip()} ({asked.probability:.1%})".replace("%", " %")}
    best = np.argsort(-np.abs(why.words["integrated_gradients"]), kind="stable")[:5]
    rows["owed to"] = ", ".join(f"{words[at]} {why.words['integrated_gradients'][at]:+.2f}" for at in best)
    progress.block(rows | {"page": str(path), "numbers": str(numbers)})
    return {
        "answer": asked.name,
        "probability": asked.probability,
        "words": words,
        "attribution": {name: values.tolist() for name, values in why.words.items()},
        "gap": why.gap,
        "page": str(path),
    }


if __name__ == "__main__":
    cli.run_config(main, LookConfig, prog="look")
