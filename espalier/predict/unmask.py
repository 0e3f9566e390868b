"""Text that a model of masked diffusion writes: as many masks behind a prompt as there are to be tokens, unmasked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.examples import Example
from espalier.data.tokenizer import plain_backend, special_ids, vocabulary_size
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.decoding import Sampling
from espalier.models.generate import keys_of
from espalier.models.unmasking import Unmasking, unmasked
from espalier.predict.outputs import outputs
from espalier.predict.sampling import SamplingConfig, UnmaskingConfig

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel

TASK = "masked_diffusion"


DEFAULTS = UnmaskingConfig()


def writes(model: LoadedModel, config: UnmaskingConfig = DEFAULTS) -> bool:
    """Whether a model is to write this way: one that was trained for it, or another masked LM that is asked to."""
    asked = model.saved.get("task") == TASK or config.steps is not None
    return model.head == "masked_lm" and asked


def unmask(
    model: LoadedModel,
    prompts: Sequence[Any],
    sampling: SamplingConfig,
    config: UnmaskingConfig = DEFAULTS,
    said: Callable[[int, int], None] = lambda done, tokens: None,
) -> list[str]:
    """What the model writes behind each text: sampling.max_new_tokens tokens, by temperature, top_k, top_p.

    What is drawn for a prompt depends on the seed and its place. said: as in predict.generate.generate. UserError where
    there is no room for a prompt, and for settings that only decoders have.
    """
    if sampling.beams > 1 or sampling.repetition_penalty not in (None, 1.0) or sampling.stop:
        raise UserError("beams, repetition_penalty and stop are of decoders; this model writes by unmasking")
    specials = special_ids(model.tokenizer, need=("cls", "sep", "mask"))
    assert specials.mask is not None
    new, longest = sampling.max_new_tokens, model.config.max_length or model.config.max_position_embeddings
    examples = []
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError("a prompt for this model is a text; it knows no messages and no templates")
        ids = plain_backend(model.tokenizer).encode(prompt, add_special_tokens=False).ids
        framed = [specials.cls, *ids, *[specials.mask] * new, specials.sep]
        if len(framed) > longest:
            room = longest - len(ids) - 2
            raise UserError(
                f"prompt of {len(ids)} tokens + max_new_tokens={new} + 2 exceeds the model's {longest} positions; "
                + (f"try max_new_tokens={room}" if room > 0 else "give a shorter prompt")
            )
        examples.append(Example(framed, [0] * len(framed), of_row={"number": number, "begin": len(ids) + 1}))
    temperature, top_k, top_p = sampling.drawn
    how = Unmasking(
        min(config.steps or new, new), config.order, specials.mask, Sampling(new, temperature, top_k, top_p)
    )
    banned = tuple(sorted(one for one in specials.all if one < model.config.vocab_size))
    found = outputs(
        filled,
        (model.config, model.execution, how, banned, vocabulary_size(model.tokenizer), sampling.seed),
        model.params,
        examples,
        pad_id=specials.pad,
        longest=model.config.max_length,
        of_row=("number", "begin"),
        said=lambda done: said(done, done * new),
    )
    return [str(model.tokenizer.decode(ids)) for ids in found]


def filled(
    config: ModelConfig,
    execution: Execution,
    how: Unmasking,
    banned: tuple[int, ...],
    size: int,
    seed: int,
    params: Any,
    batch: Any,
) -> jax.Array:
    """The new tokens [B, N] from `begin` [B] on, with special tokens and ids beyond `size` left out."""
    allowed_V = np.arange(config.vocab_size) < size
    allowed_V[list(banned)] = False
    rows = {name: array for name, array in batch.items() if name not in ("number", "begin")}
    keys_B = keys_of(jax.random.key(seed), batch["number"].astype(jnp.uint32))
    ids_BT = unmasked(config, params, rows, jnp.asarray(allowed_V), keys_B, how, execution)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=how.sampling.max_new_tokens)
    return jax.vmap(cut)(ids_BT, batch["begin"])
