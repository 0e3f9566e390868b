"""What a model comes to, against the compiler, brute force and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_models import BERT, FAMILIES, LLAMA, MODERN, as_jax, batch_of, random_params, strict_and_quick  # noqa: F401

from espalier.models.attention_spec import Places, spec_for, visible
from espalier.models.config import Execution, ModelConfig
from espalier.models.counts import count_params, flops_per_token, products, visible_keys
from espalier.models.families.bert import BERT_BASE
from espalier.models.families.gpt2 import GPT2
from espalier.models.families.llama import LLAMA_8B
from espalier.models.families.modernbert import MODERNBERT_BASE
from espalier.models.heads import causal_lm_head, masked_lm_head
from espalier.models.transformer import apply, init_params


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_equal_those_of_the_compiler(name):
    """Three times the forward pass as XLA counts it: it adds the elementwise part, and pairs that are masked."""
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
    masked = sum(256 - visible_keys(config, kind, 256) for kind in config.layers)
    counted -= 4 * config.num_attention_heads * config.head_size * masked
    assert 0 <= 3 * counted / flops_per_token(config, 256) - 1 < 0.04


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("length", [1, 2, 16, 33])
def test_keys_of_a_query_are_the_pairs_that_attention_sees(causal, window, length):
    config = dataclasses.replace(BERT_BASE, causal=causal, sliding_window=window, layer_period=("local", "global"))
    places = Places.of_rows(jnp.ones((1, length), jnp.int32))
    for kind in ("local", "global"):
        pairs = int(visible(spec_for(config, kind), places).sum())
        assert visible_keys(config, kind, length) * length == pytest.approx(pairs, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "length", "fraction", "by_hand"),
    [
        # 12 layers of 4·768² + 2·768·3072, the vocabulary, (1024+1)/2 keys.
        (GPT2, 1024, 1.0, 6 * (12 * 7_077_888 + 768 * 50_257) + 12 * 12 * 768 * 512.5),
        # All keys; transform and vocabulary for 15 %.
        (BERT_BASE, 512, 0.15, 6 * (12 * 7_077_888 + 0.15 * (768**2 + 768 * 30_522)) + 12 * 12 * 768 * 512),
        # q, out: 4096²; k, v: 4096·1024; three of 4096·14,336.
        (
            LLAMA_8B,
            8192,
            1.0,
            6 * (32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336) + 4096 * 128_256) + 12 * 32 * 4096 * 4096.5,
        ),
        # 8 global layers; 14 that see ±64, less the 64·65 pairs that the two edges lack.
        (
            MODERNBERT_BASE,
            1024,
            0.3,
            6 * (22 * (4 * 768**2 + 3 * 768 * 1152) + 0.3 * (768**2 + 768 * 50_368))
            + 12 * 768 * (8 * 1024 + 14 * (129 - 64 * 65 / 1024)),
        ),
    ],
    ids=["gpt2", "bert-base", "llama-8b", "modern-base"],
)
def test_flops_by_hand(config: ModelConfig, length, fraction, by_hand):
    assert flops_per_token(config, length, fraction) == pytest.approx(by_hand, rel=1e-12)


def test_flops_of_windows_and_of_predicted_tokens():
    config = dataclasses.replace(MODERN, sliding_window=64)
    local = dataclasses.replace(config, prefix_layers=("local",), layer_period=("local",))
    keys = 512 - (65 - 32 * 33 / 512)
    less = flops_per_token(config, 512) - flops_per_token(local, 512)
    assert less == pytest.approx(12 * 32 * keys * config.layers.count("global"))
    assert flops_per_token(config, 512) - flops_per_token(config, 512, 0.25) == 0.75 * 6 * 32 * (200 + 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_products_are_the_matrices_of_the_parameters(name):
    config = dataclasses.replace(FAMILIES[name], vocab_size=384)
    head = "causal_lm" if config.causal else "masked_lm"
    matrices = sum(product.inputs * product.outputs * product.times for product in products(config))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0), (head,)))
    kept = ("kernel", "embedding")
    stored = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key in kept)
    tables = config.embedding_width * (
        (0 if config.tie_word_embeddings else config.vocab_size)
        + (config.max_position_embeddings if config.position_embedding == "learned" else 0)
        + config.type_vocab_size
    )
    assert matrices == stored - tables


def test_padding_of_the_vocabulary_is_not_counted():
    leaves = jax.tree.leaves(random_params(LLAMA, ("causal_lm",)))
    assert sum(leaf.size for leaf in leaves) - count_params(LLAMA, "causal_lm") == 56 * 32
    untied = dataclasses.replace(LLAMA, tie_word_embeddings=False)
    assert count_params(untied, "causal_lm") - count_params(LLAMA, "causal_lm") == 200 * 32
    untied = dataclasses.replace(BERT, tie_word_embeddings=False)
    assert count_params(untied, "masked_lm") - count_params(BERT, "masked_lm") == 200 * 32
    assert count_params(BERT, "masked_lm") - count_params(BERT) == 32 * 32 + 3 * 32 + 200
