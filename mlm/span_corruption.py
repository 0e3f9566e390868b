"""What span corruption is: the record from which runs, reports, cards and plans read it. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from espalier.pretraining.objective import Setup, TextObjective
from mlm.report import REPORT

if TYPE_CHECKING:
    from espalier.models.config import ModelConfig
    from espalier.training.step import Objective
    from mlm.config import SpanCorruptionConfig

SENTINELS = 100
"""As T5 has; where a tokenizer has none they are rows of the vocabulary behind its tokens."""


def build(setup: Setup) -> Objective:
    from mlm.spans import span_corruption_objective, vocabulary_of

    config: SpanCorruptionConfig = setup.config
    known = vocabulary_of(setup.tokenizer, setup.model, config.spans, config.data.sequence_length)
    return span_corruption_objective(setup.model, config.spans, known, execution=setup.execution)


def own_sentinels(tokenizer: Any, model: ModelConfig) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1> …; of a tokenizer without, the last SENTINELS of a model that has room."""
    from espalier.data.tokenizer import vocabulary_size

    known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    named = [known[f"<extra_id_{number}>"] for number in range(len(known)) if f"<extra_id_{number}>" in known]
    first = vocabulary_size(tokenizer)
    return named or list(range(first, min(first + SENTINELS, model.vocab_size)))


def fitted(model: ModelConfig, tokenizer: Any) -> ModelConfig:
    """With rows for the sentinels that the tokenizer has not, and its padding token as what a text begins with."""
    from espalier.data.tokenizer import special_ids

    more = 0 if own_sentinels(tokenizer, model) else SENTINELS
    return replace(model, vocab_size=model.vocab_size + more, decoder_start_token_id=special_ids(tokenizer).pad)


def flops(config: SpanCorruptionConfig, model: ModelConfig) -> float:
    """Of a row."""
    from espalier.models.counts import flops_per_pair
    from mlm.spans import lengths

    return flops_per_pair(model, *lengths(config.spans, config.data.sequence_length))


SPAN_CORRUPTION = TextObjective(
    name="span_corruption",
    head="seq2seq_lm",
    report=replace(
        REPORT,
        title=lambda config: "Span corruption",
        unit="token of hidden spans",
        sections=lambda run: [],
        tiles=lambda run: [],
        baseline=lambda run: None,
        pipeline="text2text-generation",
        loader="AutoModelForSeq2SeqLM",
        words="an encoder-decoder pretrained by span corruption",
        card_settings=lambda config: {
            "hidden part of the tokens": config.get("spans", {}).get("density"),
            "mean length of a span": config.get("spans", {}).get("mean_length"),
        },
    ),
    command="mlm",
    causal=False,
    layout="shifted",
    build=build,
    fitted=fitted,
    flops=flops,
)
