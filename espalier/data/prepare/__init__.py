"""Text → tokenizer → tokens on disk, as a pretraining run reads them; `python -m espalier.data.prepare` is the command.

What is written is keyed by the fingerprints of the text and of the tokenizer: the same inputs are tokenized once,
however many runs use them, a changed tokenizer never meets the tokens of another, and an interrupted preparation goes
on where it stopped.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from espalier import progress
from espalier.data.config import DataConfig
from espalier.data.prepare.planning import plan
from espalier.data.prepare.tokens import write_tokens
from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.data.store import TokenStore

MOST_UNKNOWN = 0.001
"""The share of [UNK] above which people are warned."""
LOOKED_AT = 2**22
"""Tokens of a store among which [UNK] is counted."""


class Prepared(NamedTuple):
    """What a pretraining run reads."""

    tokenizer: PreTrainedTokenizerFast
    train: dict[str, TokenStore]
    """By the name of the source; "text" where there is one without a name."""
    validation: dict[str, TokenStore]
    """By the name of the source it was held out of; "validation" where it was given."""
    fingerprints: dict[str, str]
    """SHA-256 of `tokenizer`, `train` and `validation`: the same values, the same tokens."""
    words: dict[str, str]
    """The segmenter of each script by which word starts are stored (data.words); {} where they are not."""


def prepare(
    config: DataConfig,
    vocab_size: int,
    *,
    for_masked_lm: bool,
    of_weights: PreTrainedTokenizerFast | None = None,
    whole_words: bool = False,
    words: dict[str, str] | None = None,
) -> Prepared:
    """Tokens of the training and the held-out text, from the cache if they are there.

    The tokenizer is `of_weights`, that of the initial weights, because weights and tokens belong together; else
    config.tokenizer, else one of at most vocab_size tokens, trained on the training text alone. UserError where
    config.tokenizer is not that of the weights, and where nothing is left of a source.
    whole_words: whole words are masked, so that an unset config.words means the installed segmenters.
    words: the segmenters of a resumed run, {} where it had none; UserError where others are installed.
    """
    made = plan(
        config, vocab_size, for_masked_lm=for_masked_lm, of_weights=of_weights, whole_words=whole_words, words=words
    )
    stores = {
        side: {name: write_tokens(config, made, side, name) for name in sources} for side, sources in made.sides.items()
    }
    for store in chain.from_iterable(found.values() for found in stores.values()):
        _check_any_tokens(store, config)
    for store in stores["train"].values():
        _warn_of_unknown(store, made.tokenizer)
    return Prepared(made.tokenizer, **stores, fingerprints=made.fingerprints, words=made.words)


def _warn_of_unknown(store: TokenStore, tokenizer: PreTrainedTokenizerFast) -> None:
    """One line where more than MOST_UNKNOWN of the tokens at the store's beginning are [UNK]."""
    import numpy as np

    if tokenizer.unk_token_id is None:
        return
    ids = store.take(np.arange(min(store.manifest["tokens"], LOOKED_AT)))
    share = float(np.mean(ids == tokenizer.unk_token_id))
    if share > MOST_UNKNOWN:
        progress.say(
            f"warning: {share:.2%} of the tokens of {store.label} are {tokenizer.unk_token}, which a model cannot tell "
            "apart; train a tokenizer with --data.alphabet 1 or a larger vocabulary, or --data.tokenizer-kind bpe, "
            "which knows every character (`prepare` shows each script)"
        )


def _check_any_tokens(store: TokenStore, config: DataConfig) -> None:
    counts = store.manifest
    if counts["tokens"]:
        return
    dropped = counts["filtered"] | counts["dropped"]
    if dropped:
        listed = ", ".join(f"{count:,} by {reason}" for reason, count in dropped.items())
        why, advice = f"the filters have dropped {listed}", "change --data.filters, or add text"
    elif config.validation_files:
        why, advice = "it is empty", "add text"
    else:
        why = f"it is empty or too short to hold a part of {config.validation_fraction:.4g} out"
        advice = "add text, name --data.validation-files, or change --data.validation-fraction"
    raise UserError(f"{store.label} makes no row of tokens: {why}; {advice}")
