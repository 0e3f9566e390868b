"""Text from a causal-LM checkpoint: temperature, top-k and top-p sampling with a key/value cache.

`python -m clm.generate RUN --prompt "…" "…"`. The prompts of a call are one left-padded batch: every row ends at the
same place, so that all rows take their next token at the same cache slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cli
import progress
from cli import UserError

if TYPE_CHECKING:
    from models.config import ModelConfig


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    max_new_tokens: int = 100
    """Tokens to add to each prompt; a row ends early at the end-of-text token."""
    temperature: float = 0.8
    """Below 1 = safer, above 1 = wilder, 0 = always the most probable token."""
    top_k: int = 0
    """Draw among the k most probable tokens (Fan et al. 2018); 0 = all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together reach this probability (Holtzman et al. 2020); 1 = all."""
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise UserError(f"sampling.seed={self.seed} must lie between 0 and {2**32 - 1}")
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"max_new_tokens={self.max_new_tokens} (at least 1), temperature={self.temperature} (0 or more), "
                f"top_k={self.top_k} (0 or more), top_p={self.top_p} (above 0, up to 1): correct what is out of range"
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


def next_token(logits_BV, key, sampling: SamplingConfig):
    """Draw one token id a row from float32 logits; -inf entries are never drawn."""
    import jax
    import jax.numpy as jnp

    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token is kept while the more probable ones have not reached top_p; the first is always kept.
        kept_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV < sampling.top_p
        smallest_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def generate(
    config: ModelConfig, params, prompts: list[list[int]], sampling: SamplingConfig, *, end_id: int | None
) -> list[list[int]]:
    """Continue token-id prompts (each at least one token); returns the new ids of each row, without `end_id`.

    One compiled program: the prompts fill the cache, then a while loop adds a token a turn until every row has
    ended or max_new_tokens are there.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from models import heads, transformer
    from models.vocabulary import logits

    longest = max(map(len, prompts))
    total = longest + sampling.max_new_tokens
    if config.max_length is not None and total > config.max_length:
        room = config.max_length - longest
        raise UserError(
            f"prompt of {longest} tokens + max_new_tokens={sampling.max_new_tokens} = {total} exceeds the model's "
            f"{config.max_length} positions; "
            + (f"try --sampling.max-new-tokens {room}" if room > 0 else "give a shorter prompt")
        )
    input_BT = np.zeros((len(prompts), longest), np.int32)
    segment_BT = np.zeros_like(input_BT)
    for row, ids in enumerate(prompts):
        input_BT[row, longest - len(ids) :] = ids
        segment_BT[row, longest - len(ids) :] = 1
    position_BT = np.maximum(np.cumsum(segment_BT, axis=1) - 1, 0).astype(np.int32)

    @jax.jit
    def run(params, prompt, key):
        def step_logits(batch, cache):
            x_BTD, cache = transformer.apply(config, params, batch, cache=cache)
            features, table, bias = heads.causal_lm_head(config, params, x_BTD[:, -1:], transformer.Execution())
            return logits(features, table, bias, config.vocab_size)[:, 0].astype(jnp.float32), cache

        def turn(carry):
            count, logits_BV, cache, done_B, new_BT = carry
            token_B = next_token(logits_BV, jax.random.fold_in(key, count), sampling)
            new_BT = new_BT.at[:, count].set(jnp.where(done_B, -1, token_B))
            done_B = done_B if end_id is None else done_B | (token_B == end_id)
            batch = {
                "input_ids": token_B[:, None],
                "segment_ids": jnp.ones_like(token_B)[:, None],
                "positions": prompt["positions"][:, -1:] + 1 + count,
            }
            logits_BV, cache = step_logits(batch, cache)
            return count + 1, logits_BV, cache, done_B, new_BT

        cache = transformer.init_cache(config, len(prompts), total, jnp.float32)
        logits_BV, cache = step_logits(prompt, cache)
        new_BT = jnp.full((len(prompts), sampling.max_new_tokens), -1, jnp.int32)
        carry = (jnp.int32(0), logits_BV, cache, jnp.zeros(len(prompts), bool), new_BT)
        return jax.lax.while_loop(lambda c: (c[0] < sampling.max_new_tokens) & ~jnp.all(c[3]), turn, carry)[-1]

    prompt = {"input_ids": input_BT, "segment_ids": segment_BT, "positions": position_BT}
    new_BT = np.asarray(run(params, prompt, jax.random.key(sampling.seed)))
    return [[int(token) for token in row if token >= 0 and token != end_id] for row in new_BT]


def continue_texts(
    model: ModelConfig, params, tokenizer, texts, sampling: SamplingConfig = SamplingConfig()
) -> list[str]:
    """A completion for each text; an empty text starts from the beginning-of-text token alone."""
    from data.tokenizer import plain_backend, special_ids

    specials = special_ids(tokenizer, need=("bos", "eos"))
    # As training read its text: a special token that is spelled out in a prompt is text.
    backend = plain_backend(tokenizer)
    prompts = [[specials.bos, *backend.encode(text, add_special_tokens=False).ids] for text in texts]
    return [tokenizer.decode(ids) for ids in generate(model, params, prompts, sampling, end_id=specials.eos)]


def main(config: GenerateConfig) -> dict:
    """Load the newest checkpoint of the run and print a completion for every prompt."""
    completions = _completions(config)
    for text, completion in zip(config.prompt, completions, strict=True):
        print(f"{'─' * 60}\n{text}{completion}")
    return {"prompts": list(config.prompt), "completions": completions, "run_dir": config.run_dir}


@progress.waiting("loading the model and continuing the text")
def _completions(config: GenerateConfig) -> list[str]:
    from data.tokenizer import tokenizer_of
    from models.config import ModelConfig
    from training.checkpoint import read_config, restore_params
    from training.run import RunDirectory

    saved = read_config(config.run_dir)
    if saved.get("task") != "causal_lm":
        raise UserError(
            f"{config.run_dir} holds a run of task {saved.get('task')!r}, which does not continue text; "
            "give the run directory of a `clm` run"
        )
    model = ModelConfig.from_dict(saved["model"])
    tokenizer = tokenizer_of(RunDirectory(config.run_dir).tokenizer, saved)
    return continue_texts(model, restore_params(config.run_dir), tokenizer, config.prompt, config.sampling)


if __name__ == "__main__":
    cli.run_config(main, GenerateConfig, prog="generate")
