"""What layouts may exchange between devices and hold on one, read from compiled programs."""

import dataclasses
import functools
import math
import re

import jax
import pytest

import clm.presets
import mlm.presets
from espalier.commands.plan.compile.hlo import collectives, shapes_of
from espalier.commands.plan.compile.step import lower_step
from espalier.models.config import Execution
from sharding.mesh import MeshConfig, build_mesh

# Every size is another number, so that a shape tells what it is; the scores of a device need several chunks.
V, T, B, D, F = 20_480, 512, 128, 96, 320
CHUNK = 2**24
"""Scores that models.vocabulary holds at a time."""
SIZES = dict(
    vocab_size=V - 7,
    hidden_size=D,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=24,
    intermediate_size=F,
    max_position_embeddings=T,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
ENTRIES = {"mlm": (mlm.presets.modern_base, {}), "clm": (clm.presets.llama_1b, {"rope_scaling_factor": None})}


@functools.cache
def program(entry: str, mesh: MeshConfig):
    """(HLO text, state as (path, whole shape, shape on a device)) of the train step on eight devices."""
    preset, changes = ENTRIES[entry]
    config = preset()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **SIZES, **changes),
        batch_size=B,
        data=dataclasses.replace(config.data, sequence_length=T),
        execution=Execution(scan_layers=True, dtype="float32", remat="full"),
    )
    step = lower_step(config, build_mesh(mesh))
    state = [
        (jax.tree_util.keystr(path), leaf.shape, leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(step.arguments[0])
    ]
    return step.lowered.compile().as_text(), state


def shapes(text: str) -> set[tuple[int, ...]]:
    """Of everything the program computes."""
    return {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}


def gathered(text: str) -> set[tuple[int, ...]]:
    return {shape for _, shape in shapes_of(text, "all-gather")}


@pytest.mark.parametrize("entry", ENTRIES)
def test_copies_exchange_gradients_and_nothing_else(entry):
    text, _ = program(entry, MeshConfig(data=8))
    assert set(collectives(text)) == {"all-reduce"}
    text, _ = program(entry, MeshConfig(data=4, replica=2))
    assert set(collectives(text)) == {"all-reduce"}


@pytest.mark.parametrize("entry", ENTRIES)
def test_under_fsdp_no_matrix_of_the_state_is_whole_on_a_device(entry):
    text, state = program(entry, MeshConfig(data=1, fsdp=8))
    whole = sum(math.prod(shape) for _, shape, part in state if shape == part)
    assert whole < 0.01 * sum(math.prod(shape) for _, shape, _ in state)
    for path, shape, part in state:
        if path.endswith(("['kernel']", "['embedding']")):
            assert math.prod(part) * 8 == math.prod(shape), path
    # The program takes and returns it as it lies: an entry parameter is a shard.
    entry = text[text.index("\nENTRY") :]
    parameters = {tuple(map(int, s.split(","))) for s in re.findall(r"= f32\[([\d,]+)\]\S* parameter\(", entry)}
    assert (V, D // 8) in parameters and (V, D) not in parameters
    # Weights of one layer are gathered at a time, never those of all layers.
    assert gathered(text) and not [shape for shape in gathered(text) if len(shape) > 2 and shape[0] == 4 and F in shape]


@pytest.mark.parametrize("entry", ENTRIES)
def test_under_tensor_parallelism_the_vocabulary_stays_split(entry):
    text, state = program(entry, MeshConfig(data=2, tensor=4))
    assert "all-reduce" in collectives(text)
    # Neither the table nor its gradient or moments, in either order, nor scores of all entries.
    assert not [shape for shape in shapes(text) if V in shape and math.prod(shape) >= V * D]
    assert {part[0] for path, shape, part in state if shape == (V, D)} == {V // 4}


@pytest.mark.parametrize("entry", ENTRIES)
def test_under_tensor_parallelism_the_stream_between_layers_is_split_by_tokens(entry):
    """Layers are rematerialised: their inputs alone are kept, a quarter on each device. Within them rows are whole."""
    text, _ = program(entry, MeshConfig(data=2, tensor=4))
    assert (B // 2, T // 4, D) in shapes(text)
    stacks = {shape for shape in shapes(text) if len(shape) == 4 and shape[1:] in ((B // 2, T // 4, D), (B // 2, T, D))}
    # The masked LM's layers are one period here, and no stack.
    assert {shape[2] for shape in stacks} == ({T // 4} if entry == "clm" else set())
    assert {shape for shape in gathered(text) if math.prod(shape) > B * T} == {(B // 2, T, D)}
    assert set(collectives(text)) == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("entry", ENTRIES)
def test_under_sequence_parallelism_only_keys_and_values_are_gathered(entry):
    text, _ = program(entry, MeshConfig(data=2, sequence=4))
    for shape in gathered(text):
        # [B, T, K, H]; what is no larger than the ids of the batch does not count. Masked LM also brings the gradients
        # of its masked places, [B, M, D], to the parts that they belong to.
        masked = entry == "mlm" and shape[-1] == D and shape[-2] < T / 2
        assert math.prod(shape) <= B * T or shape[-2:] == (4, 24) or masked, shape
    # Scores are of a quarter of the queries against all keys.
    assert not [shape for shape in shapes(text) if shape[-2:] == (T, T)]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, tensor=4), MeshConfig(data=2, sequence=4)],
    ids=str,
)
def test_scores_over_the_vocabulary_are_never_there_for_all_tokens(entry, mesh):
    """The largest buffer with a vocabulary in it is a chunk: a part of the tokens of a device."""
    text, _ = program(entry, mesh)
    predicted = T if entry == "clm" else round(0.3 * T)
    assert B * predicted * V / 8 > 2 * CHUNK
    assert max(math.prod(shape) for shape in shapes(text) if V in shape or V // mesh.tensor in shape) <= CHUNK
