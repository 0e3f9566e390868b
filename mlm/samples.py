"""For the report of masked-LM pretraining: masked words with the model's guesses, and the unigram baseline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import hidden_token_head
from espalier.models.transformer import apply
from espalier.models.vocabulary import logits
from mlm.config import MaskingConfig
from mlm.masking import Vocabulary, mask_batch


def unigram_entropy(train_V: np.ndarray, held_out_V: np.ndarray, vocabulary: Vocabulary) -> float:
    """Cross-entropy in nats per token of guessing by frequency: -Σ q(w) log p(w), q held-out, p training (add-one).

    train_V, held_out_V: counts of each token. It is the masked-LM loss on held-out text of a model that has learnt only
    the frequency of each token.
    """
    train_V, held_out_V = train_V + 1, held_out_V * vocabulary.ordinary_V
    p_V = train_V / train_V[vocabulary.ordinary_V].sum()
    return float(-(held_out_V * np.log(p_V)).sum() / max(held_out_V.sum(), 1))


def masked_samples(
    model: ModelConfig,
    params,
    batch: dict,
    texts: Sequence[str],
    vocabulary: Vocabulary,
    masking: MaskingConfig,
    execution: Execution,
    *,
    head: str = "masked_lm",
    mask: Callable = mask_batch,
    count: int = 8,
    guesses: int = 3,
    window: int = 32,
    seed: int = 0,
) -> list[dict]:
    """`count` random excerpts of held-out rows with masked tokens and the model's best guesses for them.

    batch: held-out rows [B,T]. head, mask: as of the objective. texts: the text of each token id
    (data.token_tables.token_texts). Returns for each excerpt `tokens` (texts) and `masked`: index in the excerpt,
    truth, and guesses as (text, probability) pairs. Every masked token is shown as [MASK].
    """
    key = jax.random.key(seed)
    shown = MaskingConfig(
        rate=masking.final_rate or masking.rate, mask_fraction=1.0, random_fraction=0.0, whole_words=masking.whole_words
    )

    @jax.jit
    def guess(params, batch):
        hidden = mask(batch, key, shown.rate, shown, vocabulary)
        x_BTD = apply(model, params, hidden, execution=execution)
        scored = hidden_token_head(model, head, params, x_BTD, hidden["masked_positions"], execution)
        score = functools.partial(logits, vocab_size=model.vocab_size, softcap=model.final_logit_softcapping)
        probability_BMV = jax.nn.softmax(score(*scored), axis=-1)
        return hidden, *jax.lax.top_k(probability_BMV, guesses)

    rows = np.random.default_rng(seed).permutation(np.flatnonzero(batch["segment_ids"][:, 0] > 0))[:count]
    batch = {name: array[rows] for name, array in batch.items()}
    hidden, top_BMG, ids_BMG = jax.tree.map(np.asarray, guess(params, batch))
    excerpts = []
    for row in range(len(rows)):
        used = hidden["masked_weights"][row] > 0
        if not used.any():
            continue
        order = np.argsort(hidden["masked_positions"][row][used])
        positions = hidden["masked_positions"][row][used][order]
        start = max(0, int(positions[len(positions) // 2]) - window // 2)
        inside = (positions >= start) & (positions < start + window)
        excerpts.append(
            {
                "tokens": [texts[token] for token in hidden["input_ids"][row, start : start + window]],
                "masked": [
                    {
                        "index": int(at) - start,
                        "truth": texts[batch["input_ids"][row, at]],
                        "guesses": [
                            [texts[token], round(float(probability), 4)]
                            for token, probability in zip(ids, tops, strict=True)
                        ],
                    }
                    for at, ids, tops in zip(
                        positions[inside],
                        ids_BMG[row][used][order][inside],
                        top_BMG[row][used][order][inside],
                        strict=True,
                    )
                ],
            }
        )
    return excerpts
