"""What the loop trains, told as functions and arrays: it learns nothing of models or text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from espalier.contracts import BatchStream
from espalier.training.frozen import Frozen
from espalier.training.introduction import UNKNOWN, About
from espalier.training.step import Objective


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Parameters, an objective, and batches to learn from and to measure on."""

    init_params: Callable[[jax.Array], Any]
    """key → parameters."""
    load_params: Callable[[Any], Any] | None = None
    """Parameter shapes with shardings → parameters to start from; unset = those of the origin, if there is one."""
    frozen: Frozen | None = None
    """Parameters that the model needs and the run does not train."""
    matrix_axes: Callable[[Any], Any]
    """Parameter shapes → their matrices (see `build_optimizer`)."""
    depths: Callable[[Any], Any] | None = None
    """Parameter shapes → the layers between each and the head (see `build_optimizer`)."""
    objective: Objective
    batches_from: Callable[[int], BatchStream]
    """Number of a batch → the batches from that one on, this process's rows. It is that of the steps done, but where
    batches were passed over."""
    documents: Callable[[int], Sequence[str]] | None = None
    """Number of a batch → names of the documents or examples in it, in all processes' rows."""
    eval_batches: Iterable[dict]
    """Gone through at each evaluation."""
    finalize_eval: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Adds what follows from the metrics of an evaluation (perplexity; see `make_evaluate`)."""
    save_tokenizer: Callable[[Path], Any]
    """Writes it into the folder that it is given."""
    tokens_per_step: int
    """Expected, for the introduction."""
    flops_per_step: float | None = None
    about: About = UNKNOWN
    """For the introduction."""
