"""Log-probabilities of the model that a run starts from: computed once, before its first step, and kept with the run.

reference.npz   of the answers of each file, log π_ref(y|x), float32 [N, 2]; `examples`, the SHA-256 of their tokens
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from espalier import progress
from espalier.data.examples import Example
from espalier.errors import UserError
from espalier.files import replacing
from espalier.models.config import Execution, ModelConfig
from espalier.predict.outputs import outputs
from finetune.tasks.instruct.task import next_scores

NAME = "reference.npz"
EXAMPLES = "examples"


class Reference:
    """The log-probabilities of the files of a run, by their names."""

    def __init__(self, path: Path, parts: Mapping[str, Sequence[Example]], pad_id: int):
        self._path, self._parts, self._pad_id = path / NAME, parts, pad_id
        self._written = True
        self.of: dict[str, np.ndarray] = {}
        """Name of a file → float32 [N, 2], once they are known."""

    def compute(self, model: ModelConfig, execution: Execution, params: Any) -> None:
        """Every process computes all; nothing is written yet."""
        for name, examples in self._parts.items():
            with progress.waiting(f"log-probabilities of the reference: {len(examples):,} answers ({name})"):
                self.of[name] = answer_logprobs(model, execution, params, examples, self._pad_id)
        self._written = False

    def write(self) -> None:
        """Into the run, which has begun."""
        if not self._written and jax.process_index() == 0:
            with replacing(self._path, "wb") as file:
                arrays: dict[str, Any] = self.of | {EXAMPLES: np.frombuffer(self._sum, np.uint8)}
                np.savez(file, **arrays)
        self._written = True

    def read(self) -> None:
        """Those that the first start of a run has written. UserError where they are not there, or of other examples."""
        try:
            with np.load(self._path) as file:
                found = {name: file[name] for name in (*self._parts, EXAMPLES)}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{self._path} cannot be read ({' '.join(str(error).split())[:100]}): the run cannot go on without the "
                "log-probabilities of its reference; put it back, or begin anew in another --run-dir"
            ) from error
        if found.pop(EXAMPLES).tobytes() != self._sum:
            raise UserError(
                f"{self._path} holds log-probabilities of other examples; give the files that the run was begun with, "
                "or begin anew in another --run-dir"
            )
        self.of = found

    @property
    def _sum(self) -> bytes:
        found = hashlib.sha256()
        for name, examples in self._parts.items():
            found.update(name.encode())
            for example in examples:
                found.update(np.asarray(example.ids, np.int64).tobytes())
                found.update(np.asarray(example.of_tokens["loss_weights"], np.float32).tobytes())
        return found.digest()


def answer_logprobs(
    model: ModelConfig, execution: Execution, params: Any, examples: Sequence[Example], pad_id: int
) -> np.ndarray:
    """log p of each answer, summed over its tokens, float32 [N, 2]; examples: two in turn. Under jax.set_mesh split."""
    scores = outputs(next_scores, (model, execution), params, examples, pad_id=pad_id, longest=model.max_length)
    found_N = np.zeros(len(examples))
    for at, (example, (logprob_T, _)) in enumerate(zip(examples, scores, strict=True)):
        weight_T = np.asarray(example.of_tokens["loss_weights"], np.float64)[1:]
        found_N[at] = weight_T @ logprob_T[: len(weight_T)]
    return found_N.astype(np.float32).reshape(-1, 2)
