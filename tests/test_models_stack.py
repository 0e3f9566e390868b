"""What may go into the stack: a tokenizer's batch, any vectors, a memory that cross-attention reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GPT, LLAMA, batch_of, close, random_params, strict_and_quick  # noqa: F401

from espalier.models.block import Memory
from espalier.models.inputs import completed
from espalier.models.layers import dropout
from espalier.models.transformer import _dropout_keys, apply, init_cache, matrix_axes, stack
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

pytestmark = pytest.mark.corner


def test_what_a_tokenizer_returns_is_a_batch():
    """One document a row, padded on either side: as the same rows with segments and positions written out."""
    batch = batch_of(GPT, [[5], [-2, 3], [4]], 5)
    batch["segment_ids"] = np.minimum(batch["segment_ids"], 1)
    ids, mask = batch["input_ids"].astype(np.int64), batch["segment_ids"].astype(np.int64)
    padded = completed({"input_ids": ids, "attention_mask": mask})
    whole, packed = completed({"input_ids": ids}), batch_of(GPT, [[3, 4, -2], [-1, 1, 6, 1]], 9)
    filled = completed({name: packed[name] for name in ("input_ids", "segment_ids")})
    for name in ("segment_ids", "positions"):
        np.testing.assert_array_equal(padded[name], batch[name])
        np.testing.assert_array_equal(filled[name], packed[name])
        np.testing.assert_array_equal(whole[name], [[1] * 5 if name == "segment_ids" else range(5)] * 3)
    params, run = random_params(GPT), jax.jit(functools.partial(apply, GPT))
    close(run(params, {"input_ids": ids, "attention_mask": mask}), run(params, batch))


def test_a_stack_runs_on_any_vectors():
    """Embeddings given by the caller: those of the tokens give what `apply` gives, dropout and cache included."""
    config = dataclasses.replace(LLAMA, hidden_dropout=0.5)
    params, batch, key = random_params(config), as_arrays(batch_of(config, [[7, 2]], 9)), jax.random.key(0)
    x_BTD = jnp.take(jnp.asarray(params["embeddings"]["token"]["embedding"]), batch["input_ids"], axis=0)
    embedded = dropout(x_BTD, 0.5, _dropout_keys(config, key)[0])
    places = (batch["segment_ids"], batch["positions"])
    run = jax.jit(functools.partial(stack, config, params))
    close(run(embedded, *places, key=key), jax.jit(functools.partial(apply, config, params))(batch, key=key))
    cached, cache = run(x_BTD, *places, cache=init_cache(config, 1, 9))
    close(cached, run(x_BTD, *places))
    assert int(cache["end"]) == 9


@pytest.mark.parametrize("position", ["pre", "post"])
def test_a_decoder_with_a_memory_is_pytorchs(position):
    """torch.nn.TransformerDecoder with our weights; both texts have padding."""
    import torch

    change = dict(norm_position=position, final_norm=False, hidden_act="relu", norm_eps=1e-5, cross_attention=True)
    config = dataclasses.replace(GPT, **change)
    params, rng = random_params(config), np.random.default_rng(1)
    D, T, S = config.hidden_size, 6, 5
    x, memory = rng.normal(size=(2, T, D)).astype(np.float32), rng.normal(size=(2, S, D)).astype(np.float32)
    segments, source = np.ones((2, T), np.int32), np.ones((2, S), np.int32)
    segments[0, 4:], source[1, 3:] = 0, 0
    layer = torch.nn.TransformerDecoderLayer(
        D, config.num_attention_heads, config.intermediate_size, 0.0, batch_first=True, norm_first=position == "pre"
    )
    theirs = torch.nn.TransformerDecoder(layer, config.num_hidden_layers).eval()
    for i, layer in enumerate(theirs.layers):
        weights = jax.tree.map(lambda leaf: leaf[i], params["layers"]["period"]["0"])  # noqa: B023
        layer.load_state_dict({name: torch.tensor(value) for name, value in torch_decoder_layer(weights, D).items()})
    with torch.no_grad():
        expected = theirs(
            torch.tensor(x),
            torch.tensor(memory),
            tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(T),
            memory_key_padding_mask=torch.tensor(source == 0),
            tgt_is_causal=True,
        ).numpy()
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    found = jax.jit(functools.partial(stack, config, params))(x, segments, positions, memory=Memory(memory, source))
    close(*(np.where(segments[:, :, None], states, 0) for states in (found, expected)))


def torch_decoder_layer(weights: dict, D: int) -> dict[str, np.ndarray]:
    """Our layer's weights by the names of torch.nn.TransformerDecoderLayer."""
    found = {}
    for name, ours in (("self_attn", "attention"), ("multihead_attn", "cross_attention")):
        q, kv, out = (weights[ours][part] for part in ("q", "kv", "out"))
        kernels = [q["kernel"], *kv["kernel"]]
        found[f"{name}.in_proj_weight"] = np.concatenate([kernel.reshape(D, D).T for kernel in kernels])
        found[f"{name}.in_proj_bias"] = np.concatenate([bias.reshape(D) for bias in (q["bias"], *kv["bias"])])
        found[f"{name}.out_proj.weight"] = out["kernel"].reshape(D, D).T.copy()
        found[f"{name}.out_proj.bias"] = out["bias"]
    for name, ours in (("linear1", "up"), ("linear2", "down")):
        found[f"{name}.weight"] = weights["mlp"][ours]["kernel"].T.copy()
        found[f"{name}.bias"] = weights["mlp"][ours]["bias"]
    for name, ours in (("norm1", "attention_norm"), ("norm2", "cross_attention_norm"), ("norm3", "mlp_norm")):
        found[f"{name}.weight"], found[f"{name}.bias"] = weights[ours]["scale"], weights[ours]["bias"]
    return found


def test_packed_documents_read_their_own_part_of_the_memory():
    """With grouped heads and rotary positions; on a mesh as on one device."""
    config = dataclasses.replace(LLAMA, cross_attention=True, num_hidden_layers=1)
    params, batch = random_params(config), as_arrays(batch_of(config, [[5, 3]] * 4, 8))
    memory = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 32)), jnp.float32)
    parts = jnp.asarray([[1] * 5 + [2] * 4] * 4, jnp.int32)
    run = jax.jit(functools.partial(apply, config))
    together = run(params, batch, memory=Memory(memory, parts))
    # The first document alone, with its part; the second's part may be anything for it.
    other = run(params, batch, memory=Memory(memory.at[:, 5:].set(1e3), parts))
    close(other[:, :5], together[:, :5])
    assert np.abs(other[:, 5:] - together[:, 5:]).min(-1).max() > 1e-3
    mesh = build_mesh(MeshConfig(2, 1, 2, sequence=2))
    with jax.set_mesh(mesh):
        close(run(jax.device_put(params, shard_params(params, mesh)), batch, memory=Memory(memory, parts)), together)
    assert matrix_axes(params)["layers"]["period"]["0"]["cross_attention"]["q"]["kernel"] == ((1,), (2, 3))
    with pytest.raises(AssertionError, match="memory belongs to config.cross_attention"):
        apply(config, params, batch)


def as_arrays(batch: dict) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in batch.items()}
