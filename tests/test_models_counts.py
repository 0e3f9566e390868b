"""What a model comes to, against the compiler and closed forms."""

import dataclasses

import jax
import pytest
from tiny_models import BERT, FAMILIES, LLAMA, MODERN, as_jax, batch_of, random_params, strict_and_quick  # noqa: F401

from models.config import Execution
from models.counts import count_params, flops_per_token
from models.heads import causal_lm_head, masked_lm_head
from models.transformer import apply, init_params

pytestmark = pytest.mark.corner


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_equal_those_of_the_compiler(name):
    """Three times the forward pass (PaLM, appendix B) as XLA counts it, which adds the elementwise part."""
    full_window = dict(sliding_window=1024) if FAMILIES[name].sliding_window else {}
    config = dataclasses.replace(
        FAMILIES[name],
        hidden_size=512,
        intermediate_size=1024,
        vocab_size=3072,
        max_position_embeddings=256,
        **full_window,
    )
    head = "causal_lm" if config.causal else "masked_lm"
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), (head,)))
    batch = jax.eval_shape(lambda: as_jax(batch_of(config, [[256]] * 2, 256)))

    def scores(params, batch):
        x_BTD = apply(config, params, batch, execution=Execution(scan_layers=False))
        features, table, _ = (causal_lm_head if config.causal else masked_lm_head)(config, params, x_BTD, Execution())
        return features @ table.T

    counted = jax.jit(scores).lower(params, batch).cost_analysis()["flops"] / 512
    counted -= 2 * config.hidden_size * (config.padded_vocab_size - config.vocab_size)
    assert 0 <= 3 * counted / flops_per_token(config, 256) - 1 < 0.04


def test_flops_of_windows_and_of_predicted_tokens():
    config = dataclasses.replace(MODERN, sliding_window=64)
    local = dataclasses.replace(config, prefix_layers=("local",), layer_period=("local",))
    keys = 512 - 65
    assert flops_per_token(config, 512) - flops_per_token(local, 512) == 12 * 32 * keys * config.layers.count("global")
    assert flops_per_token(config, 512) - flops_per_token(config, 512, 0.25) == 0.75 * 6 * 32 * (200 + 32)


def test_padding_of_the_vocabulary_is_not_counted():
    leaves = jax.tree.leaves(random_params(LLAMA, ("causal_lm",)))
    assert sum(leaf.size for leaf in leaves) - count_params(LLAMA, "causal_lm") == 56 * 32
    untied = dataclasses.replace(LLAMA, tie_word_embeddings=False)
    assert count_params(untied, "causal_lm") - count_params(LLAMA, "causal_lm") == 200 * 32
    assert count_params(BERT, "masked_lm") - count_params(BERT) == 32 * 32 + 3 * 32 + 200
