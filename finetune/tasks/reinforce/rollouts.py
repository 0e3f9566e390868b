"""Completions drawn by the current parameters, with rewards and advantages: what a step learns from.

`Rollouts.collect` is what `training.step.Objective.collect` asks for: a function of parameters, batch and key alone, so
that a resumed run draws the same again; what was drawn is kept beside the checkpoints and read back
(training.collected). Token ids never become text and back: what was drawn is what is trained, text is for rewards.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from espalier import progress
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.decoding import Drawn, Sampling
from espalier.models.generate import continued
from espalier.models.slots import continue_all
from espalier.predict.stops import stop_table
from espalier.training.adapters import without
from finetune.tasks.reinforce.advantages import advantages, equal
from finetune.tasks.reinforce.objective import completion_logprobs
from finetune.tasks.reinforce.prompts import Asked, completion_text
from finetune.tasks.reinforce.rewards import Group, Rewards
from sharding.mesh import batch_sharding, token_axes
from sharding.processes.coordination import from_first

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel
    from espalier.training.state import TrainState
    from finetune.tasks.reinforce.record import PolicyGradient

REFERENCE = "reference"
"""Name of the frozen tree with the parameters that the run began with."""
LONGEST = 600.0
"""Seconds that other processes wait for the rewards, beside those of the time-outs."""


class Written(NamedTuple):
    """Completions of P prompts, G each, NumPy; rows of a prompt stand one behind the other."""

    numbers_P: np.ndarray
    """Of the prompts in their file; -1 = none."""
    tokens_RC: np.ndarray
    """int32, -1 behind the end."""
    logprobs_RC: np.ndarray
    """float32, of what was drawn from."""
    ended_R: np.ndarray
    """bool: not cut off."""


class Drawing(NamedTuple):
    """Completions as in Written, and what they are worth."""

    numbers_P: np.ndarray
    tokens_RC: np.ndarray
    logprobs_RC: np.ndarray
    ended_R: np.ndarray
    rewards_PG: np.ndarray
    """float64; NaN = none."""
    scored_PG: np.ndarray
    """bool: what is compared with its group."""

    def at(self, places: np.ndarray, other: Drawing, others: np.ndarray) -> Drawing:
        """With some prompts of another in the place of some of its own."""
        found = [array.copy() for array in self]
        for mine, theirs in zip(found, other, strict=True):
            size = len(mine) // len(self.numbers_P)
            for place, from_place in zip(places, others, strict=True):
                mine[place * size : (place + 1) * size] = theirs[from_place * size : (from_place + 1) * size]
        return Drawing(*found)


class Rollouts:
    """Draws completions, asks for their rewards, and makes of both what the objective takes."""

    def __init__(
        self,
        model: LoadedModel,
        policy: PolicyGradient,
        mesh: Mesh,
        train: Sequence[Asked],
        validation: Sequence[Asked],
        rewards: Rewards,
        end_ids: tuple[int, ...],
        written: Path | None = None,
        upcoming: Callable[[int], np.ndarray | None] = lambda number: None,
    ):
        """model: whose weights are not asked. written: file that a few completions of each step are added to.
        upcoming: number of a batch → those of its prompts, int [P]; None where the run ends before it."""
        self._model, self._policy, self._mesh = model, policy, mesh
        self._sides, self._rewards, self._file = (train, validation), rewards, written
        self.end_ids = end_ids
        self.length = max(len(asked.ids) for side in self._sides for asked in side)
        self._sampling = Sampling(
            policy.max_new_tokens, temperature=policy.temperature, end_ids=end_ids, samples=policy.samples
        )
        stops = policy.stop
        self._stops = stop_table(model.tokenizer, stops, model.config.vocab_size) if stops else None
        self._upcoming = upcoming
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._asked: tuple[np.ndarray, Future[np.ndarray]] | None = None
        """Completions whose rewards are being worked out."""
        self._whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def collect(self, state: TrainState, batch: dict, key: jax.Array) -> dict:
        """The batch of P prompts (`prompt` int32 [P], `held_out` [P]) with rows of P·G completions."""
        policy = self._policy
        numbers_P, held_out = (np.asarray(jax.device_get(self._whole(batch[name]))) for name in ("prompt", "held_out"))
        side = self._sides[int(held_out[0])]
        params = policy_params(state)
        batch = dict(batch)
        ahead = batch.pop("ahead", None)
        written = self._written_by(params, side, numbers_P, key) if ahead is None else Written(**ahead)
        drawn = self._judged(side, written)
        rounds = 0 if held_out[0] else policy.resample
        for turn in range(rounds):
            stale = np.flatnonzero(equal(drawn.rewards_PG, drawn.scored_PG))
            if not len(stale):
                break
            turn_key = jax.random.fold_in(key, turn)
            seed = int(np.asarray(jax.random.bits(turn_key)))
            others_P = np.random.default_rng(seed).integers(0, len(side), len(numbers_P))
            more = self._judged(side, self._written_by(params, side, others_P, jax.random.fold_in(turn_key, 1)))
            informative = np.flatnonzero(~equal(more.rewards_PG, more.scored_PG))[: len(stale)]
            drawn = drawn.at(stale[: len(informative)], more, informative)
        rows = self._placed(self._rows(side, drawn))
        scored = functools.partial(
            _scored, self._model.config, batch=rows, temperature=policy.temperature, execution=self._model.execution
        )
        valid_PG = drawn.scored_PG
        rewards_PG = np.where(valid_PG, drawn.rewards_PG, 0.0)
        penalised_PG, added = rewards_PG, {}
        in_reward = policy.beta > 0 and policy.kl == "k1"
        if policy.updates > 1 or in_reward:
            added["first_logprobs"] = scored(params=params)
        if policy.beta:
            added["reference_logprobs"] = scored(params=state.frozen.get(REFERENCE) or without(params))
        if in_reward:
            # Of two passes of training, so that what is the same model differs by nothing.
            gap_RC = self._whole(added["first_logprobs"] - added["reference_logprobs"])
            gap_RC = np.where(drawn.tokens_RC >= 0, np.asarray(jax.device_get(gap_RC)), 0.0)
            penalised_PG = rewards_PG - policy.beta * gap_RC.sum(1).reshape(rewards_PG.shape)
        advantages_PG = advantages(penalised_PG, valid_PG, policy.baseline, policy.deviation)
        solved_PG = valid_PG & (rewards_PG >= policy.solved)
        of_rows = {
            "advantages": advantages_PG,
            "rewards": rewards_PG,
            "valid": valid_PG,
            "solved": solved_PG,
            "any_solved": np.broadcast_to(solved_PG.any(1, keepdims=True), solved_PG.shape),
            # Of a group without a reward, too, nothing is learnt.
            "equal": np.broadcast_to(equal(penalised_PG, valid_PG)[:, None], solved_PG.shape),
        }
        placed = self._placed({name: array.astype(np.float32).reshape(-1) for name, array in of_rows.items()})
        if self._file is not None and not held_out[0] and jax.process_index() == 0:
            self._write(int(state.step), side, drawn)
        return batch | rows | placed | added

    def ahead(self, state: TrainState, number: int, key: jax.Array) -> dict[str, np.ndarray]:
        """The completions of a batch to come, drawn by these parameters; their rewards are worked out meanwhile."""
        numbers_P = self._upcoming(number)
        if numbers_P is None:
            return {}
        side = self._sides[0]
        written = self._written_by(policy_params(state), side, numbers_P, key)
        self._asked = written.tokens_RC, self._thread.submit(self._rewarded, side, written)
        return written._asdict()

    def _written_by(self, params: Any, side: Sequence[Asked], numbers_P: np.ndarray, key: jax.Array) -> Written:
        """Completions of these prompts."""
        policy, model = self._policy, self._model
        if policy.slots:
            there = np.flatnonzero(numbers_P >= 0)
            ids = [side[number].ids for number in numbers_P[there]]
            how = dict(execution=model.execution, numbers=there.tolist(), length=self.length, stops=self._stops)
            found = continue_all(model.config, params, ids, key, self._sampling, policy.slots, **how)
            rows_R = (there[:, None] * policy.samples + np.arange(policy.samples)).reshape(-1)
            size = len(numbers_P) * policy.samples
            drawn = Drawn(*(np.zeros((size, *array.shape[1:]), array.dtype) for array in found))
            drawn.tokens_BG[:] = -1
            for mine, theirs in zip(drawn, found, strict=True):
                mine[rows_R] = theirs
        else:
            prompt = prompt_rows(side, numbers_P, self.length)
            places_P = np.arange(len(numbers_P), dtype=np.uint32)
            how = (self._sampling, model.execution, self._stops)
            drawn = jax.device_get(continued(model.config, params, prompt, key, places_P, *how))
        return Written(numbers_P, drawn.tokens_BG, drawn.drawn_logprobs_BG, drawn.ended_B)

    def _judged(self, side: Sequence[Asked], written: Written) -> Drawing:
        """Completions with their rewards, which may have been asked for before."""
        numbers_P, tokens_RC, logprobs_RC, ended_R = written
        groups = (len(numbers_P), self._policy.samples)
        there_PG = np.broadcast_to((numbers_P >= 0)[:, None], groups)
        if self._asked is not None and np.array_equal(self._asked[0], tokens_RC):
            found, self._asked = self._asked[1].result(), None
        else:
            found = self._rewarded(side, written)
        wait = LONGEST + len(numbers_P) * 60.0
        found = np.array(from_first("rewards", found.tolist(), wait), np.float64).reshape(groups)
        errors_PG = np.isnan(found) & there_PG
        if there_PG.any() and (errors_PG == there_PG).all():
            raise UserError(f"not one of {there_PG.sum()} completions got a reward: {self._rewards.error}")
        scored_PG, ended_PG = there_PG & ~errors_PG, ended_R.reshape(groups)
        if self._policy.cut == "zero":
            found = np.where(ended_PG, found, 0.0)
        elif self._policy.cut == "left-out":
            scored_PG = scored_PG & ended_PG
        return Drawing(*written, found, scored_PG)

    def _rewarded(self, side: Sequence[Asked], written: Written) -> np.ndarray:
        """float64 [P, G], NaN where there is no reward; on processes but the first nowhere is one."""
        size, groups = self._policy.samples, []
        there = np.flatnonzero(written.numbers_P >= 0)
        found = np.full((len(written.numbers_P), size), np.nan)
        if jax.process_index() or not len(there):
            return found
        for place in there:
            asked = side[written.numbers_P[place]]
            rows = written.tokens_RC[place * size : (place + 1) * size].tolist()
            groups.append(Group(asked, [self._text(asked, row) for row in rows]))
        said = self._rewards.error
        found[there] = self._rewards(groups)
        if self._rewards.error and not said:
            progress.say(f"a reward is missing, its completion is left out: {self._rewards.error}")
        return found

    def _text(self, asked: Asked, tokens: Sequence[int]) -> str:
        return completion_text(self._model, asked, tokens, self.end_ids, self._policy.stop)

    def _rows(self, side: Sequence[Asked], drawn: Drawing) -> dict[str, np.ndarray]:
        """What the pass of training reads, [R, T + C], and what is said of its completions."""
        size = self._policy.samples
        prompt = prompt_rows(side, drawn.numbers_P, self.length)
        mask_RT = np.repeat(prompt["attention_mask"], size, axis=0)
        real_RC = drawn.tokens_RC >= 0
        ids_RC = np.where(real_RC, drawn.tokens_RC, 0)
        segments_RS = np.concatenate([mask_RT, real_RC], axis=1).astype(np.int32)
        scored_R = drawn.scored_PG.reshape(-1)
        return {
            "input_ids": np.concatenate([np.repeat(prompt["input_ids"], size, axis=0), ids_RC], axis=1),
            "segment_ids": segments_RS,
            "positions": np.where(segments_RS > 0, np.cumsum(segments_RS, axis=1) - 1, 0).astype(np.int32),
            "completions": ids_RC.astype(np.int32),
            "weights": (real_RC & scored_R[:, None]).astype(np.float32),
            "drawn_logprobs": drawn.logprobs_RC.astype(np.float32),
            "prompt": np.repeat(drawn.numbers_P, size).astype(np.int32),
            "counted": np.repeat(drawn.numbers_P >= 0, size).astype(np.float32),
            "lengths": real_RC.sum(1).astype(np.float32),
            "cut": (~drawn.ended_R).astype(np.float32),
        }

    def _placed(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Arrays that every process has whole, on the mesh as batches lie."""
        axes = token_axes(dict(arrays))

        def place(name: str, array: np.ndarray) -> jax.Array:
            layout = batch_sharding(array.shape, self._mesh, axes[name])
            return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

        return {name: place(name, array) for name, array in arrays.items()}

    def _write(self, step: int, side: Sequence[Asked], drawn: Drawing) -> None:
        """The best, the worst and a random completion of a step."""
        assert self._file is not None
        rewards_R = drawn.rewards_PG.reshape(-1)
        scored = np.flatnonzero(drawn.scored_PG)
        if not len(scored):
            return
        order = scored[np.argsort(rewards_R[scored], kind="stable")]
        chosen = {"best": order[-1], "worst": order[0], "random": scored[step * 7919 % len(scored)]}
        with self._file.open("a", encoding="utf-8") as file:
            for which, row in chosen.items():
                tokens = drawn.tokens_RC[row]
                asked = side[int(drawn.numbers_P[row // self._policy.samples])]
                record = {
                    "step": step,
                    "which": which,
                    "prompt": asked.text,
                    "completion": self._text(asked, tokens.tolist()),
                    "reward": float(rewards_R[row]),
                    "tokens": int((tokens >= 0).sum()),
                    "ended": bool(drawn.ended_R[row]),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def policy_params(state: TrainState) -> dict:
    """The parameters of the model that draws."""
    return {name: part for name, part in state.complete.items() if name != REFERENCE}


def prompt_rows(side: Sequence[Asked], numbers_P: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Prompts padded on the left, int32 [P, T]; of number -1, a row of padding alone."""
    ids_PT = np.zeros((len(numbers_P), length), np.int32)
    mask_PT = np.zeros_like(ids_PT)
    for row, number in enumerate(numbers_P):
        if number >= 0:
            ids = side[number].ids
            ids_PT[row, length - len(ids) :], mask_PT[row, length - len(ids) :] = ids, 1
    return {"input_ids": ids_PT, "attention_mask": mask_PT}


@functools.partial(jax.jit, static_argnames=("model", "temperature", "execution"))
def _scored(model: ModelConfig, params: Any, batch: dict, temperature: float, execution: Execution) -> jax.Array:
    return completion_logprobs(model, params, batch, temperature, execution)
