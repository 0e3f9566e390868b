"""Text from a causal-LM checkpoint: `python -m clm.generate RUN --prompt "…" "…"`.

The command line and the way from text to token ids and back; tokens are drawn by `espalier.models.generate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from espalier import cli, progress
from espalier.errors import UserError

if TYPE_CHECKING:
    from espalier.models.config import ModelConfig


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. Unset fields follow the generation_config.json of the published model that the run
    began with, else the default given here."""

    max_new_tokens: int = 100
    """Tokens to add to each prompt; a row ends early at the end-of-text token."""
    temperature: float | None = None
    """Below 1 = safer, above 1 = wilder, 0 = always the most probable token; default 0.8."""
    top_k: int | None = None
    """Draw among the k most probable tokens (Fan et al. 2018); 0 = all, the default."""
    top_p: float | None = None
    """Draw among the most probable tokens that together reach this probability (Holtzman et al. 2020); 1 = all, the
    default."""
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

    @property
    def drawn(self) -> tuple[float, int, float]:
        """(temperature, top_k, top_p)."""
        return (
            0.8 if self.temperature is None else self.temperature,
            self.top_k or 0,
            1.0 if self.top_p is None else self.top_p,
        )


@dataclass(frozen=True)
class GenerateConfig:
    """Generate text from a run directory."""

    run_dir: str
    """Run directory of a causal-LM run."""
    prompt: tuple[str, ...] = ("",)
    """One or more beginnings; an empty one starts from nothing."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    json: bool = False
    """Print one JSON object with prompts and completions as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if not self.prompt:
            raise UserError('--prompt needs a text, for instance --prompt "Once upon a time"; leave it out for none')
        for text in self.prompt:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(
                    f"--prompt {ascii(text)} holds bytes that are not valid text; write it in UTF-8, with LANG=C.UTF-8"
                )


def generate(
    config: ModelConfig, params, prompts: list[list[int]], sampling: SamplingConfig, *, end_ids: tuple[int, ...]
) -> list[list[int]]:
    """Continue prompts of token ids (each at least one); returns the new ids of each row up to one of `end_ids`.

    UserError where the model has no positions for them.
    """
    import jax

    from espalier.models import generate as models

    longest = max(map(len, prompts))
    total = longest + sampling.max_new_tokens
    if config.max_length is not None and total > config.max_length:
        room = config.max_length - longest
        raise UserError(
            f"prompt of {longest} tokens + max_new_tokens={sampling.max_new_tokens} = {total} exceeds the model's "
            f"{config.max_length} positions; "
            + (f"try --sampling.max-new-tokens {room}" if room > 0 else "give a shorter prompt")
        )
    how = models.Sampling(sampling.max_new_tokens, *sampling.drawn, end_ids)
    drawn = models.generate(config, params, prompts, jax.random.key(sampling.seed), how)
    return [[int(token) for token in row if token >= 0 and token not in end_ids] for row in drawn.tokens_BG]


def continue_texts(
    model: ModelConfig,
    params,
    tokenizer,
    texts,
    sampling: SamplingConfig = SamplingConfig(),
    end_ids: tuple[int, ...] = (),
) -> list[str]:
    """A completion for each text, of whole characters; an empty text starts from the beginning-of-text token alone.

    end_ids: tokens at which a text ends, besides the tokenizer's end-of-text token.
    """
    from espalier.data.tokenizer import plain_backend, special_ids

    specials = special_ids(tokenizer, need=("bos", "eos"))
    # As in training: a special token that is spelled out in a prompt is text.
    backend = plain_backend(tokenizer)
    prompts = [[specials.bos, *backend.encode(text, add_special_tokens=False).ids] for text in texts]
    assert specials.eos is not None
    ends = tuple(sorted({specials.eos, *end_ids}))
    new = generate(model, params, prompts, sampling, end_ids=ends)
    return [whole_characters(tokenizer.decode(ids)) for ids in new]


def whole_characters(text: str) -> str:
    """Decoded tokens without incomplete characters.

    A token of a byte-level vocabulary may be a part of a character. The rest is missing where the text ends at
    max_new_tokens, and anywhere in the text of a barely trained model; decoders put U+FFFD in its place.
    """
    return text.replace("\ufffd", "")


SAMPLED = ("temperature", "top_k", "top_p")
"""Settings of generation_config.json that are applied."""
BESIDE = ("do_sample", "max_length", "max_new_tokens", "use_cache", "cache_implementation", "transformers_version")
"""Those that do not change which token comes next."""
IDENTITY = ("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p", "num_beams")
"""Those that change nothing where they are 1."""


def sampling_of(values: dict, sampling: SamplingConfig) -> tuple[SamplingConfig, list[str]]:
    """(sampling, its unset fields filled in from a model's generation_config.json; what of that is not applied).

    As in transformers, do_sample means temperature 1 and top_k 50 where the file names none, and its opposite always
    the most probable token. Without do_sample what is named counts.
    """
    stated = {name: values[name] for name in SAMPLED if values.get(name) is not None}
    if values.get("do_sample"):
        stated = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | stated
    elif values.get("do_sample") is False:
        stated = {"temperature": 0.0}
    ignored = [
        f"{name} {value}"
        for name, value in values.items()
        if name not in SAMPLED + BESIDE
        and not name.startswith("_")
        and not name.endswith("_token_id")
        and value not in (None, False, 0, [], {})
        and not (name in IDENTITY and value == 1)
    ]
    unset = {name: value for name, value in stated.items() if getattr(sampling, name) is None}
    return replace(sampling, **unset), ignored


def main(config: GenerateConfig) -> dict:
    """Load the newest checkpoint of the run and print a completion for every prompt."""
    completions = _completions(config)
    for text, completion in zip(config.prompt, completions, strict=True):
        print(f"{'─' * 60}\n{text}{completion}")
    return {"prompts": list(config.prompt), "completions": completions, "run_dir": config.run_dir}


@progress.waiting("loading the model and continuing the text")
def _completions(config: GenerateConfig) -> list[str]:
    from espalier.data.tokenizer import tokenizer_of
    from espalier.models.config import ModelConfig
    from espalier.models.pretrained import part_of
    from espalier.models.published import Published
    from espalier.training.checkpoint import read_config
    from espalier.training.frozen import restore_model
    from espalier.training.run import RunDirectory

    saved = read_config(config.run_dir)
    if saved.get("head", saved.get("task")) != "causal_lm":
        raise UserError(
            f"{config.run_dir} holds a run of task {saved.get('task')!r}, which does not generate text; "
            "give the run directory of a `clm` run"
        )
    model = ModelConfig.from_dict(saved["model"])
    tokenizer = tokenizer_of(RunDirectory(config.run_dir).tokenizer, saved)
    published, sampling, end_ids = Published.beside(saved), config.sampling, ()
    if published:
        end_ids = published.end_ids
        sampling, ignored = sampling_of(published.generation_config or {}, sampling)
        if sampling != config.sampling or ignored:
            how = ", ".join(f"{name} {value:g}" for name, value in zip(SAMPLED, sampling.drawn, strict=True))
            but = f"; what it says of {', '.join(ignored)} is not applied" if ignored else ""
            progress.say(f"by the model's generation_config.json: {how}{but}")
    params = part_of(restore_model(config.run_dir), saved)
    return continue_texts(model, params, tokenizer, config.prompt, sampling, end_ids)


if __name__ == "__main__":
    cli.run_config(main, GenerateConfig, prog="generate")
