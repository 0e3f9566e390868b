"""What a fine-tuning takes from the run it starts from: architecture, tokenizer, and the weights below the head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from cli import UserError
from data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from models.config import ModelConfig
from models.transformer import init_params
from sharding.rules import shard_params
from training.checkpoint import complete_steps, read_config, restore_params
from training.run import RunDirectory

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

HEADS = {"masked_lm": "masked_lm", "causal_lm": "causal_lm", "classification": "sequence_classification"}
"""The head in a run's checkpoint, by the task in its configuration."""


class Pretrained(NamedTuple):
    """A run whose model is to be fine-tuned."""

    run_dir: Path
    config: dict
    """As saved in its newest checkpoint."""
    model: ModelConfig
    tokenizer: PreTrainedTokenizerFast


def open_pretrained(init_from: str | None, run_dir: Path) -> Pretrained:
    """The run `init_from`; or the fine-tuning run itself, where it has a checkpoint and will be resumed.

    UserError where there is no checkpoint, or where the tokenizer is not the one that the checkpoint was trained with.
    """
    if not init_from:
        raise UserError("no --init-from RUN given: name the directory of the mlm or clm run that is to be fine-tuned")
    folder = run_dir if complete_steps(RunDirectory(run_dir).checkpoints) else Path(init_from).expanduser()
    config = read_config(folder)
    if config.get("task") not in HEADS:
        raise UserError(
            f"{folder} holds a run of task {config.get('task')!r}; a classifier starts from an mlm or clm run"
        )
    model = ModelConfig.from_dict(config["model"])
    tokenizer = load_tokenizer(folder / "tokenizer")
    size = vocabulary_size(tokenizer)
    if size != model.vocab_size or fingerprint(tokenizer) != config["fingerprints"]["tokenizer"]:
        found = f"{size:,} tokens" if size != model.vocab_size else "other tokens"
        raise UserError(
            f"{folder / 'tokenizer'} has {found}, not the {model.vocab_size:,} that the checkpoint beside it knows; "
            "put back the tokenizer of that run"
        )
    return Pretrained(folder, config, model, tokenizer)


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
        params = restore_params(pretrained.run_dir, saved)
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract["head"])
        head = jax.jit(lambda key: init(key)["head"], out_shardings=layout)(jax.random.key(seed))
        return params | {"head": head}

    return load


def _init_as_saved(pretrained: Pretrained) -> Callable[[jax.Array], dict]:
    config = pretrained.config
    labels = len(config.get("labels", ())) or None
    return lambda key: init_params(pretrained.model, key, heads=(HEADS[config["task"]],), num_labels=labels)
