"""Every family and head against PyTorch transformers: same weights, same scores, gradients, texts and files."""

import copy
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from published import GREEDY, HEADS, IN_BFLOAT16, LANGUAGE_MODELS, ON_A_MESH, OWN_HEADS, ROWS, folder, model
from safetensors import safe_open
from tiny_models import batch_of, strict_and_quick  # noqa: F401

from espalier.models.config import Execution
from espalier.models.decoding import Sampling
from espalier.models.families import family_of
from espalier.models.generate import generate
from espalier.models.heads import (
    causal_lm_head,
    embed_rows,
    masked_lm_head,
    replaced_logits,
    sequence_logits,
    span_logits,
    token_logits,
)
from espalier.models.hub import load_pretrained, save_pretrained
from espalier.models.transformer import apply
from espalier.models.vocabulary import logits
from espalier.models.weight_map import export, tensors_of
from sharding.mesh import MeshConfig, build_mesh, place_batch

FAR = 30_000
"""Where rotary positions begin in some rows."""
EXACT = Execution(dtype="float32")
PAD = ROWS["bert"]["pad_token_id"]


def scores(config, head, params, batch, execution=EXACT):
    """Logits of the head: [B,T,V], [B,C], [B,T,C], [B,T,2], [B,T]; embeddings [B,D]."""
    x_BTD = apply(config, params, batch, execution=execution)
    if head in ("masked_lm", "causal_lm"):
        lm_head = masked_lm_head if head == "masked_lm" else causal_lm_head
        return logits(*lm_head(config, params, x_BTD, execution), config.vocab_size, config.final_logit_softcapping)
    if head == "sequence_classification":
        return sequence_logits(config, params, x_BTD, batch["segment_ids"])
    if head == "embedding":
        mean_BD = embed_rows(config, params, x_BTD, batch["segment_ids"], "mean")
        pooling = "pooler" if "head" in params else "last" if config.causal else "first"
        return jnp.concatenate([mean_BD, embed_rows(config, params, x_BTD, batch["segment_ids"], pooling)], axis=1)
    return {
        "token_classification": token_logits,
        "question_answering": span_logits,
        "replaced_token_detection": replaced_logits,
    }[head](config, params, x_BTD)


