"""What masked LM is: the record from which runs, reports, cards and plans read it. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier import progress
from espalier.errors import UserError
from espalier.files import write_json
from espalier.pretraining.objective import HeldOut, Setup, TextObjective
from espalier.task import Trained
from mlm.report import REPORT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.training.identity import Schedule
    from espalier.training.step import Objective
    from mlm.config import PretrainConfig
    from mlm.masking import Vocabulary


def build(setup: Setup) -> Objective:
    """The objective with the mask rate of its step; evaluations mask at the last step's."""
    from mlm.loss import masked_lm_objective
    from mlm.masking import mask_batch, own_masking, rate_at

    config: PretrainConfig = setup.config
    heads = config.attention.entropy != 0
    config.attention.check(setup.model.num_hidden_layers, heads)
    mask = mask_batch if config.masking.function is None else own_masking(config.masking.function)
    return masked_lm_objective(
        setup.model,
        config.masking,
        vocabulary(setup),
        rate=lambda step, train: rate_at(config.masking, step if train else config.steps, config.steps),
        execution=setup.execution,
        mask=mask,
        attention=config.attention if heads else None,
    )


def vocabulary(setup: Setup) -> Vocabulary:
    """What masking must know of the tokenizer; of none, something of the same shapes."""
    import numpy as np

    from espalier.data.token_tables import word_table
    from espalier.data.tokenizer import special_ids, vocabulary_size
    from mlm.masking import Vocabulary

    ids_V = np.arange(setup.model.vocab_size)
    if setup.tokenizer is None:
        return Vocabulary(4, ids_V >= 5, np.zeros(len(ids_V), np.uint8))
    specials = special_ids(setup.tokenizer, need=MASKED_LM.needs)
    assert specials.mask is not None
    ordinary_V = ~np.isin(ids_V, specials.all) & (ids_V < vocabulary_size(setup.tokenizer))
    return Vocabulary(specials.mask, ordinary_V, word_table(setup.tokenizer))


def with_mask(config, tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedTokenizerFast | None:
    """The tokenizer of the initial weights, with --masking.token for hidden tokens; UserError if that will not do."""
    import copy

    token = config.masking.token
    if token is None:
        return tokenizer
    if tokenizer is None:
        raise UserError(f"masking.token={token!r} is of the vocabulary of --init-from, and there is none; leave it out")
    if tokenizer.mask_token == token:
        return tokenizer
    if tokenizer.mask_token is not None:
        raise UserError(f"masking.token={token!r}: the tokenizer has {tokenizer.mask_token} for that; leave it out")
    if token not in tokenizer.get_vocab():
        raise UserError(f"masking.token={token!r} is not a token of the vocabulary; try _, or a special token of it")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"mask_token": token})
    return tokenizer


def mean_rate(config: PretrainConfig) -> float:
    """The part of the tokens that is predicted, over the whole run."""
    return (config.masking.rate + (config.masking.final_rate or config.masking.rate)) / 2


def mask_rates() -> Schedule:
    from mlm.masking import mask_rates

    return mask_rates


def finish(setup: Setup, text: HeldOut, trained: Trained) -> None:
    """Write samples.json: masked words with guesses, and the loss of knowing word frequencies alone."""
    import numpy as np

    from espalier.data.token_tables import token_texts
    from mlm.samples import masked_samples, unigram_entropy

    params, tokenizer = trained.collected, setup.tokenizer
    if params is None:
        return
    assert tokenizer is not None
    config, size = setup.config, setup.model.vocab_size
    known = vocabulary(setup)
    texts = token_texts(tokenizer)
    texts += ["?"] * (size - len(texts))
    with progress.waiting("filling in masked words"):
        samples = masked_samples(
            setup.model, params, text.batches[0], texts, known, config.masking, setup.execution, seed=config.seed
        )
    train_V, held_out_V = (
        np.sum([store.counts(size) for store in stores.values()], axis=0)
        for stores in (text.prepared.train, text.prepared.validation)
    )
    entropy = unigram_entropy(train_V, held_out_V, known)
    write_json(trained.run.path / "samples.json", {"samples": samples, "unigram_entropy": entropy})


MASKED_LM = TextObjective(
    name="masked_lm",
    head="masked_lm",
    report=REPORT,
    command="mlm",
    causal=False,
    layout="framed",
    specials=("mask",),
    build=build,
    tokenizer_for=with_mask,
    predicted=mean_rate,
    schedules=(mask_rates,),
    own_code=lambda config: {"masking": config.masking.function},
    word_starts=lambda config: config.masking.whole_words,
    finish=finish,
    following=lambda run_dir: (
        *("./launch.sh", "finetune", "classify", "--init-from", run_dir),
        *("--data.train", "TRAIN.tsv", "--data.validation", "VALIDATION.tsv"),
    ),
)
