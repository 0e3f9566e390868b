"""Scaling laws between model size, data and compute, as published, and what published models did.

Every constant stands beside its source (arXiv ids). N parameters, embeddings included; D training tokens; C training
FLOPs, counted as C = 6·N·D (Kaplan et al. 2020, 2001.08361, section 2.1). Imports nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""2 forward, 4 backward; attention between positions and recomputation not counted."""


@dataclass(frozen=True)
class Loss:
    """L(N, D) = E + A / N^alpha + B / D^beta, nats a token (Hoffmann et al. 2022, equation 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


@dataclass(frozen=True)
class Allocation:
    """A model size with the tokens that a law gives it."""

    parameters: float
    tokens: float

    @property
    def flops(self) -> float:
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * self.tokens

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Law:
    """The model for a compute budget: N = coefficient · C^exponent, and D = C / 6N."""

    name: str
    source: str
    coefficient: float
    exponent: float
    loss: Loss | None = None

    def at_flops(self, flops: float) -> Allocation:
        parameters = self.coefficient * flops**self.exponent
        return Allocation(parameters, flops / (FLOPS_PER_PARAMETER_AND_TOKEN * parameters))

    def at_parameters(self, parameters: float) -> Allocation:
        flops = (parameters / self.coefficient) ** (1 / self.exponent)
        return Allocation(parameters, flops / (FLOPS_PER_PARAMETER_AND_TOKEN * parameters))

    def at_tokens(self, tokens: float) -> Allocation:
        scale = FLOPS_PER_PARAMETER_AND_TOKEN * self.coefficient * tokens
        return Allocation(self.at_flops(scale ** (1 / (1 - self.exponent))).parameters, tokens)


def of_ratio(name: str, source: str, ratio: float) -> Law:
    """As many tokens per parameter at every size: N = √(C / 6·ratio)."""
    return Law(name, source, (FLOPS_PER_PARAMETER_AND_TOKEN * ratio) ** -0.5, 0.5)


def of_loss(name: str, source: str, loss: Loss) -> Law:
    """The minimum of L(N, D) on C = 6·N·D: N = G·(C/6)^a (Hoffmann et al. 2022, equation 4)."""
    both = loss.alpha + loss.beta
    G = (loss.alpha * loss.A / (loss.beta * loss.B)) ** (1 / both)
    a = loss.beta / both
    return Law(name, source, G * FLOPS_PER_PARAMETER_AND_TOKEN**-a, a, loss)


def of_tokens(name: str, source: str, coefficient: float, exponent: float) -> Law:
    """From a law of the tokens, D = coefficient · C^exponent."""
    return Law(name, source, 1 / (FLOPS_PER_PARAMETER_AND_TOKEN * coefficient), 1 - exponent)


# Approaches 1 and 2 find N and D growing alike, a = 0.50 and 0.49 (table 2). Their pairs (tables 3 and A3) have 19
# to 26 tokens a parameter, 20 at the smallest sizes; Chinchilla itself had 20.
CHINCHILLA = of_ratio("Hoffmann 2022, 20 tokens each", "2203.15556, approaches 1 and 2", 20.0)
# The exponents and E to four digits stand in the paper's TeX source (quoted by Besiroglu et al., section 2); the
# rounded ones of its text, 0.34 and 0.28, miss its own table A3 by half.
CHINCHILLA_FIT = of_loss(
    "Hoffmann 2022, fitted loss", "2203.15556, approach 3", Loss(1.6934, 406.4, 410.7, 0.3392, 0.2849)
)
# The fit of approach 3 to the points of Hoffmann's figure 4, made again: theirs had stopped early.
BESIROGLU = of_loss("Besiroglu 2024, loss refitted", "2404.10102", Loss(1.8172, 482.01, 2085.43, 0.3478, 0.3658))
# Figure 3 is labelled 0.299·C^0.537 (the text rounds to 0.29 and 0.53): the tokens for a budget.
LLAMA3 = of_tokens("Grattafiori 2024, Llama 3", "2407.21783, section 3.2.1", 0.299, 0.537)
# Equation 4: M = 0.1715·C^0.5243 with C = M·D, M being FLOPs a token of all but the vocabulary; here M = 6·N.
DEEPSEEK = Law("Bi 2024, DeepSeek LLM", "2401.02954, equation 4", 0.1715 / 6, 0.5243)

CAUSAL_LAWS = (CHINCHILLA, CHINCHILLA_FIT, BESIROGLU, LLAMA3, DEEPSEEK)
FITTED_FLOPS = (6e18, 1e22)
"""Budgets of the runs behind these laws: Hoffmann 6e18 to 3e21, Llama 3 6e18 to 1e22."""


@dataclass(frozen=True)
class Published:
    """A published model: what it had, and where that is written."""

    name: str
    task: Literal["causal", "masked"]
    parameters: float
    tokens: float
    source: str

    @property
    def allocation(self) -> Allocation:
        return Allocation(self.parameters, self.tokens)


# 1M steps of 256 rows of 512: 40 epochs of 3.3B words (appendix A.2). Nine steps in ten had rows of 128 only, so that
# fewer tokens were seen; GPT-3's table D.1 counts 250B.
BERT = Published("BERT-base", "masked", 110e6, 1e6 * 256 * 512, "1810.04805, appendix A.2")
PUBLISHED = (
    BERT,
    Published("BERT-large", "masked", 340e6, 1e6 * 256 * 512, "1810.04805, appendix A.2"),
    # 500k steps of 8k rows of 512.
    Published("RoBERTa-large", "masked", 355e6, 500e3 * 8192 * 512, "1907.11692, section 5"),
    Published("ModernBERT-base", "masked", 149e6, 2e12, "2412.13663, abstract"),
    Published("ModernBERT-large", "masked", 395e6, 2e12, "2412.13663, abstract"),
    Published("GPT-3", "causal", 174.6e9, 300e9, "2005.14165, table D.1"),
    Published("Chinchilla", "causal", 70e9, 1.4e12, "2203.15556, abstract"),
    Published("Llama 3 8B", "causal", 8e9, 15e12, "2407.21783, section 3"),
    Published("Llama 3 70B", "causal", 70e9, 15e12, "2407.21783, section 3"),
    Published("Llama 3 405B", "causal", 405e9, 15.6e12, "2407.21783, section 3"),
)
ENCODER_HABITS = tuple(
    of_ratio(f"as {model.name}", model.source, model.allocation.ratio) for model in PUBLISHED if model.task == "masked"
)
"""No law: tokens per parameter that published encoders had."""


@dataclass(frozen=True)
class Guide:
    """The laws for one kind of model, and the one that a plan follows."""

    title: str
    laws: tuple[Law, ...]
    followed: Law
    why: str
    """Why that one."""
    length: int
    """Tokens of a row, if no preset sets it."""


def guide(causal: bool) -> Guide:
    """The laws for causal or for masked language models."""
    return CAUSAL if causal else MASKED


CAUSAL = Guide(
    "causal LM, by law",
    CAUSAL_LAWS,
    BESIROGLU,
    "Hoffmann's runs fitted anew; unlike their own fit it agrees with their approaches 1 and 2, and it predicts a loss",
    1024,
)
MASKED = Guide(
    "masked LM, as published encoders",
    ENCODER_HABITS,
    ENCODER_HABITS[0],
    "no compute-optimal law of like standing is known for masked LM; these ratios are what published encoders had, and "
    "the plan follows BERT-base",
    512,
)


ZHANG_ROW = 512
"""Tokens in the rows by which Zhang et al. count batches."""


def critical_batch(tokens: float) -> float:
    """Tokens in the largest batch that needs at most a fifth more steps × rows (Zhang et al. 2024, 2410.21676).

    B = 22.91·D^0.47 rows of 512, D in millions. It grows with the data and hardly with the model: at a given D their
    fit to model sizes has the exponent 0.087. Measured on causal models of 85M to 1.2B parameters.
    """
    return 22.91 * (tokens / 1e6) ** 0.47 * ZHANG_ROW


def critical_batch_at_loss(loss: float) -> float:
    """Tokens; B = 2e8 / L^(1/0.21) (Kaplan et al. 2020, 2001.08361, equation 1.4), which is the noise scale of

    McCandlish et al. 2018 (1812.06162). Their loss is of another text and vocabulary: an order of magnitude.
    """
    return 2e8 / loss ** (1 / 0.21)


def best_batch(tokens: float) -> float:
    """Tokens in the batch of least loss, time no object: B = 0.58·D^0.571 (Li et al. 2025, 2503.04715)."""
    return 0.58 * tokens**0.571


def best_batch_at_flops(flops: float) -> float:
    """Tokens in the batch of least loss: B = 0.2920·C^0.3271 (Bi et al. 2024, DeepSeek LLM, 2401.02954, equation 1)."""
    return 0.2920 * flops**0.3271


BYTES_PER_TOKEN = 39_769_491_688 / (9_035_582_198 + 4_434_897)
"""4.4: the bytes of OpenWebText (Hugging Face, Skylion007/openwebtext, dataset_size) over its tokens in GPT-2's
vocabulary of 50,257 (nanoGPT, data/openwebtext/prepare.py). English; code and other languages take fewer bytes."""

FREE_EPOCHS = 4
"""Epochs over the same text before the loss is noticeably worse than with new text (Muennighoff et al. 2023,
2305.16264, abstract)."""
REPEATS_WORTH = 15.39
"""R_D* of Muennighoff et al. 2023: the repetitions after which another one is worth 1/e of new text."""


def worth_of_epochs(epochs: float) -> float:
    """How many epochs of new text they replace: 1 + R·(1 - exp(-(epochs - 1) / R))"""
    return 1 + REPEATS_WORTH * (1 - math.exp(-(epochs - 1) / REPEATS_WORTH))