def their_scores(theirs, config, head, batch):
    """The same from PyTorch."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["segment_ids"]}
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = batch["token_type_ids"]
    if config.position_embedding == "rotary":
        inputs["position_ids"] = batch["positions"]
    inputs = {name: torch.tensor(array, dtype=torch.long) for name, array in inputs.items()}
    out = theirs(**inputs)
    if head == "question_answering":
        return torch.stack([out.start_logits, out.end_logits], dim=-1)
    if head != "embedding":
        return out.logits
    real = inputs["attention_mask"].bool()
    x = out.last_hidden_state
    mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    ends = real.sum(1) - 1
    one = x[torch.arange(len(x)), ends] if config.causal else getattr(out, "pooler_output", None)
    return torch.cat([mean, x[:, 0] if one is None else one], dim=1)


def rows_of(config, head, seed=0):
    """Three padded rows; those of rotary models begin far out."""
    batch = batch_of(config, [[40], [17], [2]], 40, seed)
    real = batch["segment_ids"] != 0
    # Classifiers of decoders look for padding tokens to find the last real one; RoBERTa counts positions from them.
    batch["input_ids"] = np.where(real, 2 + batch["input_ids"] % (config.vocab_size - 2), PAD).astype(np.int32)
    batch["token_type_ids"] = (batch["positions"] % 5 > 2).astype(np.int32) if config.type_vocab_size > 1 else 0 * real
    batch["token_type_ids"] = batch["token_type_ids"].astype(np.int32)
    if config.position_embedding == "rotary":
        batch["positions"] = batch["positions"] + np.int32(FAR) * np.array([[1], [0], [1]], np.int32)
    return batch


def targets_of(head, shape, real, seed=3):
    """Labels for a loss on scores of this shape."""
    rng = np.random.default_rng(seed)
    if head == "embedding":
        return rng.normal(size=shape).astype(np.float32)
    if head == "question_answering":
        return np.stack([rng.integers(0, n, 2) for n in real.sum(1)]).astype(np.int32)
    classes = 2 if head == "replaced_token_detection" else shape[-1]
    labels = rng.integers(0, classes, shape if head == "replaced_token_detection" else shape[:-1])
    return labels.astype(np.int32)


def loss_of(head, scores, labels, real):
    if head == "embedding":
        return (scores * labels).sum()
    if head == "question_answering":
        scores = jnp.where(real[:, :, None], scores, -1e9)
        return -jnp.take_along_axis(jax.nn.log_softmax(scores, axis=1), labels[:, None, :], axis=1).mean()
    if head == "replaced_token_detection":
        each = jnp.logaddexp(0.0, scores) - labels.astype(jnp.float32) * scores
    else:
        each = -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], axis=-1)[..., 0]
    weights = real.astype(jnp.float32)
    return each.mean() if head == "sequence_classification" else (each * weights).sum() / weights.sum()


def their_loss(head, scores, labels, real):
    labels = torch.tensor(labels, dtype=None if head == "embedding" else torch.long)
    real = torch.tensor(real)
    if head == "embedding":
        return (scores * labels).sum()
    if head == "question_answering":
        return F.cross_entropy(scores.masked_fill(~real[:, :, None], -1e9), labels)
    if head == "replaced_token_detection":
        return F.binary_cross_entropy_with_logits(scores[real], labels[real].float())
    if head == "sequence_classification":
        return F.cross_entropy(scores, labels)
    return F.cross_entropy(scores[real], labels[real])


def as_in_files(theirs, path):
    """PyTorch's gradients under the names and in the shapes of a file, which are not always those of its modules; NaN
    where a loss does not reach."""
    gradients = copy.deepcopy(theirs)
    with torch.no_grad():
        for copied, p in zip(gradients.parameters(), theirs.parameters(), strict=True):
            copied.copy_(torch.full_like(p, torch.nan) if p.grad is None else p.grad)
    gradients.save_pretrained(path)
    with safe_open(path / "model.safetensors", "np") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}


def test_the_choice_covers_every_pair_of_family_and_head_for_every_property():
    for some, every in (
        (HEADS, published.ALL_HEADS),
        (OWN_HEADS, published.ALL_OWN_HEADS),
        (GREEDY, published.ALL_DECODERS),
        (IN_BFLOAT16, published.ALL_OWN_LAYERS),
        (ON_A_MESH, published.ALL_OWN_LAYERS),
    ):
        assert set(some) <= set(every) and published.covered(some) == published.covered(every)
    # Scores, gradients, files and packed rows of its language model: every row there is.
    assert set(LANGUAGE_MODELS) <= {(name, head) for name, head in OWN_HEADS} & set(HEADS)
    met = {name for cases in (IN_BFLOAT16, ON_A_MESH, GREEDY) for name, _ in cases}
    assert len(met) > len(published.FULL) + 3


@pytest.mark.parametrize(("name", "head"), OWN_HEADS)
def test_scores_and_gradients_are_those_of_pytorch(name, head, tmp_path):
    """Scores within 1e-4; for every tensor of the file ‖Δg‖ ≤ 1e-4 ‖g‖ + 1e-6 ‖all g‖."""
    theirs = model(name, head)
    config, params, _ = load_pretrained(folder(name, head), head=head)
    batch = rows_of(config, head)
    real = batch["segment_ids"] != 0
    theirs.zero_grad()
    expected = their_scores(theirs, config, head, batch)
    labels = targets_of(head, expected.shape, real)
    their_loss(head, expected, labels, real).backward()
    want = as_in_files(theirs, tmp_path)

    def loss(params):
        got = scores(config, head, params, batch)
        return loss_of(head, got, labels, jnp.asarray(real)), got

    gradients, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    shown = real if expected.ndim > 1 and expected.shape[:2] == real.shape else slice(None)
    expected = expected.detach().numpy()
    assert np.abs(expected[shown]).max() > 0.3
    np.testing.assert_allclose(np.asarray(got)[shown], expected[shown], atol=1e-4, rtol=0)

    tensors = tensors_of(family_of(config.model_type), config, head, params)
    have = dict(export(tensors, jax.device_get(gradients)))
    for copied in (name for tensor in tensors for name in tensor.copies):
        del have[copied]
        want.pop(copied, None)
    total = np.sqrt(sum(np.nansum(np.square(g, dtype=np.float64)) for g in want.values()))
    assert want.keys() == have.keys()
    for key, g in have.items():
        if np.isnan(want[key]).all():  # Not reached by this loss in PyTorch.
            assert not np.any(g), key
            continue
        difference = np.linalg.norm((g - want[key]).ravel())
        assert difference <= 1e-4 * np.linalg.norm(want[key].ravel()) + 1e-6 * total, key


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_files_go_round_bit_by_bit(name, head, tmp_path):
    """Import → export → import: equal in every bit; the file has the names and shapes that transformers writes."""
    config, params, _ = load_pretrained(folder(name, head), head=head)
    save_pretrained(tmp_path / "ours", config, params, head=head)
    ours, theirs = (
        safe_open(pathlib.Path(path, "model.safetensors"), "np") for path in (tmp_path / "ours", folder(name, head))
    )
    names = list(ours.keys())
    assert set(names) == set(theirs.keys())
    for key in names:
        np.testing.assert_array_equal(ours.get_tensor(key), theirs.get_tensor(key), err_msg=key)
    again, back, _ = load_pretrained(tmp_path / "ours")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, back, params)

    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == [type(model(name, head)).__name__]
    _, loading = type(model(name, head)).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize(("name", "head"), LANGUAGE_MODELS)
def test_packed_rows_equal_the_documents_alone(name, head):
    """Three documents in a row: ours packed, PyTorch's one by one; window borders lie inside and between them."""
    config, params, _ = load_pretrained(folder(name, head))
    batch = batch_of(config, [[19, 7, 14], [33, 1, 6]], 40, seed=5)
    batch["input_ids"] = 2 + batch["input_ids"] % (config.vocab_size - 2)
    got = np.asarray(jax.jit(functools.partial(scores, config, head))(params, batch))
    for row, document in [(row, number) for row in range(2) for number in (1, 2, 3)]:
        place = batch["segment_ids"][row] == document
        ids = torch.tensor(batch["input_ids"][row, place][None], dtype=torch.long)
        with torch.no_grad():
            expected = model(name, head)(input_ids=ids).logits[0].numpy()
        np.testing.assert_allclose(got[row, place], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name, _ in GREEDY])
