"""What replaced-token detection is: the record from which runs, reports and plans read it. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.pretraining.objective import Setup, TextObjective
from espalier.report.task import TaskReport
from espalier.task import Beside
from mlm.record import mask_rates, mean_rate, vocabulary

if TYPE_CHECKING:
    import jax

    from espalier.contracts import Origin
    from espalier.training.step import Objective
    from mlm.config import ElectraConfig, GeneratorConfig

NAME = "replaced_token_detection"


@dataclass(frozen=True, kw_only=True)
class ElectraObjective(TextObjective):
    """Two models, of which --init-from must bring both."""

    def architecture(self, config: Any, origin: Origin | None, given: frozenset[str]) -> tuple[ModelConfig, int]:
        if origin and config.init_from and not origin.config.get("beside"):
            raise UserError(
                f"--init-from {config.init_from} has no generator, which an ELECTRA is pretrained with; name a run of "
                "`mlm electra-…`, or leave it out"
            )
        return super().architecture(config, origin, given)


def generator_of(model: ModelConfig, config: GeneratorConfig) -> ModelConfig:
    """The generator beside this discriminator: the same embeddings, narrower layers with heads of the same size.

    UserError where the size is not a whole number of heads.
    """
    width, heads = round(config.size * model.hidden_size), round(config.size * model.num_attention_heads)
    if not heads or width != heads * model.head_size:
        good = [number / model.num_attention_heads for number in range(1, model.num_attention_heads + 1)]
        near = min(good, key=lambda size: abs(size - config.size))
        raise UserError(
            f"generator.size={config.size:g} of {model.num_attention_heads} attention heads is no whole number of "
            f"them; try {near:.4g}"
        )
    return replace(
        model,
        embedding_size=model.embedding_width,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=max(1, round(config.size * model.kv_heads)) if model.num_key_value_heads else None,
        intermediate_size=max(1, round(config.size * model.intermediate_size)),
        num_hidden_layers=config.layers or model.num_hidden_layers,
    )


def build(setup: Setup) -> Objective:
    from mlm.electra.loss import electra_objective
    from mlm.masking import mask_batch, own_masking, rate_at

    config: ElectraConfig = setup.config
    own = config.masking.function
    return electra_objective(
        setup.model,
        generator_of(setup.model, config.generator),
        config.masking,
        vocabulary(setup),
        rate=lambda step, train: rate_at(config.masking, step if train else config.steps, config.steps),
        weight=config.detection_weight,
        execution=setup.execution,
        mask=mask_batch if own is None else own_masking(own),
    )


def init_params(setup: Setup, key: jax.Array) -> dict:
    """Both models, of the generator only what is its own."""
    import jax

    from espalier.models.transformer import init_params

    keys = jax.random.split(key)
    discriminator = init_params(setup.model, keys[0], heads=(NAME,))
    generator = init_params(generator_of(setup.model, setup.config.generator), keys[1], heads=("masked_lm",))
    common = generator.pop("embeddings")
    if "project" in common:
        generator["embeddings"] = {"project": common["project"]}
    return {"discriminator": discriminator, "generator": generator}


def matrix_axes(params: Any) -> dict:
    from espalier.models.transformer import matrix_axes

    return {name: matrix_axes(part) for name, part in params.items()}


def beside(config: ElectraConfig, model: ModelConfig) -> dict[str, Beside]:
    return {"generator": Beside(generator_of(model, config.generator), "masked_lm", mean_rate(config))}


def flops(config: ElectraConfig, model: ModelConfig) -> float:
    """Of a row, by both models; the discriminator reaches no vocabulary."""
    from espalier.models.counts import flops_per_token

    length = config.data.sequence_length
    generator = beside(config, model)["generator"]
    return length * (
        flops_per_token(model, length, 0.0) + flops_per_token(generator.model, length, generator.predicted)
    )


REPORT = TaskReport(
    title=lambda config: "Replaced-token detection",
    unit="token",
    loss=lambda config: f"nats: generator + {config.get('detection_weight', 50):g} × detection",
    loader="AutoModelForPreTraining",
    words="pretrained by replaced-token detection (ELECTRA)",
    metric_names={
        "generator_loss": "loss of the generator (nats per masked token)",
        "generator_accuracy": "accuracy of the generator (masked tokens)",
        "detection_loss": "loss of the discriminator (nats per token)",
        "accuracy": "accuracy of the discriminator (all tokens)",
        "replaced": "part of the tokens that were replaced",
    },
    card_settings=lambda config: {
        "mask rate": config.get("masking", {}).get("rate"),
        "size of the generator": config.get("generator", {}).get("size"),
        "weight of the detection": config.get("detection_weight"),
    },
)

REPLACED_TOKENS = ElectraObjective(
    name=NAME,
    head=NAME,
    report=REPORT,
    data=None,
    command="mlm",
    causal=False,
    layout="framed",
    specials=("mask",),
    build=build,
    init_params=init_params,
    matrix_axes=matrix_axes,
    part="discriminator",
    beside=beside,
    flops=flops,
    # The discriminator reaches no vocabulary.
    predicted=lambda config: 0.0,
    schedules=(mask_rates,),
    own_code=lambda config: {"masking": config.masking.function},
    word_starts=lambda config: config.masking.whole_words,
    finalize=dict,
    following=lambda run_dir: (
        *("./launch.sh", "finetune", "classify", "--init-from", run_dir),
        *("--data.train", "TRAIN.tsv", "--data.validation", "VALIDATION.tsv"),
    ),
)
