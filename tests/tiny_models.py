"""Small models of every family, random parameters without compiling an initialiser, and packed batches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from espalier.models.config import ModelConfig
from espalier.models.families.bert import BERT_BASE
from espalier.models.families.gpt2 import GPT2
from espalier.models.families.llama import LLAMA_1B
from espalier.models.families.modernbert import MODERNBERT_BASE
from espalier.models.transformer import init_params

SIZES: dict[str, Any] = dict(vocab_size=200, hidden_size=32, num_attention_heads=4, intermediate_size=48, head_dim=None)
BERT = dataclasses.replace(BERT_BASE, **SIZES, num_hidden_layers=2, max_position_embeddings=64)
GPT = dataclasses.replace(GPT2, **SIZES, num_hidden_layers=2, max_position_embeddings=64)
LLAMA = dataclasses.replace(LLAMA_1B, **SIZES, num_hidden_layers=2, num_key_value_heads=2)
MODERN = dataclasses.replace(MODERNBERT_BASE, **SIZES, num_hidden_layers=4, sliding_window=6)
# Every part a stack can have: prefix, two periods, suffix, grouped heads, norms of queries and keys, a gate, caps on
# scores, heads that turn in part, a layer that does not.
EVERYTHING = dataclasses.replace(
    MODERN,
    num_hidden_layers=4,
    layer_period=("local",),
    suffix_layers=("nope",),
    num_key_value_heads=2,
    qk_norm=True,
    qk_norm_over="all",
    partial_rotary_factor=0.5,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    attention_bias=True,
    mlp_bias=True,
    norm_bias=True,
    head_transform_bias=True,
    type_vocab_size=2,
    hidden_dropout=0.1,
    attention_dropout=0.1,
)

# What only decoders of these kinds have: norms of what attention and MLP give, and no others.
OUTPUT_NORMS = dataclasses.replace(
    LLAMA,
    num_hidden_layers=5,
    norm_position="output",
    prefix_layers=("global",),
    layer_period=("local", "nope"),
    sliding_window=5,
    qk_norm=True,
    qk_norm_over="all",
    partial_rotary_factor=0.5,
    attn_logit_softcapping=2.0,
)

FAMILIES = {"bert": BERT, "gpt2": GPT, "llama": LLAMA, "modernbert": MODERN}


@pytest.fixture(scope="module", autouse=True)
def strict_and_quick():
    """Strict dtype promotion around models and losses; tiny programs run for microseconds and compile for seconds."""
    for name, value in (("jax_numpy_dtype_promotion", "strict"), ("jax_disable_most_optimizations", True)):
        jax.config.update(name, value)
    yield
    for name, value in (("jax_numpy_dtype_promotion", "standard"), ("jax_disable_most_optimizations", False)):
        jax.config.update(name, value)


def random_params(config: ModelConfig, heads: tuple[str, ...] = (), seed: int = 0):
    """Parameters with the tree of `init_params`, every leaf random: no bias is zero and no scale is one."""
    shapes = _shapes(config, heads)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        name = path[-1].key
        if name == "kernel":
            fan_in = leaf.shape[-3] * leaf.shape[-2] if path[-2].key == "out" and leaf.ndim > 2 else config.hidden_size
            noise = noise / np.sqrt(fan_in)
        else:
            noise = 1 + 0.3 * noise if name == "scale" else 0.3 * noise
        return noise.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def _shapes(config: ModelConfig, heads: tuple[str, ...]) -> dict:
    return jax.eval_shape(lambda key: init_params(config, key, heads), jax.random.key(0))


def batch_of(config: ModelConfig, rows: list[list[int]], length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch with documents of these lengths in each row (a negative length is that much padding)."""
    shape = (len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "positions")}
    batch["input_ids"] = np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for number, size in enumerate(documents, 1):
            if size > 0:
                batch["segment_ids"][row, start : start + size] = number
                batch["positions"][row, start : start + size] = np.arange(size)
            start += abs(size)
        assert start <= length
    return batch


def close(actual, expected, tolerance: float = 1e-5) -> None:
    """Assert that two trees agree within `tolerance` of the largest value of each leaf."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(actual), strict=True):
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        scale = max(1e-3, np.abs(want).max())
        np.testing.assert_allclose(got / scale, want / scale, atol=tolerance, rtol=0, err_msg=str(path))


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def same(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), first, second)


def rewrite(folder, change):
    """Apply `change` to the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
