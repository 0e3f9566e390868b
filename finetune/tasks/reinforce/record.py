"""What reinforcement is: its settings, presets, and the record from which runs, reports and cards read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from espalier.data.text_template import template_parts
from espalier.errors import UserError
from espalier.predict.sampling import check_stops
from espalier.short_help import often
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneConfig, FinetuneData
from finetune.task import FinetuneTask
from finetune.tasks.reinforce.report import REPORT


@dataclass(frozen=True)
class ReinforceData(FinetuneData):
    """Prompts (`prompt`, a text or messages; `messages`; or fields for a template), with any further columns, which
    rewards may read: .jsonl, .json, .csv, .tsv, .parquet (also .gz, .zst, URLs), hf:…"""

    template: str | None = often(None)
    """Text with fields of the file, "{question} = {answer}": what stands before the last field is the prompt."""
    chat: bool = False
    """Whether a prompt that is a text is what the user says in a chat; else it is continued."""
    answer: str = "answer"
    """Column with what the built-in rewards compare with; with a template its last field."""
    reward: tuple[str, ...] = often(())
    """What is rewarded, added up: exact, arithmetic, regex:PATTERN, format:PATTERN, length:N, model:RUN, or
    FILE.py:NAME with a function reward(prompts, completions, row) -> floats."""
    reward_weights: tuple[float, ...] = ()
    """A factor for each reward; unset = 1."""
    reward_timeout: float = 30.0
    """Seconds that a function of your own may take for the completions of one prompt."""
    reward_processes: int = 2
    """Processes in which a function of your own runs."""
    validation_samples: int = 8
    """k: completions of each validation prompt at the end, for pass@1 and pass@k."""

    def __post_init__(self):
        super().__post_init__()
        if self.template is not None:
            template_parts(self.template)
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise UserError(
                f"data.reward_weights has {len(self.reward_weights)} numbers for {len(self.reward)} rewards; give one "
                "each"
            )
        if self.reward_timeout <= 0 or self.reward_processes < 1 or self.validation_samples < 1:
            raise UserError(
                f"data.reward_timeout={self.reward_timeout} (above 0), data.reward_processes={self.reward_processes} "
                f"(at least 1), data.validation_samples={self.validation_samples} (at least 1): correct what is out of "
                "range"
            )


@dataclass(frozen=True)
class PolicyGradient:
    """How completions are drawn, and what is learnt from their rewards. The defaults are the plainest that works."""

    samples: int = often(8)
    """G: completions of each prompt, a group."""
    max_new_tokens: int = often(32)
    """C: tokens of a completion at most."""
    temperature: float = 1.0
    """Scores are divided by it where tokens are drawn, and likewise where their probabilities are learnt."""
    stop: tuple[str, ...] = ()
    """Texts at which a completion ends, besides end tokens; what is rewarded ends before them, what is learnt with the
    token that completed one."""
    slots: int = 0
    """Draw in so many rows, which are filled again as completions end; 0 = all completions of a step at once."""
    asynchronous: bool = False
    """Draw the completions of the next batch before a step, so that their rewards are worked out while it trains. They
    are one step behind: what is learnt is clipped by exp(log π - log π where they were drawn) (PPO)."""
    baseline: Literal["mean", "leave-one-out", "none"] = "mean"
    """What is taken off a reward: the mean of its group; the mean of the others in it, by which the gradient is
    unbiased (RLOO, Ahmadian et al. 2024); or nothing."""
    deviation: bool = False
    """Divide by the standard deviation of the group, as GRPO does (Shao et al. 2024)."""
    normaliser: Literal["budget", "tokens", "sequence"] = "budget"
    """What sums over tokens are divided by: rows × C, a constant (Dr. GRPO, Liu et al. 2025); all tokens (DAPO, Yu et
    al. 2025); or each completion by its own length (GRPO)."""
    updates: int = 1
    """Steps on the same completions."""
    clip: float = 0.2
    """With several updates, ratios of probabilities below 1 - clip or above 1 + clip gain nothing more (PPO, Schulman
    et al. 2017)."""
    clip_high: float | None = None
    """The bound above, where it is another (DAPO takes 0.28)."""
    beta: float = 0.0
    """Weight of the KL divergence from the model that the run began with; 0 = none. That model is kept beside the one
    that learns; with --lora.rank it is the one with its adapters switched off."""
    kl: Literal["k1", "k3"] = "k1"
    """k1: log π/π_ref of a completion is taken off its reward, whose gradient is that of the KL; k3: Schulman's
    estimator (2020) is added to the loss of each token, as GRPO does."""
    correction: float | None = None
    """Weigh tokens by the ratio of their probabilities in training and where they were drawn, up to this (truncated
    importance sampling, Yao et al. 2025); unset = not."""
    mismatch: float = 0.2
    """Completions whose log-probabilities where they were drawn and in training differ by more than so many nats a
    token on average are left out: drawing and training are then not the same policy."""
    resample: int = 0
    """Rounds in which prompts whose completions all have the same reward are replaced by others (DAPO)."""
    cut: Literal["zero", "left-out", "scored"] = "zero"
    """Completions that did not end within C tokens: their reward is 0, they are left out, or scored as they are."""
    solved: float = 1.0
    """The reward from which a prompt counts as solved, for pass@1 and pass@k."""

    def __post_init__(self):
        if self.samples < 2 and self.baseline != "none":
            raise UserError(
                f"policy.samples={self.samples}: a baseline needs others to compare with; give 2 or more, or "
                "--policy.baseline none"
            )
        if self.samples < 2 and self.deviation:
            raise UserError(f"policy.samples={self.samples} have no deviation; give 2 or more")
        for name, low in (("samples", 1), ("max_new_tokens", 1), ("updates", 1), ("resample", 0)):
            if getattr(self, name) < low:
                raise UserError(f"policy.{name}={getattr(self, name)} must be at least {low}")
        check_stops(self.stop)
        if self.slots and self.slots < self.samples:
            raise UserError(
                f"policy.slots={self.slots} hold no group of policy.samples={self.samples}; give at least as many, or "
                "0 = all completions at once"
            )
        if self.asynchronous and (self.resample or self.correction is not None):
            other = "resample" if self.resample else "correction"
            why = "the policy that would draw once more is gone" if self.resample else "the ratio corrects already"
            raise UserError(f"policy.asynchronous does not go with policy.{other}: {why}; leave out one of both")
        if not self.temperature > 0:
            raise UserError(f"policy.temperature={self.temperature} must be above 0; try 1")
        if not 0 < self.clip < 1 or self.clip_high is not None and not self.clip_high > 0:
            raise UserError(
                f"policy.clip={self.clip} must be between 0 and 1, policy.clip_high={self.clip_high} above 0; try 0.2"
            )
        if self.beta < 0 or self.mismatch <= 0 or self.correction is not None and self.correction < 1:
            raise UserError(
                f"policy.beta={self.beta} (0 or more), policy.mismatch={self.mismatch} (above 0), policy.correction="
                f"{self.correction} (at least 1): correct what is out of range"
            )


@dataclass(frozen=True)
class ReinforceConfig(FinetuneConfig):
    """A fine-tuning run in which a decoder learns from the rewards of what it writes. The batch size counts prompts."""

    task: ClassVar[str] = "reinforcement"
    dropout: float = 0.0
    """Dropout of hidden states and attention, which must be 0: what is drawn and what is trained are one policy."""
    policy: PolicyGradient = field(default_factory=PolicyGradient)
    data: ReinforceData = field(default_factory=ReinforceData)

    def __post_init__(self):
        super().__post_init__()
        if self.dropout:
            raise UserError(f"dropout={self.dropout}: what is drawn and what is trained must be one policy; give 0")
        if self.policy.beta and self.freeze:
            raise UserError(
                "policy.beta keeps a whole reference model, for which --freeze leaves no place; leave out one of both, "
                "or train adapters (--lora.rank), whose base is the reference"
            )
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", 200)


def reinforce() -> ReinforceConfig:
    """Learn from rewards: `./launch.sh finetune reinforce --init-from RUN --data.train F … --data.reward exact`.

    A decoder, by REINFORCE with the mean of a group as its baseline; GRPO and others by --policy.
    """
    return ReinforceConfig(log_every=10, batch_size=16, checkpoint=CheckpointConfig(every=100))


REINFORCE = FinetuneTask(
    name="reinforcement",
    head="causal_lm",
    splits_rows=False,
    report=REPORT,
    data=ReinforceData,
    place="finetune.tasks.reinforce.task:Reinforcement",
)
