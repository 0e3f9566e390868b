"""What completions are rewarded by: built in, a model, or a function of the user's own, and sums of these.

exact            1 where the completion is the answer, blanks around both aside
arithmetic       1 where the last number of the completion has the value of the answer, a number or sums, products …
regex:PATTERN    1 where the pattern is found in it
format:PATTERN   1 where the pattern is all of it
length:N         0 up to N characters, then -1/N for each more, down to -1
model:RUN        what a reward model gives to prompt and completion, or log p of a classifier's last label
FILE.py:NAME     reward(prompts, completions, row) -> floats, for the completions of one prompt at a time
"""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from espalier import user_code
from espalier.errors import UserError
from finetune.tasks.reinforce.processes import Processes

if TYPE_CHECKING:
    from finetune.tasks.reinforce.prompts import Asked
    from finetune.tasks.reinforce.record import ReinforceData

BUILT_IN = ("exact", "arithmetic", "regex:PATTERN", "format:PATTERN", "length:N", "model:RUN", user_code.FORMS)
NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
FORM = "reward(prompts, completions, row)"
LARGEST = 10**9
"""Exponents and results of answers that are worked out stay below it."""


class Group(NamedTuple):
    """The completions of one prompt."""

    asked: Asked
    completions: Sequence[str]


class Rewards:
    """The sum of the rewards of a run, with errors counted. To be closed."""

    def __init__(self, data: ReinforceData):
        """UserError for a reward that there is not, or none."""
        if not data.reward:
            raise UserError(f"no --data.reward given; there are {', '.join(BUILT_IN)}")
        weights = data.reward_weights or (1.0,) * len(data.reward)
        self._parts = [(name, weight, _scorer(name, data)) for name, weight in zip(data.reward, weights, strict=True)]
        self.user_code = {
            f"reward {name}": user_code.recorded(name) for name in data.reward if _kind(name) == "function"
        }
        self.error = ""
        """The last one, a line."""

    def __call__(self, groups: Sequence[Group]) -> np.ndarray:
        """float64 [groups, completions]; NaN where a reward raised, took too long, or is no number."""
        total = np.zeros((len(groups), max(len(group.completions) for group in groups)))
        for name, weight, score in self._parts:
            for row, found in enumerate(score(groups)):
                if isinstance(found, str):
                    self.error, found = f"{name}: {found}", [math.nan] * len(groups[row].completions)
                elif not np.isfinite(found).all():
                    self.error = f"{name}: a reward that is {found[int(np.argmin(np.isfinite(found)))]}"
                total[row] += weight * np.where(np.isfinite(found), found, np.nan)
        return total

    def check(self, asked: Asked) -> None:
        """UserError where not even a first prompt with empty completions is given rewards."""
        if np.isnan(self([Group(asked, ("", asked.answer))])).all():
            raise UserError(
                f"data.reward {self.error} ({FORM} was tried on {asked.place} with an empty completion); correct it"
            )

    def close(self) -> None:
        for *_, score in self._parts:
            if isinstance(score, Processes):
                score.close()


Score = Callable[[Sequence[Group]], Sequence[Sequence[float] | str]]
"""Groups → the rewards of each, or a line on what went wrong."""


def _kind(name: str) -> str:
    head = name.partition(":")[0]
    if name in ("exact", "arithmetic") or head in ("regex", "format", "length", "model") and ":" in name:
        return head
    return "function"


def _scorer(name: str, data: ReinforceData) -> Score:
    kind, argument = _kind(name), name.partition(":")[2]
    if kind == "function":
        if ":" not in name:
            raise UserError(f"data.reward={name!r} is unknown; there are {', '.join(BUILT_IN)}")
        user_code.function(name, FORM)
        return Processes(name, data.reward_processes, data.reward_timeout)
    if kind == "model":
        return _of_model(argument)
    if kind in ("regex", "format"):
        try:
            pattern = re.compile(argument, re.DOTALL)
        except re.error as error:
            raise UserError(f"data.reward={name!r}: {argument!r} is no regular expression ({error})") from None
        found = pattern.search if kind == "regex" else pattern.fullmatch
        return _each(lambda text, answer: float(found(text.strip()) is not None))
    if kind == "length":
        if not argument.isdecimal() or not int(argument):
            raise UserError(f"data.reward={name!r}: {argument!r} is no number of characters; try length:200")
        return _each(lambda text, answer: -min(1.0, max(0, len(text) - int(argument)) / int(argument)))
    return _each(exact if kind == "exact" else arithmetic)


def _each(function: Callable[[str, str], float]) -> Score:
    def score(groups: Sequence[Group]) -> list[Sequence[float] | str]:
        return [[function(text, group.asked.answer) for text in group.completions] for group in groups]

    return score


def exact(text: str, answer: str) -> float:
    """1 where both are the same, blanks around them aside."""
    return float(text.strip() == answer.strip())


def arithmetic(text: str, answer: str) -> float:
    """1 where the last number of the text has the value of the answer: a number, or an expression of + - * / ( )."""
    numbers = NUMBER.findall(text)
    wanted = worked_out(answer)
    return float(bool(numbers) and wanted is not None and worked_out(numbers[-1].replace(",", "")) == wanted)


def worked_out(expression: str) -> Fraction | None:
    """The value of a number or of an expression of + - * / ( ); None for anything else. Nothing is executed."""
    operations = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in operations:
            return operations[type(node.op)](value(node.left), value(node.right))
        raise ValueError(expression)

    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", expression.strip())
    if len(plain) > 200:
        return None
    try:
        return value(ast.parse(plain, mode="eval"))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _of_model(run: str) -> Score:
    """A reward model on texts of prompt and completion; of a classifier, log p of its last class."""
    if not run:
        raise UserError("data.reward='model:' names no run; give model:RUN or model:hf:ID")
    import jax

    from espalier.loading import load
    from espalier.predict.score import encode_answers, rewards
    from sharding.mesh import MeshConfig, build_mesh

    model = load(run)
    scores = model.saved.get("task") == "reward"
    if not scores and model.head != "sequence_classification":
        raise UserError(f"data.reward=model:{run} has the head {model.head}; give a reward model or a classifier")

    # One process asks for rewards, and the mesh of the run may have the devices of others.
    mesh = build_mesh(MeshConfig(), jax.local_devices())
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = dataclasses.replace(model, params=jax.device_put(model.params, whole))

    def score(groups: Sequence[Group]) -> list[Sequence[float] | str]:
        pairs = [(group.asked.text, text) for group in groups for text in group.completions]
        with jax.set_mesh(mesh):
            if scores:
                found_N = np.asarray(rewards(model, pairs), np.float64)
            else:
                texts = [("", prompt + text) for prompt, text in pairs]
                examples = encode_answers(model.tokenizer, texts, model.longest, model.config.causal)
                logits_NC = np.array(model.outputs_of_head(examples), np.float64)
                normaliser_N = np.logaddexp.reduce(logits_NC, axis=1) if logits_NC.shape[1] > 1 else 0.0
                found_N = logits_NC[:, -1] - normaliser_N
        ends = np.cumsum([len(group.completions) for group in groups])[:-1]
        return [part.tolist() for part in np.split(found_N, ends)]

    return score
