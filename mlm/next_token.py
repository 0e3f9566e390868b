"""What masked next-token prediction and its mixture with causal LM are: their records. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from espalier import progress
from espalier.errors import UserError
from espalier.files import write_json
from espalier.pretraining.objective import HeldOut, Setup, TextObjective
from espalier.task import Trained
from mlm.record import mask_rates, mean_rate, vocabulary, with_mask
from mlm.report import REPORT

if TYPE_CHECKING:
    from espalier.training.step import Objective
    from mlm.config import HybridConfig, MaskedNextTokenConfig


def build(setup: Setup) -> Objective:
    """Masked next-token prediction, with the mask rate of its step as in masked LM."""
    from mlm.loss import masked_lm_objective
    from mlm.masking import from_before

    config: MaskedNextTokenConfig = setup.config
    return masked_lm_objective(
        setup.model,
        config.masking,
        vocabulary(setup),
        rate=_rate(config),
        execution=setup.execution,
        mask=from_before(_mask(config)),
        head="causal_lm",
    )


def build_hybrid(setup: Setup) -> Objective:
    from mlm.hybrid import hybrid_objective

    config: HybridConfig = setup.config
    if "local" in setup.model.layers:
        raise UserError(
            f"model.sliding_window={setup.model.sliding_window}: a window lies otherwise in causal rows than in those "
            "that see both sides, and a hybrid has rows of both kinds; take a model whose layers are all global"
        )
    return hybrid_objective(
        setup.model,
        config.masking,
        vocabulary(setup),
        rate=_rate(config),
        causal_share=config.causal_share,
        execution=setup.execution,
        mask=_mask(config),
    )


def _rate(config):
    from mlm.masking import rate_at

    return lambda step, train: rate_at(config.masking, step if train else config.steps, config.steps)


def _mask(config):
    from mlm.masking import mask_batch, own_masking

    return mask_batch if config.masking.function is None else own_masking(config.masking.function)


def finish(setup: Setup, text: HeldOut, trained: Trained) -> None:
    """Write samples.json: masked words with guesses."""
    from espalier.data.token_tables import token_texts
    from mlm.masking import from_before, mask_batch
    from mlm.samples import masked_samples

    params, tokenizer = trained.collected, setup.tokenizer
    if params is None:
        return
    assert tokenizer is not None
    config, texts = setup.config, token_texts(tokenizer)
    texts += ["?"] * (setup.model.vocab_size - len(texts))
    with progress.waiting("filling in masked words"):
        samples = masked_samples(
            *(replace(setup.model, causal=False), params, text.batches[0], texts, vocabulary(setup)),
            *(config.masking, setup.execution),
            head="causal_lm",
            mask=from_before(mask_batch),
            seed=config.seed,
        )
    write_json(trained.run.path / "samples.json", {"samples": samples})


def by_kind(metrics: dict[str, float]) -> dict[str, float]:
    """With the perplexity of the causal loss: that of the mixture means nothing."""
    from espalier.pretraining.objective import perplexity

    return metrics | {"perplexity": perplexity({"loss": metrics["causal_loss"]})["perplexity"]}


def mean_masked(config: MaskedNextTokenConfig) -> float:
    return mean_rate(config)  # type: ignore[arg-type]


MASKED_NEXT_TOKEN = TextObjective(
    name="masked_next_token",
    head="causal_lm",
    report=replace(
        REPORT,
        title=lambda config: "Masked next-token prediction",
        baseline=lambda run: None,
        pipeline="feature-extraction",
        loader="AutoModelForCausalLM",
        words="a decoder that sees both sides, trained to predict hidden tokens from the place before",
    ),
    command="mlm",
    causal=False,
    turns=True,
    layout="shifted",
    specials=("mask",),
    build=build,
    predicted=mean_masked,
    schedules=(mask_rates,),
    own_code=lambda config: {"masking": config.masking.function},
    tokenizer_for=with_mask,
    finish=finish,
    following=lambda run_dir: (
        *("./launch.sh", "finetune", "classify", "--init-from", run_dir),
        *("--data.train", "TRAIN.tsv", "--data.validation", "VALIDATION.tsv"),
    ),
)
HYBRID = replace(
    MASKED_NEXT_TOKEN,
    name="hybrid_lm",
    report=replace(
        REPORT,
        title=lambda config: "Hybrid of causal and masked language model",
        unit="predicted token",
        baseline=lambda run: None,
        pipeline="text-generation",
        loader="AutoModelForCausalLM",
        words="pretrained by causal language modelling in some rows and masked next-token prediction in the others",
        card_settings=lambda config: {
            "mask rate": config.get("masking", {}).get("rate"),
            "causal part of the rows": config.get("causal_share"),
        },
    ),
    causal=True,
    mixed=True,
    build=build_hybrid,
    predicted=lambda config: 1.0,
    finalize=by_kind,
    following=lambda run_dir: (
        *("./launch.sh", "evaluate", run_dir, "--task", "multiple_choice"),
        *("--data.validation", "BLIMP", "--bidirectional"),
    ),
)