def test_greedy_texts_are_those_of_generate(name, monkeypatch):
    """64 tokens after prompts of different lengths, padded on the left, with a cache."""
    config, params, _ = load_pretrained(folder(name, "causal_lm"))
    rng = np.random.default_rng(8)
    prompts = [rng.integers(3, 200, size).tolist() for size in (21, 9, 1)]
    ids = torch.tensor([[PAD] * (21 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (21 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = hf.GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=PAD)
    theirs = model(name, "causal_lm")
    monkeypatch.setattr(theirs.generation_config, "eos_token_id", None)
    expected = theirs.generate(ids, attention_mask=mask, generation_config=settings)[:, 21:]
    got = generate(config, params, prompts, jax.random.key(0), Sampling(64, temperature=0.0)).tokens_BG.tolist()
    assert got == expected.tolist()
    assert len({tuple(row) for row in got}) == 3


@pytest.mark.parametrize(("name", "head"), IN_BFLOAT16)
def test_bfloat16_is_as_close_as_pytorch_in_bfloat16(name, head):
    """The distance from float32 is that of PyTorch's own bfloat16 model, within a quarter."""
    config, params, _ = load_pretrained(folder(name, head))
    batch = rows_of(config, head)
    real = batch["segment_ids"] != 0
    theirs = model(name, head)
    with torch.no_grad():
        exact = their_scores(theirs, config, head, batch).numpy()[real]
        rough = their_scores(copy.deepcopy(theirs).to(torch.bfloat16), config, head, batch).float().numpy()[real]
    run = jax.jit(functools.partial(scores, config, head, execution=Execution(dtype="bfloat16")))
    got = np.asarray(run(params, batch), np.float32)[real]
    assert np.square(got - exact).mean() ** 0.5 <= 1.25 * np.square(rough - exact).mean() ** 0.5


@pytest.mark.parametrize(("name", "head"), ON_A_MESH)
def test_scores_on_a_mesh_are_those_of_pytorch(name, head):
    """Weights laid out over 2 × 2 × 2 devices as they are read."""
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config, params, _ = load_pretrained(folder(name, head), mesh=mesh)
    q = params["layers"]["period"]["0"]["attention"]["q"]["kernel"]
    assert q.sharding.spec[-3:] == ("fsdp", "tensor", None) and len(q.addressable_shards) == 8
    batch = rows_of(config, head)
    batch = {key: np.concatenate([value, value[:1]]) for key, value in batch.items()}
    with torch.no_grad():
        expected = their_scores(model(name, head), config, head, batch).numpy()
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(scores, config, head))(params, place_batch(batch, mesh))
    real = batch["segment_ids"] != 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-4, rtol=0)
