"""What a fine-tuning task is: the class that reads its data, and the record that names and opens it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from espalier import progress
from espalier.errors import UserError
from espalier.files import replacing, write_json
from espalier.task import Evaluation, Start, Task, TaskRecord, Trained

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

    from espalier.contracts import Origin
    from espalier.data.examples import Example, LabelledBatches
    from espalier.models.config import ModelConfig
    from espalier.models.published import Published
    from espalier.predict.loaded import LoadedModel
    from espalier.training.frozen import Frozen
    from espalier.training.step import Objective
    from finetune.config import FinetuneConfig, FinetuneData
    from finetune.freezing import Partly


class Labelled(Protocol):
    """The labelled data of a task, what is learnt from it, and how well it was learnt. Tasks are subclasses."""

    model: ModelConfig
    """With the labels of this task."""
    data: FinetuneData | None = None
    """The settings of the data with nothing left open, where some were."""
    settings: dict
    """JSON values that make the run what it is besides its flags (the labels)."""
    fingerprints: dict[str, str]
    """SHA-256 of the files."""
    facts: Sequence[str]
    """What was read and what it was taken for, a line each, for people."""
    objective: Objective
    examples: int
    """Training examples; an epoch."""
    tokens_per_row: float
    """Of an average training example."""
    answers_per_row: int = 1
    """How many texts of data.max_length tokens a row holds: 2 where it is a pair."""
    flops_per_row: float | None = None
    """Floating-point operations of an average training example, where it is not one row of a single stack."""
    predicted: float = 0.0
    """The part of the tokens that are scored over the vocabulary, for counts of operations."""
    eval_batches: Sequence[dict]
    about: dict[str, str]
    """Rows on the files and what is to be learnt, for the introduction."""
    frozen: Frozen | None = None
    """What is not trained (the base under adapters); without a `load`, it is read from --init-from. With it, what is
    trained begins with `init_params`."""
    matrix_axes: Callable[[Any], Any] | None = None
    """As Task.matrix_axes."""
    reference: bool = False
    """Whether the parameters that the run begins with are kept beside it, frozen, under the name `reference`."""
    user_code: Mapping[str, Mapping[str, str]] = {}
    """As Task.user_code."""
    part: str = ""
    """As Task.part."""

    def init_params(self, key: jax.Array) -> dict:
        """Fresh parameters with the head of this task."""
        ...

    def begins(self, run: Path, resumed: bool) -> Callable[[dict], None] | None:
        """What is computed with the complete parameters that a run starts from, under the mesh and before anything is
        written; None = nothing. Of a run that goes on, what its first start has left in its folder is read here."""
        return None

    def batch(self, step: int) -> dict:
        """This process's rows of a step's batch. The first is asked for when the run has its folder."""
        ...

    def finalize_eval(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Adds what follows from the metrics and counts of an evaluation (F1)."""
        return metrics

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """Measure a model on the validation file. Every process calls it, under the mesh, and gets the same."""
        ...

    def exported(
        self, tokenizer: PreTrainedTokenizerFast, published: Published | None
    ) -> tuple[PreTrainedTokenizerFast, Published | None]:
        """What is written beside exported weights: a tokenizer that puts special tokens around texts as in training."""
        from espalier.data.tokenizer import framed_tokenizer

        causal = self.model.causal
        as_trained = framed_tokenizer(tokenizer, causal)
        return as_trained, published.padded_by(as_trained) if published and causal else published


