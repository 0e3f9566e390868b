"""Run directories with random weights, as a pretraining leaves them: what a fine-tuning starts from."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax

from espalier.data.tokenizer import fingerprint, save_tokenizer, vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.files import write_json
from espalier.models.config import ModelConfig
from espalier.models.transformer import init_params
from espalier.training.checkpoint import Checkpoints
from espalier.training.config import OptimizerConfig
from espalier.training.run import RunDirectory
from espalier.training.state import new_state


def write_run(
    folder: pathlib.Path, model: ModelConfig, texts: Sequence[str], extra: dict | None = None, vocabulary: int = 300
) -> pathlib.Path:
    """A run of `model` in a new folder, with a tokenizer learnt from `texts`.

    extra: parameters that do not belong there. vocabulary: tokens of the tokenizer at most.
    """
    task = "causal_lm" if model.causal else "masked_lm"
    kind = "bpe" if model.causal else "wordpiece"
    tokenizer = train_tokenizer(texts, kind, vocabulary, for_masked_lm=not model.causal)
    model = dataclasses.replace(model, vocab_size=vocabulary_size(tokenizer))
    config = {"task": task, "model": dataclasses.asdict(model), "fingerprints": {"tokenizer": fingerprint(tokenizer)}}
    params = init_params(model, jax.random.key(1), heads=(task,)) | (extra or {})
    run = RunDirectory(folder)
    folder.mkdir()
    write_json(run.config, config)
    save_tokenizer(tokenizer, run.tokenizer)
    checkpoints = Checkpoints(run.checkpoints, announce=lambda line: None)
    checkpoints.save(new_state(params, lambda params: {}, OptimizerConfig(), jax.random.key(0)), config, {"step": 0})
    checkpoints.close()
    return folder
