"""Train a tuned lens: `./launch.sh look lens RUN|hf:ID --data.validation 'text/*.txt' --output lens.safetensors`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier import progress
from espalier.commands.asked_model import AskedModel
from espalier.errors import UserError
from espalier.pretraining.config import TextFiles


@dataclass(frozen=True)
class LensConfig(AskedModel):
    """Train a tuned lens of a language model: `look lens RUN --data.validation 'text/*.txt'` learns, for each layer, a
    map by which the model's head understands its stream. `look RUN --text T --lens lens.safetensors` reads by it.

    The model itself is not trained.
    """

    data: TextFiles = field(default_factory=TextFiles)
    steps: int = 250
    """Of 8 rows each."""
    length: int = 128
    """Tokens of a row."""
    rows: int = 2000
    """Rows at most; a tenth of them is measured on."""
    seed: int = 0
    """Of the order of the rows."""
    output: str = "lens.safetensors"
    """Where the maps go."""

    def __post_init__(self):
        if self.steps < 1 or self.length < 16 or self.rows < 16:
            raise UserError(
                f"steps={self.steps}, length={self.length}, rows={self.rows}: give at least 1 step, and 16 rows of 16 "
                "tokens"
            )
        path = Path(self.output).expanduser()
        if path.suffix != ".safetensors" or not path.absolute().parent.is_dir():
            raise UserError(f"--output {self.output}: name a .safetensors file in a folder that is there")


def main(config: LensConfig) -> dict[str, Any]:
    """Write the lens; returns the `--json` object."""
    from espalier.look.rows import text_rows
    from espalier.look.tuned_lens import save, tune
    from espalier.models.heads import LANGUAGE_MODELS
    from espalier.pretraining.evaluate import first_tokens

    with progress.waiting(f"loading {config.model}"):
        model = config.loaded()
    if model.head not in LANGUAGE_MODELS:
        raise UserError(f"a lens is trained on a language model, and this one has the head {model.head!r}")
    limit = model.config.max_length
    length = config.length if limit is None else min(config.length, limit)
    with progress.waiting("reading text"):
        ids = first_tokens(model, config.data, config.rows * length)
    rows = text_rows(model, ids, length, config.rows)
    with progress.waiting("training the lens") as said:
        found = tune(model, rows, config.steps, config.seed, said)
    path = Path(config.output).expanduser()
    save(path, found.lens)
    names = ["embeddings", *(f"layer {layer}" for layer in range(1, len(found.before_L)))]
    shown = {
        name: f"{before:.3f} → {after:.3f} nats from the end"
        for name, before, after in zip(names, found.before_L, found.after_L, strict=True)
    }
    progress.block(shown | {"lens": str(path)})
    return {"before": found.before_L.tolist(), "after": found.after_L.tolist(), "lens": str(path), "rows": len(rows)}