class OfExamples(Labelled):
    """A task whose batches are examples with targets (data.examples.LabelledBatches)."""

    def take(
        self,
        config: FinetuneConfig,
        tokenizer: PreTrainedTokenizerFast,
        mesh: Mesh,
        train: Sequence[Example],
        validation: Sequence[Example],
        examples_per_row: int = 1,
    ) -> None:
        """The examples of both files, from which batches, their evaluation and an epoch follow. self.model is known."""
        from espalier.data.examples import LabelledBatches
        from espalier.data.tokenizer import special_ids
        from finetune.config import max_length
        from sharding.mesh import host_rows

        self.batches, held_out = (
            LabelledBatches(
                part,
                config.batch_size,
                config.seed,
                pad_id=special_ids(tokenizer).pad,
                max_length=max_length(config.data, self.model),
                examples_per_row=examples_per_row,
            )
            for part in (train, validation)
        )
        self._rows = host_rows(config.batch_size // examples_per_row, mesh)
        self.eval_batches = held_out.fixed(self._rows)
        self.examples = len(train)
        self.tokens_per_row = sum(len(example.ids) for example in train) / len(train)

    def batch(self, step: int) -> dict:
        return self.batches.batch(step, self._rows)


def shared_row(asked: int, lengths: Sequence[int], config: FinetuneConfig, mesh: Mesh, setting: str) -> int:
    """How many examples share a row of a batch: as many as were asked for, of 0 as many as suit their lengths (tokens).

    UserError where the rows of a batch then make no equal parts for devices and micro-batches; setting: its name.
    """
    from espalier.data.examples import fitting_row
    from sharding.mesh import BATCH_AXES

    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * config.accumulation
    per_row = asked or fitting_row(lengths, config.batch_size, parts)
    if config.batch_size % (per_row * parts):
        what, flag = setting.partition(".")[2].partition("_")[0], setting.replace("_", "-")
        raise UserError(
            f"{setting}={per_row}: {config.batch_size} {what} do not make {parts} equal parts of such rows, one for "
            f"each device and micro-batch; try --{flag} 1"
        )
    return per_row


def row_words(batches: LabelledBatches, what: str) -> str:
    """How full rows are that hold so many examples each, for the introduction."""
    return f"{what} each, {batches.fill:.0%} of the places hold a token".replace("%", " %")


def check_decoder(model: ModelConfig, writes: str, runs: str = "a clm run") -> None:
    """UserError for an encoder. writes: what it does not write; runs: those to name."""
    if not model.causal:
        raise UserError(
            f"--init-from names an encoder ({model.model_type}), which writes no {writes}; name a decoder ({runs}, or "
            "hf: with GPT-2, Llama, Qwen …)"
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneTask(TaskRecord):
    """A task that is learnt from labelled files, on top of a pretrained model."""

    exports: bool = True
    """Whether Hugging Face has a class for its models."""
    place: str
    """Module and class that read its data, `finetune.tasks.tag.task:Tagging`, loaded when they are needed.

    The class is a Labelled of (config, model, tokenizer, mesh). The module's function `measure(model, data)` gives the
    Evaluation of a model on the validation file of the data settings. UserError where a file will not do.
    """

    def evaluate(self, model: LoadedModel, data: Any) -> Evaluation:
        return importlib.import_module(self.place.partition(":")[0]).measure(model, data)

    def read(self, config: Any, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh) -> Labelled:
        """The files of config.data."""
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)(config, model, tokenizer, mesh)

    def architecture(
        self, config: FinetuneConfig, origin: Origin | None, given: frozenset[str]
    ) -> tuple[ModelConfig, int]:
        from espalier.models.config import ModelConfig
        from finetune.config import max_length

        if config.export and not self.exports:
            raise UserError(f"export: Hugging Face has no class for models of the task {self.name}; leave out --export")
        if origin is None or not config.init_from:
            raise UserError(
                "no --init-from given: name the run directory of the model that is to be fine-tuned, or hf:PATH_OR_ID"
            )
        model = ModelConfig.from_dict(origin.config["model"])
        if config.bidirectional and not model.causal and not origin.resumed:
            raise UserError("bidirectional: this model sees both sides already; leave it out")
        if self.head != "seq2seq_lm":
            model.check_one_stack(f"finetune {config.task} trains")
        elif config.lora.rank or config.freeze:
            model.check_one_stack(f"{'--lora.rank' if config.lora.rank else '--freeze'} is for")
        model = replace(
            model,
            causal=model.causal and not config.bidirectional,
            hidden_dropout=config.dropout,
            attention_dropout=config.dropout,
            adapter_dropout=config.lora.dropout if config.lora.rank else 0.0,
        )
        return model, max_length(config.data, model)

    def open(self, config: FinetuneConfig, start: Start) -> Task:
        import jax
        import numpy as np

        from espalier.data.description import epochs_words
        from espalier.data.loader import shuffled
        from espalier.data.tokenizer import fingerprint
        from espalier.models.counts import flops_per_token
        from espalier.predict.loaded import LoadedModel
        from finetune.config import max_length
        from finetune.freezing import freeze
        from finetune.lora import adapt

        tokenizer = start.tokenizer
        assert tokenizer is not None
        config = _settled(config, start)
        data = self.read(config, start.model, tokenizer, start.mesh)
        config = resolved(replace(config, data=data.data or config.data), data.examples, start.model.hidden_size)
        assert config.steps is not None
        tokens, longest = data.tokens_per_row, max_length(config.data, start.model) * data.answers_per_row
        partly = adapt(config, data, self.head, start) if config.lora.rank else None
        if config.freeze:
            partly = freeze(config, data, self.head, start)
        load_params = _loading(config, data, self.head, start, partly)
        reference = _reference(config, data, self.head, start) if data.reference else None
        flops = config.batch_size * (
            data.flops_per_row or tokens * flops_per_token(start.model, round(tokens), data.predicted)
        )

        def finish(trained: Trained) -> dict[str, Any]:
            saved = {"task": self.name, "data": dataclasses.asdict(config.data)} | data.settings
            model = LoadedModel(
                data.model, trained.params, data.exported(tokenizer, None)[0], self.head, saved, config.execution
            )
            with progress.waiting("measuring on the validation file"), jax.set_mesh(trained.mesh):
                evaluation = data.evaluate(model)
            if jax.process_index() == 0:
                write_evaluation(trained.run.path, evaluation)
            return {"metrics": dict(evaluation.metrics)}

        def documents(step: int) -> list[str]:
            # All tasks draw alike: examples, groups, questions, or rows of them.
            places = step * config.batch_size + np.arange(config.batch_size)
            return [f"train:{number}" for number in np.sort(shuffled(places, data.examples, config.seed))]

        return Task(
            config=config,
            model=data.model,
            tokenizer=tokenizer,
            init_params=partly.init_params if partly else data.init_params,
            objective=data.objective,
            batch=data.batch,
            documents=documents,
            eval_batches=data.eval_batches,
            finalize_eval=data.finalize_eval,
            frozen=partly.frozen if partly else reference or start.base(data.frozen),
            load_params=load_params,
            matrix_axes=data.matrix_axes,
            part=data.part,
            fingerprints={"tokenizer": fingerprint(tokenizer)} | data.fingerprints,
            settings=data.settings,
            user_code=data.user_code,
            scratch=config.scratch or data.frozen is not None,
            tokens_per_step=config.batch_size * tokens,
            # Frozen matrices have no gradient: of forward, gradient of what goes in and of the matrix, two are left.
            flops_per_step=flops * 2 / 3 if config.lora.rank else flops,
            longest=longest,
            packed="row_lengths" not in data.eval_batches[0],
            facts=data.facts,
            data=data.about | (partly.words if partly else {}),
            row=f"up to {longest} tokens, {tokens:.0f} on average",
            epochs=epochs_words(config.steps * config.batch_size / data.examples),
            finish=finish,
            summary=lambda step: {"metrics": {}} | ({"trained_parameters": partly.trained} if partly else {}),
            exported=lambda published: data.exported(tokenizer, published),
            following=None
            if config.export or not self.exports
            else ("./launch.sh", "export", str(config.run_dir), f"exported/{start.run.path.name}"),
        )


def _loading(
    config: FinetuneConfig, data: Labelled, head: str, start: Start, partly: Partly | None
) -> Callable[[Any], Any] | None:
    """Task.load_params, which tells the task of the parameters that the run starts from, where it asks for them."""
    from espalier.models.pretrained import load_weights
    from finetune.freezing import whole_model

    load = partly.load_params if partly else None
    begins = data.begins(start.run.path, start.origin is not None and start.origin.resumed)
    if begins is None:
        return load
    origin = start.origin
    assert origin is not None

    def load_and_tell(abstract: Any) -> Any:
        if load is not None:
            begins(whole_model(config, data, head, start)())
            return load(abstract)
        params = load_weights(origin, data.model, head, data.init_params, config.seed)(abstract)
        begins(params)
        return params

    return load_and_tell


def _reference(config: FinetuneConfig, data: Labelled, head: str, start: Start) -> Frozen:
    """The parameters that the run begins with, once more and frozen."""
    from espalier.models.pretrained import load_weights
    from espalier.training.frozen import Frozen

    origin = start.origin
    assert origin is not None and not config.lora.rank and not config.freeze and data.frozen is None
    load = load_weights(origin, data.model, head, data.init_params, config.seed)
    return Frozen(
        lambda key: {"reference": data.init_params(key)},
        None if origin.resumed else lambda abstract: {"reference": load(abstract["reference"])},
        origin.revision,
    )


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """predictions.jsonl and further files, JSON or text; warnings are said."""
    if evaluation.rows:
        with replacing(folder / "predictions.jsonl") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.rows)
    for name, value in evaluation.files.items():
        if isinstance(value, str):
            with replacing(folder / name) as file:
                file.write(value)
        else:
            write_json(folder / name, value)
    for warning in evaluation.warnings:
        progress.say(warning)


