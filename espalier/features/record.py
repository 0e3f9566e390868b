"""What the training of a sparse autoencoder is: the records that runs and reports read. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clm.record import CAUSAL_LM
from espalier.errors import UserError
from espalier.features.report import REPORT
from espalier.pretraining.objective import TextObjective
from espalier.task import Start, Task, TaskRecord
from mlm.record import MASKED_LM

if TYPE_CHECKING:
    from espalier.contracts import Origin
    from espalier.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderTask(TaskRecord):
    """A sparse autoencoder on the stream of a language model, which is frozen."""

    text: TextObjective
    """The pretraining of such models, whose batches it is trained on."""

    def architecture(self, config: Any, origin: Origin | None, given: frozenset[str]) -> tuple[ModelConfig, int]:
        if origin is None or not config.init_from:
            raise UserError("no --init-from given: name the model whose stream is taken apart, RUN or hf:ID")
        if given:
            raise UserError(f"--model.{sorted(given)[0]}: the model stays as it is; leave it out")
        if config.export or config.init_optimizer or config.objective:
            raise UserError(
                "an autoencoder is written into RUN/autoencoder and has an objective of its own; leave out --export, "
                "--init-optimizer and --objective"
            )
        model, length = self.text.architecture(config, origin, given)
        if origin.config.get("head", origin.config["task"]) == "causal_lm" and not model.causal:
            raise UserError("--init-from names a decoder that sees both sides, whose loss is not measured here")
        layer = config.autoencoder.layer
        if layer is not None and layer >= model.num_hidden_layers:
            raise UserError(f"autoencoder.layer={layer}: the model has layers 0 to {model.num_hidden_layers - 1}")
        return model, length

    def open(self, config: Any, start: Start) -> Task:
        from espalier.features.task import open_autoencoder

        return open_autoencoder(self, config, start)


ON_ENCODERS = AutoencoderTask(name="masked_lm_autoencoder", head="masked_lm", report=REPORT, text=MASKED_LM)
ON_DECODERS = AutoencoderTask(name="causal_lm_autoencoder", head="causal_lm", report=REPORT, text=CAUSAL_LM)
