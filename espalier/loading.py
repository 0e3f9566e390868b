"""A model to look into or to use: from a run directory, or of Hugging Face. `espalier.load` is this file's `load`."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from espalier.data.tokenizer import framed_tokenizer, tokenizer_of
from espalier.errors import UserError
from espalier.files import read_json
from espalier.models.config import ModelConfig
from espalier.models.hub import Pretrained, load_pretrained
from espalier.models.pretrained import part_of
from espalier.models.repository import PREFIX
from espalier.models.sentence_transformers import read_modules
from espalier.predict.loaded import LoadedModel
from espalier.training.fallback import given_step
from espalier.training.frozen import restore_model
from espalier.training.restore import read_config
from espalier.training.run import TUNED, RunDirectory

FRAMED = ("sequence_classification", "token_classification", "question_answering", "embedding")
"""Heads of fine-tuned models, whose texts stand between special tokens."""


def load(source: str | os.PathLike[str], *, step: int | None = None, revision: str | None = None) -> LoadedModel:
    """The model of a run directory, or `hf:` before a folder in Hugging Face format or an id on the Hub.

    step: a checkpoint of the run; default: its best where it keeps that, else the newest; where that one is damaged,
    the newest that is sound, and a line says so. revision: branch, tag or commit on the Hub. UserError where there is
    no such model.

    >>> model = load(run)
    >>> model.head, model.config.vocab_size == len(model.tokenizer)
    ('masked_lm', True)
    """
    if str(source).startswith(PREFIX):
        if step is not None:
            raise UserError(f"{source} has no steps; leave out step")
        published = Pretrained(str(source), revision)
        config, params, tokenizer = load_pretrained(published.folder, published.head)
        if tokenizer is None:
            raise UserError(f"{source} has no tokenizer; add the files of one (tokenizer.json)")
        # What generation needs to know of it; pooling, and how it was tuned.
        saved = {"published": published.config["published"]} | read_modules(published.folder)
        saved |= _tuned(published.folder / TUNED)
        return LoadedModel(config, params, tokenizer, published.head, saved)
    if revision is not None:
        raise UserError(f"{source} is a run and has no revisions; leave out revision, or write hf:{source}")
    run = RunDirectory(source)
    if not run.checkpoints.exists() and (run.path / "model.safetensors").exists():
        raise UserError(f"{source} is a folder in Hugging Face format; write {PREFIX}{Path(source)}")
    step = given_step(run.path) if step is None else step
    saved = read_config(run.path, step)
    if "task" not in saved:
        raise UserError(f"{source} holds no run of a language model or classifier; there is nothing to load")
    config, head = ModelConfig.from_dict(saved["model"]), saved.get("head", saved["task"])
    tokenizer = tokenizer_of(run.tokenizer, saved)
    if head in FRAMED and "imported_from" not in saved:
        tokenizer = framed_tokenizer(tokenizer, config.causal)
    saved = saved | _tuned(run.tuned)
    params = part_of(restore_model(run.path, step=step), saved)
    return LoadedModel(config, jax.tree.map(jnp.asarray, params), tokenizer, head, saved)


def _tuned(path: Path) -> dict:
    """What was chosen after the training, as `saved` has it; empty where nothing was."""
    return {"tuned": read_json(path)} if path.is_file() else {}
