"""What masked diffusion is: the record from which runs, reports and plans read it. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.pretraining.config import BoundFiles
from espalier.pretraining.objective import Setup, TextObjective
from espalier.report.task import TaskReport
from mlm.record import vocabulary

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel
    from espalier.task import Evaluation
    from espalier.training.step import Objective


@dataclass(frozen=True, kw_only=True)
class DiffusionObjective(TextObjective):
    """Its models are measured by a bound, not by pseudo-likelihoods."""

    def evaluate(self, model: LoadedModel, data: Any) -> Evaluation:
        from espalier.pretraining.evaluate import measure_text

        return measure_text(model, data, draws=data.draws)


def build(setup: Setup) -> Objective:
    import numpy as np

    from espalier.data.token_tables import token_bytes
    from mlm.diffusion.loss import diffusion_objective

    bytes_V = np.ones(setup.model.vocab_size, np.int32)
    if setup.tokenizer is not None:
        known = token_bytes(setup.tokenizer)[: len(bytes_V)]
        bytes_V = np.pad(known, (0, len(bytes_V) - len(known)))
    return diffusion_objective(setup.model, vocabulary(setup), bytes_V, execution=setup.execution)


def bounds(metrics: dict[str, float]) -> dict[str, float]:
    return metrics | {"perplexity_bound": math.exp(min(metrics["loss"], 700.0))}


REPORT = TaskReport(
    title=lambda config: "Masked diffusion language model",
    unit="token",
    loss=lambda config: "nats per token, an upper bound",
    pipeline="fill-mask",
    loader="AutoModelForMaskedLM",
    words="pretrained by masked diffusion",
    metric_names={
        "accuracy": "accuracy (hidden tokens, all rates alike)",
        "perplexity_bound": "perplexity, at most",
        "bits_per_byte_bound": "bits per byte, at most",
    },
)

DIFFUSION = DiffusionObjective(
    name="masked_diffusion",
    head="masked_lm",
    report=REPORT,
    data=BoundFiles,
    command="mlm",
    causal=False,
    layout="framed",
    specials=("mask",),
    build=build,
    # All places go through the head: which of them are hidden changes from row to row.
    predicted=lambda config: 1.0,
    finalize=bounds,
    following=lambda run_dir: ("./launch.sh", "generate", "--run-dir", run_dir, "--prompt", "Once upon a time"),
)