def _settled(config: FinetuneConfig, start: Start) -> FinetuneConfig:
    """The configuration with what the mesh and an earlier start of the run decide."""
    if config.execution.scan_layers is None and start.mesh.devices.flat[0].platform == "cpu":
        # A short job: scanned layers compile in half the time, and run as fast.
        config = replace(config, execution=replace(config.execution, scan_layers=True))
    if start.origin is not None and start.origin.resumed:
        config = replace(config, data=config.data.resumed(start.origin.config.get("data", {})))
    return config


def resolved(config: FinetuneConfig, examples: int, width: int) -> FinetuneConfig:
    """The configuration with everything filled in that depends on the data (examples) or the model (width D)."""
    epoch = math.ceil(examples / config.batch_size)
    steps = config.steps or max(200, math.ceil(3 * examples / config.batch_size))
    if config.epochs is not None:
        steps = math.ceil(config.epochs * examples / config.batch_size)
    rate = config.optimizer.learning_rate
    if rate is None:
        # Wide models want small rates: about 1/D under Adam (Yang et al. 2022); 5e-5 is BERT-base's.
        rate = min(3e-4, 5e-5 * 768 / width)
        if config.lora.rank:
            # Schulman et al. 2025, "LoRA Without Regret": ten times the best rate of a full fine-tuning, at any rank.
            rate *= 10
    return replace(
        config,
        steps=steps,
        eval_every=config.eval_every or max(epoch, math.ceil(steps / 10)),
        optimizer=replace(config.optimizer, learning_rate=rate),
    )
