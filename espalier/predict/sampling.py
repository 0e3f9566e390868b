"""How text is generated: the settings, and what of them a published model names. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from espalier.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. Unset fields follow the generation_config.json of the published model that the run
    began with, else the default given here."""

    max_new_tokens: int = 100
    """Tokens to add to each prompt; a row ends early at the end-of-text token."""
    temperature: float | None = None
    """Below 1 = safer, above 1 = wilder, 0 = always the most probable token; default 0.8, 0 of runs tuned to answer."""
    top_k: int | None = None
    """Draw among the k most probable tokens (Fan et al. 2018); 0 = all, the default."""
    top_p: float | None = None
    """Draw among the most probable tokens that together reach this probability (Holtzman et al. 2020); 1 = all, the
    default."""
    repetition_penalty: float | None = None
    """Above 1 = tokens that are there already become less probable (Keskar et al. 2019); 1 = none, the default."""
    beams: int = 1
    """Follow so many continuations at once and keep the best (for translation); 1 = draw."""
    length_penalty: float = 1.0
    """With beams: log p is divided by the length to this power; above 1 = longer, below = shorter."""
    stop: tuple[str, ...] = ()
    """Texts at which a completion ends, besides the end-of-text token; what it says ends before them."""
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise UserError(f"sampling.seed={self.seed} must lie between 0 and {2**32 - 1}")
        temperature, top_k, top_p = self.drawn
        if self.max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"max_new_tokens={self.max_new_tokens} (at least 1), temperature={temperature} (0 or more), "
                f"top_k={top_k} (0 or more), top_p={top_p} (above 0, up to 1): correct what is out of range"
            )
        if self.beams < 1 or (self.repetition_penalty is not None and self.repetition_penalty <= 0):
            raise UserError(
                f"beams={self.beams} (at least 1), repetition_penalty={self.repetition_penalty} (above 0): correct "
                "what is out of range"
            )
        if self.beams > 1 and self.temperature:
            raise UserError(
                f"beams={self.beams} are followed and not drawn, and temperature={self.temperature} is for drawing; "
                "give one of the two"
            )
        check_stops(self.stop)

    @property
    def drawn(self) -> tuple[float, int, float]:
        """(temperature, top_k, top_p)."""
        return (
            0.8 if self.temperature is None else self.temperature,
            self.top_k or 0,
            1.0 if self.top_p is None else self.top_p,
        )


LONGEST_STOPS = 256


def check_stops(stops: Sequence[str]) -> None:
    """UserError for stops at which nothing can end, or that are too long to be looked for."""
    if "" in stops:
        raise UserError("stop holds an empty text, at which nothing can end; leave it out")
    for stop in stops:
        if any("\ud800" <= character <= "\udfff" for character in stop):
            raise UserError(f"stop {ascii(stop)} holds bytes that are not valid text; write it in UTF-8")
    if (size := sum(len(stop.encode()) for stop in stops)) > LONGEST_STOPS:
        raise UserError(f"stop: the texts have {size:,} bytes together, at most {LONGEST_STOPS}; give shorter ones")


@dataclass(frozen=True)
class UnmaskingConfig:
    """How a model of masked diffusion writes."""

    steps: int | None = None
    """Passes of the model, among which the new tokens are divided; unset = one for each token, which is best."""
    order: Literal["confidence", "random"] = "confidence"
    """Which tokens of a pass are kept: those it is surest of, or any."""

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise UserError(f"unmasking.steps={self.steps} must be at least 1")
        if self.order not in ("confidence", "random"):
            raise UserError(f"unmasking.order={self.order!r} is not one of confidence, random")


SAMPLED = ("temperature", "top_k", "top_p", "repetition_penalty")
"""Settings of generation_config.json that are applied."""
BESIDE = ("do_sample", "max_length", "max_new_tokens", "use_cache", "cache_implementation", "transformers_version")
"""Those that do not change which token comes next."""
IDENTITY = ("encoder_repetition_penalty", "length_penalty", "typical_p", "num_beams")
"""Those that change nothing where they are 1."""


def sampling_of(values: Mapping[str, Any], sampling: SamplingConfig) -> tuple[SamplingConfig, list[str]]:
    """(sampling, its unset fields filled in from a model's generation_config.json; what of that is not applied).

    As in transformers, do_sample means temperature 1 and top_k 50 where the file names none, and its opposite always
    the most probable token. Without do_sample what is named counts.
    """
    stated = {name: values[name] for name in SAMPLED if values.get(name) is not None}
    if values.get("do_sample"):
        stated = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | stated
    elif values.get("do_sample") is False:
        stated |= {"temperature": 0.0}
        stated = {name: value for name, value in stated.items() if name in ("temperature", "repetition_penalty")}
    ignored = [
        f"{name} {value}"
        for name, value in values.items()
        if name not in SAMPLED + BESIDE
        and not name.startswith("_")
        and not name.endswith("_token_id")
        and value not in (None, False, 0, [], {})
        and not (name in IDENTITY and value == 1)
    ]
    if sampling.beams > 1:
        stated = {name: value for name, value in stated.items() if name == "repetition_penalty"}
    unset = {name: value for name, value in stated.items() if getattr(sampling, name) is None}
    return replace(sampling, **unset), ignored
