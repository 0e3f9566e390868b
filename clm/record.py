"""What causal LM is: the record from which runs, reports, cards and plans read it. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clm.report import REPORT
from espalier import progress
from espalier.files import write_json
from espalier.pretraining.objective import HeldOut, Setup, TextObjective
from espalier.task import Trained

if TYPE_CHECKING:
    from espalier.training.step import Objective

LONGEST_SAMPLE = 100
"""Tokens of a sample of text at most."""


def build(setup: Setup) -> Objective:
    from clm.loss import causal_lm_objective

    return causal_lm_objective(setup.model, execution=setup.execution)


def finish(setup: Setup, text: HeldOut, trained: Trained) -> None:
    """Write samples.json: texts that the model wrote from an empty prompt."""
    from espalier.predict.generate import generate
    from espalier.predict.loaded import LoadedModel
    from espalier.predict.sampling import SamplingConfig

    params = trained.collected
    if params is None:
        return
    longest = setup.model.max_length or setup.config.data.sequence_length
    sampling = SamplingConfig(max_new_tokens=min(LONGEST_SAMPLE, longest - 1))
    with progress.waiting("writing samples of text"):
        assert setup.tokenizer is not None
        model = LoadedModel(setup.model, params, setup.tokenizer, "causal_lm", execution=setup.execution)
        texts = generate(model, [""] * 3, sampling)
    write_json(trained.run.path / "samples.json", {"texts": texts})


CAUSAL_LM = TextObjective(
    name="causal_lm",
    head="causal_lm",
    report=REPORT,
    command="clm",
    causal=True,
    layout="shifted",
    build=build,
    finish=finish,
    following=lambda run_dir: ("./launch.sh", "generate", "--run-dir", run_dir, "--prompt", "Once upon a time"),
)
