"""The objective of ELECTRA (Clark et al. 2020, section 2): L = L_MLM(generator) + λ L_Disc(discriminator).

The generator learns masked LM. At every token that was hidden from it one is drawn from its softmax, and the
discriminator says of each token of the row whether it is another than the one that stood there: a token that was drawn
and is the original counts as original. Nothing of the discriminator's loss reaches the generator, for the draw has no
gradient; embeddings are common to both (section 3.2), and learn from both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import masked_lm_head, replaced_logits
from espalier.models.pretrained import completed
from espalier.models.transformer import apply
from espalier.models.vocabulary import drawn_tokens, token_logprobs
from espalier.models.weight_map import param_shapes
from espalier.training.step import Objective
from mlm.masking import Vocabulary, mask_batch

if TYPE_CHECKING:
    from mlm.config import MaskingConfig

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
"""Their parameters in the tree."""


def electra_objective(
    model: ModelConfig,
    generator: ModelConfig,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    *,
    rate: Callable,
    weight: float,
    execution: Execution,
    mask: Callable = mask_batch,
) -> Objective:
    """The objective. model: the discriminator. rate, mask: as in `mlm.loss.masked_lm_objective`. weight: λ.

    Metrics: loss, that of both; generator_loss and generator_accuracy at the hidden tokens; detection_loss (nats) and
    accuracy at all tokens; precision and recall of what is called replaced; replaced, its part of the tokens.
    """

    def prepare(batch, key, step, train):
        mask_key, draw_key = jax.random.split(key)
        masked = mask(batch, mask_key, rate(step, train), masking, vocabulary)
        # A key a row, so that micro-batches and meshes draw the same.
        keys_B = jax.random.key_data(jax.random.split(draw_key, len(batch["input_ids"])))
        norms = jnp.maximum(jnp.sum(masked["masked_weights"]), 1.0), jnp.maximum(jnp.sum(present(batch)), 1.0)
        return masked | {"original_ids": batch["input_ids"], "draw_keys": keys_B}, norms

    def loss(params, batch, key, norms, train):
        keys = jax.random.split(key) if train else (None, None)
        hidden, tokens = norms
        nats, right, drawn_BM = generated(generator, params, batch, keys[0], execution)
        corrupted_BT = replaced(batch, drawn_BM)
        present_BT = present(batch)
        replaced_BT = jnp.where(corrupted_BT != batch["original_ids"], present_BT, 0.0)
        read = batch | {"input_ids": corrupted_BT}
        x_BTD = apply(model, params[DISCRIMINATOR], read, execution=execution, key=keys[1])
        logits_BT = replaced_logits(model, params[DISCRIMINATOR], x_BTD)
        # -log σ(±logit): binary cross-entropy.
        detection = jnp.sum(present_BT * (jax.nn.softplus(logits_BT) - replaced_BT * logits_BT))
        found_BT = jnp.where(logits_BT > 0, present_BT, 0.0)
        both, number = jnp.sum(found_BT * replaced_BT), jnp.sum(present_BT)
        total = nats / hidden + weight * detection / tokens
        masked = jnp.sum(batch["masked_weights"])
        metrics = {
            "loss": (total * tokens, number),
            "generator_loss": (nats, masked),
            "generator_accuracy": (right, masked),
            "detection_loss": (detection, number),
            "accuracy": (jnp.sum(jnp.where(found_BT == replaced_BT, present_BT, 0.0)), number),
            "precision": (both, jnp.sum(found_BT)),
            "recall": (both, jnp.sum(replaced_BT)),
            "replaced": (jnp.sum(replaced_BT), number),
        }
        return total, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def generated(generator: ModelConfig, params, batch: dict, key, execution: Execution):
    """(Σ −log p of the hidden tokens, how many are the most probable ones, tokens drawn in their places [B, M])."""
    own = completed(params[GENERATOR], params[DISCRIMINATOR], param_shapes(generator, "masked_lm"))
    x_BTD = apply(generator, own, batch, execution=execution, key=key)
    x_BMD = jnp.take_along_axis(x_BTD, batch["masked_positions"][:, :, None], axis=1)
    head = masked_lm_head(generator, own, x_BMD, execution)
    size: Any = dict(vocab_size=generator.vocab_size, softcap=generator.final_logit_softcapping)
    logprob_BM, correct_BM = token_logprobs(*head, batch["masked_labels"], **size)
    drawn_BM = drawn_tokens(*head, jax.random.wrap_key_data(batch["draw_keys"]), **size)
    weights_BM = batch["masked_weights"]
    return -jnp.sum(weights_BM * logprob_BM), jnp.sum(weights_BM * correct_BM), drawn_BM


def replaced(batch: dict, drawn_BM: jax.Array) -> jax.Array:
    """The rows as the discriminator reads them [B, T]: what was drawn in the places of the hidden tokens."""
    tokens_BM = jnp.where(batch["masked_weights"] > 0, drawn_BM, batch["masked_labels"])
    put = jax.vmap(lambda row, at, values: row.at[at].set(values))
    return put(batch["original_ids"], batch["masked_positions"], tokens_BM)


def present(batch: dict) -> jax.Array:
    """1.0 at tokens, special ones included, 0.0 at padding: float32 [B, T]."""
    return (batch["segment_ids"] > 0).astype(jnp.float32)
