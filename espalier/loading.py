"""A model to look into or to use: from a run directory, or of Hugging Face. `espalier.load` is this file's `load`."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.tokenizer import framed_tokenizer, tokenizer_of
from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.hub import Pretrained, load_pretrained
from espalier.models.logits import batch_of_tokens, head_logits
from espalier.models.pretrained import part_of
from espalier.models.repository import PREFIX
from espalier.training.checkpoint import read_config
from espalier.training.frozen import restore_complete
from espalier.training.run import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHORTEST = 16
"""Tokens of a row at least; longer ones are padded to a power of two, so that few programs are compiled."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its weights and tokenizer."""

    config: ModelConfig
    """The architecture."""
    params: dict
    """Parameters as a nested dictionary, float32."""
    tokenizer: PreTrainedTokenizerFast
    """Puts the special tokens around a text as the model expects them."""
    head: str
    """What stands on the stack: a name in espalier.models.heads.HEADS."""

    def logits(self, texts: str | Sequence[str] | Mapping[str, Any]) -> jax.Array:
        """Logits in float32, without dropout, equal to those of the class in transformers that loads the model.

        texts: one or more, or what a tokenizer returns for them (`input_ids`, `attention_mask`, …, [B, T], padded on
        either side). Returns [B, T, V] for a language model (T: tokens of the longest text; what stands at padding
        means nothing), [B, C] for a classifier of sequences, [B, T, C] for one of tokens.

        >>> model = load(run)
        >>> scores = model.logits(["To be, or not to be"])
        >>> scores.shape == (1, len(model.tokenizer("To be, or not to be").input_ids), model.config.vocab_size)
        True
        >>> tokens = model.tokenizer(["To be", "or not to be"], return_tensors="np", padding=True)
        >>> model.logits(tokens).shape[:2] == tokens["input_ids"].shape
        True
        """
        batch = batch_of_tokens(texts if isinstance(texts, Mapping) else self._tokens(texts))
        length = batch["input_ids"].shape[1]
        longest = self.config.max_length
        if longest is not None and length > longest:
            raise UserError(f"a text of {length} tokens is longer than the model's {longest} positions; shorten it")
        padded = min(max(SHORTEST, 1 << (length - 1).bit_length()), longest or length * 2)
        padding = ((0, 0), (0, padded - length))
        scores = self._logits(self.params, {name: np.pad(array, padding) for name, array in batch.items()})
        return scores if self.head == "sequence_classification" else scores[:, :length]

    @functools.cached_property
    def _logits(self) -> Any:
        return jax.jit(functools.partial(head_logits, self.config, self.head))

    def _tokens(self, texts: str | Sequence[str]) -> dict[str, np.ndarray]:
        """Rows padded on the right, also by a tokenizer that has no padding token."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no texts given; give one or more")
        tokens = self.tokenizer(texts)
        longest = max(map(len, tokens["input_ids"]))
        if longest == 0:
            raise UserError("the texts have no tokens; give one that is not empty")
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {
            name: np.array([row + [0] * (longest - len(row)) for row in tokens[name]])
            for name in names
            if name in tokens
        }


def load(source: str | os.PathLike[str], *, step: int | None = None, revision: str | None = None) -> LoadedModel:
    """The model of a run directory, or `hf:` before a folder in Hugging Face format or an id on the Hub.

    step: a checkpoint of the run; default: the newest. revision: branch, tag or commit on the Hub. UserError where
    there is no such model.

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
        return LoadedModel(config, params, tokenizer, published.head)
    if revision is not None:
        raise UserError(f"{source} is a run and has no revisions; leave out revision, or write hf:{source}")
    run = RunDirectory(source)
    if not run.checkpoints.exists() and (run.path / "model.safetensors").exists():
        raise UserError(f"{source} is a folder in Hugging Face format; write {PREFIX}{Path(source)}")
    saved = read_config(run.path, step)
    if "task" not in saved:
        raise UserError(f"{source} holds no run of a language model or classifier; there is nothing to load")
    config, head = ModelConfig.from_dict(saved["model"]), saved.get("head", saved["task"])
    tokenizer = tokenizer_of(run.tokenizer, saved)
    if head == "sequence_classification" and "imported_from" not in saved:
        tokenizer = framed_tokenizer(tokenizer, config.causal)
    params = part_of(restore_complete(run.path, step=step), saved)
    return LoadedModel(config, jax.tree.map(jnp.asarray, params), tokenizer, head)
