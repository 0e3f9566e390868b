"""What taps read is what transformers gives, what they change is what other weights would give; unused, they are no
part of a program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import (
    BERT,
    EVERYTHING,
    FAMILIES,
    GPT,
    MODERN,
    as_jax,
    batch_of,
    close,
    random_params,
    strict_and_quick,  # noqa: F401
)

from espalier.models import block, transformer
from espalier.models.config import Execution
from espalier.models.hub import save_pretrained
from espalier.models.logits import head_logits
from espalier.models.taps import EMBEDDINGS, PLACES, Taps
from espalier.models.transformer import apply
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

ROWS = [[7, 5], [12]]
EXECUTION = Execution(dtype="float32")


def read(config, params, batch, *places, execution=EXECUTION):
    return jax.jit(lambda p, b: apply(config, p, b, execution=execution, taps=Taps(places)))(params, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_and_streams_are_those_of_transformers(tmp_path, name):
    """Probabilities of every head and the stream into every layer, in the order of the layers."""
    config = FAMILIES[name]
    head = "causal_lm" if config.causal else "masked_lm"
    params = random_params(config, (head,))
    save_pretrained(tmp_path / "model", config, params, None, head=head)
    model = hf.AutoModel.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    ids = np.arange(24).reshape(2, 12) + 5
    with torch.no_grad():
        theirs = model(torch.tensor(ids), output_attentions=True, output_hidden_states=True)
    batch = {"input_ids": jnp.asarray(ids, jnp.int32)}
    _, seen = read(config, as_jax(params), batch, "attention.probabilities", "stream")
    layers = config.num_hidden_layers
    assert seen["attention.probabilities"].shape == (layers, 2, config.num_attention_heads, 12, 12)
    for layer in range(layers):
        close(seen["attention.probabilities"][layer], theirs.attentions[layer].numpy(), 1e-5)
        close(seen["stream"][layer], theirs.hidden_states[layer].numpy(), 1e-4)


@pytest.mark.parametrize("config", [BERT, EVERYTHING, GPT], ids=["bert", "everything", "gpt"])
def test_reading_changes_nothing_and_is_the_same_in_a_loop_and_on_a_mesh(config):
    params, batch = as_jax(random_params(config)), as_jax(batch_of(config, ROWS, 16))
    expected = jax.jit(lambda p, b: apply(config, p, b, execution=EXECUTION))(params, batch)
    x_BTD, seen = read(config, params, batch, *PLACES, EMBEDDINGS)
    close(x_BTD, expected, 1e-6)
    assert seen.keys() == {*PLACES, EMBEDDINGS}
    close(seen["stream"][0], seen[EMBEDDINGS], 1e-6)
    probabilities = np.asarray(seen["attention.probabilities"])
    shown = np.asarray(batch["segment_ids"]) > 0
    close(probabilities.sum(-1), np.broadcast_to(shown[None, :, None], probabilities.shape[:-1]), 1e-5)
    same_text = batch["segment_ids"][:, :, None] == batch["segment_ids"][:, None]
    assert not probabilities[:, ~np.broadcast_to(same_text[:, None], probabilities.shape[1:])].any()
    for other in (Execution(dtype="float32", scan_layers=True), Execution(dtype="float32", remat="full")):
        again = read(config, params, batch, *PLACES, execution=other)[1]
        jax.tree.map(lambda a, b: close(a, b, 1e-5), again, {name: seen[name] for name in PLACES})
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        laid = jax.device_put(params, shard_params(params, mesh))
        rows = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 2), batch)
        again = read(config, laid, rows, *PLACES)[1]
    jax.tree.map(lambda a, b: close(np.asarray(a)[:, :2], b, 1e-5), again, {name: seen[name] for name in PLACES})


def test_without_taps_there_is_nothing_of_them_in_the_program(monkeypatch):
    params, batch = as_jax(random_params(EVERYTHING)), as_jax(batch_of(EVERYTHING, ROWS, 16))

    def program() -> str:
        return jax.jit(lambda p, b: apply(EVERYTHING, p, b, execution=EXECUTION)).lower(params, batch).as_text()

    usual = program()
    for module in (block, transformer):
        monkeypatch.setattr(module, "tapped", lambda tap, place, x: x)
    assert program() == usual


def test_a_head_that_is_taken_out_is_one_whose_output_weights_are_zero():
    config = dataclasses.replace(MODERN, num_hidden_layers=4)
    params, batch = as_jax(random_params(config, ("masked_lm",))), as_jax(batch_of(config, ROWS, 16))
    kept_LN = jnp.ones((4, 4)).at[2, 1].set(0).at[0, 3].set(0)
    taps = Taps(change={"attention.heads": lambda x, kept_N: x * kept_N[:, None]}, given={"attention.heads": kept_LN})
    for scan in (False, True):
        execution = Execution(dtype="float32", scan_layers=scan)
        changed, seen = head_logits(config, "masked_lm", params, batch, execution, taps)
        assert seen == {}
        # ModernBERT: a layer in front, then periods of local, local, global.
        cut = jax.tree.map(lambda leaf: leaf, params)
        first, third = cut["layers"]["prefix"]["0"], cut["layers"]["period"]["1"]
        first["attention"]["out"]["kernel"] = first["attention"]["out"]["kernel"].at[3].set(0)
        third["attention"]["out"]["kernel"] = third["attention"]["out"]["kernel"].at[0, 1].set(0)
        close(changed, head_logits(config, "masked_lm", cut, batch, execution), 1e-5)
        params = as_jax(random_params(config, ("masked_lm",)))


def test_the_stream_of_another_text_makes_it_that_text_from_there_on():
    params = as_jax(random_params(GPT, ("causal_lm",)))
    one, other = ({"input_ids": jnp.asarray(np.arange(9)[None] * by % 200, jnp.int32)} for by in (3, 7))
    expected, seen = apply(GPT, params, other, execution=EXECUTION, taps=Taps(("stream",)))
    at_L = jnp.arange(2) == 1
    given = {"stream": (at_L, seen["stream"])}
    taps = Taps(change={"stream": lambda x, new: jnp.where(new[0], new[1], x)}, given=given)
    close(apply(GPT, params, one, execution=EXECUTION, taps=taps)[0], expected, 1e-6)


def test_gradients_reach_what_is_changed():
    """d score / d (a head's factor) by a tap equals differences of the score."""
    params, batch = as_jax(random_params(BERT, ("masked_lm",))), as_jax(batch_of(BERT, ROWS, 16))

    def score(kept_LN):
        taps = Taps(change={"attention.heads": lambda x, kept: x * kept[:, None]}, given={"attention.heads": kept_LN})
        return head_logits(BERT, "masked_lm", params, batch, EXECUTION, taps)[0][0, 3, 17]

    ones = jnp.ones((2, 4))
    slope = jax.grad(score)(ones)
    for layer, head in ((0, 2), (1, 0)):
        step = jnp.zeros((2, 4)).at[layer, head].set(1e-2)
        difference = (score(ones + step) - score(ones - step)) / 2e-2
        assert slope[layer, head] == pytest.approx(float(difference), rel=2e-2, abs=1e-5)
