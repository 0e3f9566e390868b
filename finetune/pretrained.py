"""What a fine-tuning takes from the run it starts from: architecture, tokenizer, and the weights below the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from cli import UserError
from data.tokenizer import tokenizer_of_run
from models.config import ModelConfig
from models.transformer import init_params
from sharding.rules import shard_params
from training.checkpoint import restore_params
from training.start import Origin, find_origin

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

    from finetune.presets import FinetuneConfig
    from training.run import RunDirectory

HEADS = {"masked_lm": "masked_lm", "causal_lm": "causal_lm", "classification": "sequence_classification"}
"""The head in a run's checkpoint, by the task in its configuration."""


class Pretrained(NamedTuple):
    """A run whose model is to be fine-tuned."""

    origin: Origin
    model: ModelConfig
    tokenizer: PreTrainedTokenizerFast


def open_pretrained(config: FinetuneConfig, run: RunDirectory) -> Pretrained:
    """The run config.init_from; or the fine-tuning run itself, where it has a checkpoint and will be resumed.

    UserError where there is no checkpoint, or where the tokenizer is not the one that the checkpoint was trained with.
    """
    if not config.init_from:
        raise UserError("no --init-from RUN given: name the directory of the mlm or clm run that is to be fine-tuned")
    origin = find_origin(config, run)
    assert origin is not None
    if origin.config.get("task") not in HEADS:
        raise UserError(
            f"{origin.run_dir} holds a run of task {origin.config.get('task')!r}; a classifier starts from an mlm or "
            "clm run"
        )
    model = ModelConfig.from_dict(origin.config["model"])
    return Pretrained(origin, model, tokenizer_of_run(origin.run_dir, origin.config))


def load_trunk(
    pretrained: Pretrained, init: Callable[[jax.Array], dict], seed: int, mesh: Mesh
) -> Callable[[Any], Any]:
    """Parameter shapes with shardings → the checkpoint's parameters, with the fresh head of init(key) on them.

    The checkpoint is read with its own head, which is then dropped, so that every missing, unexpected or misshapen
    parameter is found and listed (UserError).
    """

    def load(abstract: dict) -> dict:
        old_head = jax.eval_shape(_init_as_saved(pretrained), jax.random.key(0)).get("head")
        saved = {name: part for name, part in abstract.items() if name != "head"}
        if old_head:
            layout = shard_params({"head": old_head}, mesh)["head"]
            saved["head"] = jax.tree.map(
                lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), old_head, layout
            )
        params = restore_params(pretrained.origin.run_dir, saved, pretrained.origin.step)
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract["head"])
        head = jax.jit(lambda key: init(key)["head"], out_shardings=layout)(jax.random.key(seed))
        return params | {"head": head}

    return load


def _init_as_saved(pretrained: Pretrained) -> Callable[[jax.Array], dict]:
    config = pretrained.origin.config
    labels = len(config.get("labels", ())) or None
    return lambda key: init_params(pretrained.model, key, heads=(HEADS[config["task"]],), num_labels=labels)
