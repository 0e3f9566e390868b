"""`./launch.sh prepare`: `python -m espalier.data.prepare --data.files 'text/*.txt'`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from espalier import cli
from espalier.data.config import DataConfig
from espalier.data.prepare import prepare
from espalier.data.prepare.planning import cache_folder, filtered
from espalier.errors import UserError


@dataclass(frozen=True)
class PrepareConfig:
    """Train or load a tokenizer and tokenize text, so that a pretraining run with the same flags starts at once."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: int = 30522
    """Size of a tokenizer that is trained here."""
    causal: bool = False
    """For `clm` instead of `mlm`: a byte-level tokenizer then needs no [MASK]."""
    verify: bool = False
    """Compare everything that is prepared with its SHA-256, too; exit code 2 where a file is damaged."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: PrepareConfig) -> dict:
    """Prepare the text and say what is there."""
    from espalier.data.summary import summarise

    prepared = prepare(config.data, config.vocab_size, for_masked_lm=not config.causal)
    if config.verify:
        stores = [*prepared.train.values(), *prepared.validation.values()]
        damaged = [str(path) for store in stores for path in store.damaged()]
        if damaged:
            raise UserError(
                f"{len(damaged)} of the prepared files are damaged: {', '.join(damaged[:5])}; delete their folders and "
                "prepare the text again"
            )
        print(f"verified: {len(stores)} stores and their tokenizer are what was written")
    return summarise(prepared, config.data, config.causal, _training_texts(config.data))


def _training_texts(config: DataConfig) -> Iterator[str]:
    """The documents of the training text, source after source."""
    from espalier.data.documents import documents
    from espalier.data.sources import open_sources

    sides = open_sources(config, cache_folder(config), lambda source: filtered(source, config))
    return (item.text for source in sides.train.values() for item in documents(source))


if __name__ == "__main__":
    cli.run_config(main, PrepareConfig, prog="prepare")
