"""Beams and the repetition penalty against `generate` of transformers, and beams against all sequences."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import torch
import transformers
from tiny_models import GPT, LLAMA, random_params, strict_and_quick  # noqa: F401

from espalier.models import generate
from espalier.models.config import Execution
from espalier.models.decoding import Sampling, penalised
from espalier.models.hub import save_pretrained
from espalier.models.logits import batch_of_tokens, head_logits
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

PROMPTS = [[7, 3, 9, 11, 2], [5], [8, 8, 1]]
ENDS = (17, 40, 99)
G = 9
SMALL = {
    name: dataclasses.replace(config, num_hidden_layers=1) for name, config in {"gpt2": GPT, "llama": LLAMA}.items()
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pairs(request, tmp_path_factory):
    """A model of ours and the same in transformers, of several seeds; scores are spread, so that no two tie."""
    config, folder = SMALL[request.param], tmp_path_factory.mktemp("beams")
    found = []
    for seed in range(3):
        params = random_params(config, ("causal_lm",), seed)
        save_pretrained(folder / str(seed), config, params)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / str(seed), attn_implementation="eager")
        theirs.generation_config = transformers.GenerationConfig()
        found.append((config, params, theirs))
    return found


def ours(config, params, **how) -> list[list[int]]:
    drawn = generate.generate(config, params, PROMPTS, jax.random.key(0), Sampling(G, temperature=0.0, **how))
    return [[int(token) for token in row if token >= 0] for row in drawn.tokens_BG]


def theirs(model, prompt, end_ids=(), **how) -> list[int]:
    settings = transformers.GenerationConfig(
        max_new_tokens=G, do_sample=False, pad_token_id=0, eos_token_id=list(end_ids) or None, **how
    )
    with torch.no_grad():
        found = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
    end = next((at + 1 for at, token in enumerate(found) if token in end_ids), len(found))
    return found[:end]


@pytest.mark.parametrize(
    ("beams", "length_penalty", "repetition_penalty", "end_ids"),
    [(4, 1.0, 1.0, ENDS), (3, -1.0, 1.3, tuple(range(0, 200, 9))), (2, 2.5, 1.0, tuple(range(0, 200, 5)))],
)
def test_beams_find_what_those_of_transformers_find(pairs, beams, length_penalty, repetition_penalty, end_ids):
    how = dict(length_penalty=length_penalty, repetition_penalty=repetition_penalty, end_ids=end_ids)
    ended = 0
    for config, params, model in pairs:
        found = ours(config, params, beams=beams, **how)
        assert found == [theirs(model, prompt, num_beams=beams, **how) for prompt in PROMPTS]
        ended += sum(len(row) < G for row in found)
    assert ended or length_penalty > 0


def test_repetition_is_penalised_as_in_transformers(pairs):
    for config, params, model in pairs:
        found = ours(config, params, repetition_penalty=1.4)
        assert found == [theirs(model, prompt, repetition_penalty=1.4) for prompt in PROMPTS]
        assert found != ours(config, params)


def test_many_beams_find_the_best_of_all_sequences():
    """Of a vocabulary of six: K as large as what is open after two tokens, so that nothing is lost."""
    config = dataclasses.replace(SMALL["llama"], vocab_size=6)
    params, end, length = random_params(config, ("causal_lm",), 3), 5, 3
    sequences = [
        row for row in itertools.product(range(6), repeat=length) if end not in row[:-1]
    ] + [(a, end) for a in range(5)] + [(end,)]  # fmt: skip
    prompt = [1, 4]
    rows = np.array([[*prompt, *row, *[0] * (length - len(row))] for row in sequences], np.int32)
    batch = batch_of_tokens({"input_ids": rows})
    logprobs = jax.nn.log_softmax(head_logits(config, "causal_lm", params, batch, Execution(dtype="float32")))
    totals = [
        sum(float(logprobs[at, 1 + place, token]) for place, token in enumerate(row))
        for at, row in enumerate(sequences)
    ]
    for penalty in (0.0, 2.0):
        best = max(range(len(sequences)), key=lambda at: totals[at] / len(sequences[at]) ** penalty)
        how = Sampling(length, beams=25, length_penalty=penalty, end_ids=(end,))
        drawn = generate.generate(config, params, [prompt], jax.random.key(0), how)
        assert tuple(token for token in drawn.tokens_BG[0] if token >= 0) == sequences[best]
        np.testing.assert_allclose(drawn.logprobs_BG[0].sum(), totals[best], atol=1e-4)


def test_beams_on_a_mesh_are_those_of_one_device():
    config, params = SMALL["llama"], random_params(SMALL["llama"], ("causal_lm",), 1)
    how = Sampling(G, beams=3, end_ids=ENDS, repetition_penalty=1.2)
    expected = generate.generate(config, params, PROMPTS, jax.random.key(0), how)
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shard_params(params, mesh))
        found = generate.generate(config, placed, PROMPTS, jax.random.key(0), how)
    np.testing.assert_array_equal(found.tokens_BG, expected.tokens_BG)
    np.testing.assert_allclose(found.logprobs_BG, expected.logprobs_BG, atol=1e-4)


def test_the_penalty_is_that_of_the_paper():
    scores = np.array([[2.0, -2.0, 3.0]], np.float32)
    seen = np.array([[True, True, False]])
    np.testing.assert_allclose(penalised(scores, seen, 2.0), [[1.0, -4.0, 3.0]])
