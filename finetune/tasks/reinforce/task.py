"""Reinforcement: prompts of two files, completions drawn by the model that learns, and what they are worth.

The batch of a step is drawn by its parameters before the step (rollouts.py), the step itself is that of any objective
(objective.py).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from espalier.data.chat import chat_template, end_of_turn
from espalier.data.loader import shuffled
from espalier.data.tokenizer import special_ids
from espalier.models import generate
from espalier.models.config import ModelConfig
from espalier.models.decoding import Sampling
from espalier.models.transformer import init_params
from espalier.predict.generate import TUNED
from espalier.predict.loaded import LoadedModel
from espalier.predict.stops import stop_table
from espalier.task import Evaluation
from finetune.task import Labelled, check_decoder, resolved
from finetune.tasks.reinforce.advantages import pass_at
from finetune.tasks.reinforce.objective import policy_objective
from finetune.tasks.reinforce.prompts import Asked, completion_text, read_prompts
from finetune.tasks.reinforce.rewards import Group, Rewards
from finetune.tasks.reinforce.rollouts import Rollouts
from sharding.mesh import host_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.published import Published
    from finetune.tasks.reinforce.record import PolicyGradient, ReinforceConfig, ReinforceData

ROWS = 64
"""Prompts that are answered at once when a model is measured."""


class Reinforcement(Labelled):
    """The prompts of two files, and the rewards of their completions."""

    def __init__(self, config: ReinforceConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        check_decoder(model, "completions")
        policy, self.model = config.policy, model
        asked = _asked_as(model, tokenizer, config.data, config)
        train, validation = (
            read_prompts(config.data, side, asked, policy.max_new_tokens) for side in ("train", "validation")
        )
        self._validation, self._data, self._policy = validation.asked, config.data, policy
        self._rewards = Rewards(config.data)
        self._rewards.check(train.asked[0])
        assert config.run_dir is not None
        self._rollouts = Rollouts(
            asked, policy, mesh, train.asked, validation.asked, self._rewards, end_ids(tokenizer, config.data),
            Path(config.run_dir) / "rollouts.jsonl", self._upcoming,
        )  # fmt: skip
        ahead = self._rollouts.ahead if policy.asynchronous else None
        self.objective = policy_objective(
            model, policy, execution=config.execution, collect=self._rollouts.collect, ahead=ahead
        )
        # Adapters switched off are the reference.
        self.reference = policy.beta > 0 and not config.lora.rank
        self.settings, self.user_code = {}, self._rewards.user_code
        self.fingerprints = {"train": train.fingerprint, "validation": validation.fingerprint}
        self.facts: Sequence[str] = tuple(dict.fromkeys([*train.facts, *validation.facts]))
        self._config, self._rows = config, host_rows(config.batch_size, mesh)
        self.examples, self.predicted = len(train.asked), 1.0
        self._last = resolved(config, self.examples, model.hidden_size).steps or 0
        # A row of the batch is a prompt with all its completions.
        usual = statistics.fmean(len(one.ids) for one in train.asked)
        self.tokens_per_row = policy.samples * (usual + policy.max_new_tokens)
        padded = np.append(np.arange(len(validation.asked)), [-1] * (-len(validation.asked) % config.batch_size))
        self.eval_batches: Sequence[dict] = [
            _batch(numbers[self._rows], held_out=True) for numbers in padded.reshape(-1, config.batch_size)
        ]
        self.about = {
            "training": f"{train.name}: {len(train.asked):,} prompts",
            "validation": f"{validation.name}: {len(validation.asked):,} prompts",
            "rollouts": f"{config.batch_size} prompts × {policy.samples} completions of up to {policy.max_new_tokens} "
            f"tokens; prompts of up to {self._rollouts.length}",
            "reward": " + ".join(config.data.reward),
        }

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("causal_lm",))

    def batch(self, step: int) -> dict:
        """The prompts of a step; where several updates share their completions, the same for all of them."""
        return _batch(self._prompts(step)[self._rows], fresh=step % self._policy.updates == 0)

    def _prompts(self, step: int) -> np.ndarray:
        """The numbers of all prompts of a step, int64 [P]."""
        size = self._config.batch_size
        places = step // self._policy.updates * size + np.arange(size)
        return shuffled(places, self.examples, self._config.seed)

    def _upcoming(self, step: int) -> np.ndarray | None:
        return self._prompts(step) if step < self._last else None

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """The metrics of `measured`; predictions.jsonl. No more rewards are asked for after it."""
        try:
            return measured(model, self._validation, self._data, self._policy, self._rewards)
        finally:
            self._rewards.close()

    def exported(
        self, tokenizer: PreTrainedTokenizerFast, published: Published | None
    ) -> tuple[PreTrainedTokenizerFast, Published | None]:
        """The tokenizer as it is."""
        return tokenizer, published


def _batch(numbers_P: np.ndarray, held_out: bool = False, fresh: bool = True) -> dict[str, np.ndarray]:
    return {
        "prompt": numbers_P.astype(np.int32),
        "held_out": np.full(len(numbers_P), held_out, np.int32),
        "fresh": np.full(len(numbers_P), fresh, np.int32),
    }


def end_ids(tokenizer: PreTrainedTokenizerFast, data: ReinforceData) -> tuple[int, ...]:
    """All tokens at which a completion ends. UserError where the tokenizer has none."""
    specials = special_ids(tokenizer, need=("bos", "eos"))
    assert specials.eos is not None
    ends = {specials.eos}
    if data.template is None and chat_template(tokenizer) is not None:
        ends |= {end for end in [end_of_turn(tokenizer)] if end is not None}
    return tuple(sorted(ends))


def measure(model: LoadedModel, data: ReinforceData) -> Evaluation:
    """A decoder on a file of prompts, by the rewards of the settings."""
    from finetune.tasks.reinforce.record import PolicyGradient

    given = (model.saved.get("policy") or {}) if model.saved.get("task") == "reinforcement" else {}
    policy = dataclasses.replace(PolicyGradient(), **given)
    model = _asked_as(model.config, model.tokenizer, data, model)
    rewards = Rewards(data)
    try:
        asked = read_prompts(data, "validation", model, policy.max_new_tokens).asked
        return measured(model, asked, data, policy, rewards)
    finally:
        rewards.close()


def measured(
    model: LoadedModel, asked: Sequence[Asked], data: ReinforceData, policy: PolicyGradient, rewards: Rewards
) -> Evaluation:
    """reward and pass@1 … pass@k of k completions a prompt, and the reward of the most probable one (greedy_…).

    Rows: prompt, answer, prediction (the most probable), rewards and how many solved it.
    """
    ends, k = end_ids(model.tokenizer, data), data.validation_samples
    stops = stop_table(model.tokenizer, policy.stop, model.config.vocab_size) if policy.stop else None

    def scored(sampling: Sampling) -> tuple[np.ndarray, list[list[str]]]:
        rows, texts = [], []
        length = max(len(one.ids) for one in asked)
        for start in range(0, len(asked), ROWS):
            part = asked[start : start + ROWS]
            drawn = generate.generate(
                model.config, model.params, [one.ids for one in part], jax.random.key(0), sampling,
                execution=model.execution, numbers=range(start, start + len(part)),
                shape=(min(ROWS, len(asked)), length), stops=stops,
            )  # fmt: skip
            tokens = drawn.tokens_BG.reshape(len(part), sampling.samples, -1)
            written = [
                [completion_text(model, one, row, ends, policy.stop) for row in group.tolist()]
                for one, group in zip(part, tokens, strict=True)
            ]
            found = rewards([Group(*pair) for pair in zip(part, written, strict=True)])
            if policy.cut == "zero":
                found = np.where(drawn.ended_B.reshape(found.shape), found, 0.0)
            rows.append(found)
            texts += written
        return np.concatenate(rows), texts

    new = policy.max_new_tokens
    drawn_PK, _ = scored(Sampling(new, temperature=policy.temperature, end_ids=ends, samples=k))
    greedy_P1, greedy = scored(Sampling(new, temperature=0.0, end_ids=ends))
    solved_P = np.nan_to_num(drawn_PK, nan=-np.inf).__ge__(policy.solved).sum(1)
    found: dict[str, Any] = {
        "reward": float(np.nanmean(drawn_PK)),
        "pass@1": pass_at(solved_P, k, 1),
        f"pass@{k}": pass_at(solved_P, k, k),
        "greedy_reward": float(np.nanmean(greedy_P1)),
        "greedy_pass@1": float((greedy_P1 >= policy.solved).mean()),
        "prompts": len(asked),
    }
    rows = [
        {
            "prompt": one.text,
            "answer": one.answer,
            "prediction": text,
            "rewards": values.tolist(),
            "solved": int(solved),
        }
        for one, [text], values, solved in zip(asked, greedy, drawn_PK, solved_P, strict=True)
    ]
    errors = int(np.isnan(drawn_PK).sum())
    said = [f"{errors:,} of {drawn_PK.size:,} completions got no reward: {rewards.error}"] if errors else []
    return Evaluation(found, rows, {}, said)


def _asked_as(model: ModelConfig, tokenizer: PreTrainedTokenizerFast, data: ReinforceData, like: Any) -> LoadedModel:
    """What reads prompts as the settings say. like: whose execution is taken, and weights where it has some."""
    tuned = data.chat or data.template is not None
    saved = {"task": TUNED if tuned else "causal_lm", "data": {"template": data.template}}
    return LoadedModel(model, getattr(like, "params", {}), tokenizer, "causal_lm", saved, like.execution)
