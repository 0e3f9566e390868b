"""Encoder-decoders of the T5 family against PyTorch transformers: states, scores, gradients, texts and files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors import safe_open
from test_models_parity import as_in_files
from tiny_models import as_jax, batch_of, close, random_params, rewrite, strict_and_quick  # noqa: F401
from transformers.models.t5.modeling_t5 import T5Attention

from clm.generate import GenerateConfig, main
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.loading import load
from espalier.models.attention import choose_backend
from espalier.models.attention_backend import Use
from espalier.models.config import Execution
from espalier.models.counts import count_params, flops_per_pair, flops_per_token
from espalier.models.decoding import Sampling
from espalier.models.encoder_decoder import encode, encode_decode
from espalier.models.families import family_of
from espalier.models.families.t5 import MT5_SMALL, T5_BASE, T5_SMALL, T5_V1_1_BASE, T5_V1_1_SMALL
from espalier.models.generate import generate
from espalier.models.heads import seq2seq_lm_head
from espalier.models.hf_config import to_hf
from espalier.models.hub import Pretrained, load_pretrained, save_pretrained
from espalier.models.memory import step_memory
from espalier.models.relative import distance_buckets
from espalier.models.transformer import apply, init_params, layer_depths, matrix_axes
from espalier.models.vocabulary import logits
from espalier.models.weight_map import export, tensors_of
from espalier.predict.sampling import SamplingConfig
from espalier.predict.use import use_of
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

EXACT = Execution(dtype="float32")
# Distances within a row that reach every bucket, and beyond the last.
SIZES = dict(
    vocab_size=200,
    d_model=32,
    d_kv=6,
    d_ff=48,
    # Of a decoder that is deeper than the encoder, generate of transformers makes too small a cache.
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    decoder_start_token_id=0,
)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
ROWS = {"t5": ("t5", {}), "t5-v1.1": ("t5", GATED), "mt5": ("mt5", GATED)}
TINY = dataclasses.replace(
    T5_SMALL,
    vocab_size=200,
    hidden_size=32,
    head_dim=6,
    intermediate_size=48,
    num_hidden_layers=2,
    num_decoder_layers=3,
    num_attention_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
)
SHORT = dataclasses.replace(TINY, num_hidden_layers=1, num_decoder_layers=1)


@functools.cache
def model(name: str) -> torch.nn.Module:
    """In float32, every weight random."""
    model_type, settings = ROWS[name]
    config = hf.CONFIG_MAPPING[model_type](**SIZES, **settings)
    made = getattr(hf, family_of(model_type).classes["seq2seq_lm"])(config)
    if settings:  # transformers ties them at first, whatever the configuration says, as published files undo.
        made.lm_head.weight = torch.nn.Parameter(torch.empty(200, 32))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in key else 0.3 * noise)
    return made.eval()


@pytest.fixture(scope="module", params=ROWS)
def written(request, tmp_path_factory):
    """(the model, its folder as transformers writes it)."""
    folder = tmp_path_factory.mktemp(request.param)
    model(request.param).save_pretrained(folder)
    return model(request.param), folder


def texts(rows: int = 3, source_length: int = 40, length: int = 25) -> tuple[dict, dict]:
    """Texts with padding behind, and the beginnings of what is written."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 200, (rows, source_length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 17:], mask[2, 2:] = 0, 0
    written = rng.integers(1, 200, (rows, length)).astype(np.int32)
    written[:, 0] = 0
    real = np.ones_like(written)
    real[0, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}, {"input_ids": written, "attention_mask": real}


def scores(config, params, source, target, execution=EXACT):
    x_BTD = encode_decode(config, params, source, target, execution=execution)
    return logits(*seq2seq_lm_head(config, params, x_BTD, execution), config.vocab_size)


def theirs_on(theirs, source, target):
    as_torch = functools.partial(torch.tensor, dtype=torch.long)
    return theirs(
        **{name: as_torch(array) for name, array in source.items()},
        decoder_input_ids=as_torch(target["input_ids"]),
        decoder_attention_mask=as_torch(target["attention_mask"]),
    )


def test_states_scores_and_gradients_are_those_of_pytorch(written, tmp_path):
    """Within 1e-4; for every tensor of the file ‖Δg‖ ≤ 1e-4 ‖g‖ + 1e-6 ‖all g‖."""
    theirs, folder = written
    config, params, _ = load_pretrained(folder)
    source, target = texts()
    real, seen = target["attention_mask"] > 0, source["attention_mask"] > 0
    theirs.zero_grad()
    expected = theirs_on(theirs, source, target)
    labels = np.random.default_rng(3).integers(0, 200, real.shape)
    F.cross_entropy(expected.logits[torch.tensor(real)], torch.tensor(labels[real])).backward()

    memory = jax.jit(functools.partial(encode, config, execution=EXACT))(params, source)
    found, wanted = np.asarray(memory.x_BSD)[seen], expected.encoder_last_hidden_state.detach().numpy()[seen]
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)

    def loss(params):
        found = scores(config, params, source, target)
        each = -jnp.take_along_axis(jax.nn.log_softmax(found), jnp.asarray(labels, jnp.int32)[..., None], axis=-1)
        return jnp.where(real, each[..., 0], 0.0).sum() / float(real.sum()), found

    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    wanted = expected.logits.detach().numpy()[real]
    assert np.abs(wanted).max() > 0.3
    np.testing.assert_allclose(np.asarray(found)[real], wanted, atol=1e-4, rtol=0)

    want = as_in_files(theirs, tmp_path)
    have = dict(
        export(tensors_of(family_of(config.model_type), config, "seq2seq_lm", params), jax.device_get(gradients))
    )
    assert want.keys() == have.keys()
    total = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in want.values()))
    for key, g in have.items():
        assert np.linalg.norm(want[key]) > 0, key
        assert np.linalg.norm(g - want[key]) <= 1e-4 * np.linalg.norm(want[key]) + 1e-6 * total, key


def test_files_go_round_bit_by_bit(written, tmp_path):
    theirs, folder = written
    config, params, _ = load_pretrained(folder)
    published = Pretrained(folder).published
    for number, beside in enumerate((None, published)):
        save_pretrained(tmp_path / str(number), config, params, published=beside)
        with (
            safe_open(tmp_path / str(number) / "model.safetensors", "np") as ours,
            safe_open(folder / "model.safetensors", "np") as there,
        ):
            names = list(there.keys())
            assert set(ours.keys()) == set(names)
            for name in names:
                np.testing.assert_array_equal(ours.get_tensor(name), there.get_tensor(name), err_msg=name)
        again, back, _ = load_pretrained(tmp_path / str(number))
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, back, params)
        loaded, info = type(theirs).from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            assert torch.equal(theirs_on(loaded, *texts()).logits, theirs_on(theirs, *texts()).logits)
    changed = {"transformers_version", "tie_word_embeddings"}
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "1"))
    assert {name: after[name] for name in after.keys() - changed} == {
        name: before[name] for name in before.keys() - changed
    }
    generation = json.loads((tmp_path / "0" / "generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == 0


def test_what_files_say_of_ties_is_read(tmp_path):
    """As published for v1.1, as transformers writes it since 5.1, and files with tied copies and an unused table."""
    for values, tied in (
        ({"tie_word_embeddings": False}, False),
        ({"scale_decoder_outputs": False}, False),
        ({}, True),
    ):
        hub = hf.T5Config.from_dict(SIZES | values)
        config = family_of("t5").read(hub)
        assert config["tie_word_embeddings"] == config["scale_decoder_outputs"] == tied
    with pytest.raises(UserError, match=r"cannot have tie_word_embeddings=False \(it has True\)|scale_decoder_outputs"):
        to_hf(dataclasses.replace(T5_SMALL, scale_decoder_outputs=False), "seq2seq_lm")
    params = random_params(TINY, ("seq2seq_lm",))
    save_pretrained(tmp_path / "there", TINY, params)

    def older(tensors):
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        copies = {f"{name}.weight": tensors["shared.weight"] for name in ("encoder.embed_tokens", "lm_head")}
        return tensors | copies | {unused: np.ones((8, 4), np.float32)}

    rewrite(tmp_path / "there", older)
    _, again, _ = load_pretrained(tmp_path / "there")
    np.testing.assert_array_equal(
        again["embeddings"]["token"]["embedding"][:200], params["embeddings"]["token"]["embedding"][:200]
    )


def test_packed_rows_equal_the_documents_alone():
    """Two texts in a row, and what is written of them in another: document i reads text i and nothing else."""
    params, run = as_jax(random_params(SHORT, ("seq2seq_lm",))), jax.jit(functools.partial(scores, SHORT))
    source, target = batch_of(SHORT, [[19, 14]], 34, 1), batch_of(SHORT, [[5, 11]], 16, 2)
    together = run(params, source, target)
    for document in (1, 2):
        one, other = (
            {"input_ids": batch["input_ids"][batch["segment_ids"] == document][None]} for batch in (source, target)
        )
        close(run(params, one, other), np.asarray(together)[target["segment_ids"] == document][None])


def test_a_mesh_a_loop_and_recomputation_change_nothing():
    params, (source, target) = as_jax(random_params(SHORT, ("seq2seq_lm",))), texts(4)

    def loss(params, execution):
        return jnp.square(scores(SHORT, params, source, target, execution)).mean()

    def run(params, execution=EXACT):
        return jax.jit(jax.value_and_grad(functools.partial(loss, execution=execution)))(params)

    wanted = run(params)
    close(run(params, Execution(dtype="float32", scan_layers=True, remat="full")), wanted)
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shard_params(params, mesh))
        assert split["decoder"]["relative"]["embedding"].sharding.spec[-1] == "tensor"
        close(run(split), wanted)


@pytest.mark.parametrize(("count", "most"), [(32, 128), (8, 20), (16, 50), (64, 300), (4, 9)])
def test_buckets_of_distances_are_those_of_transformers(count, most):
    for causal in (False, True):
        config = dataclasses.replace(
            TINY.encoder, causal=causal, relative_attention_num_buckets=count, relative_attention_max_distance=most
        )
        theirs = T5Attention._relative_position_bucket(
            torch.arange(-most, most + 1), bidirectional=not causal, num_buckets=count, max_distance=most
        )
        np.testing.assert_array_equal(distance_buckets(config), theirs.numpy())


def test_only_a_backend_that_adds_the_bias_is_chosen():
    use = Use.of(T5_SMALL.encoder, 512, dtype="bfloat16", dropping=False, platform="tpu", parts=1)
    plain = dataclasses.replace(use, bias=False)
    assert choose_backend("auto", plain)[0].name == "splash"
    backend, reason = choose_backend("auto", use)
    assert backend.name == "xla" and reason == "splash attention adds no bias to scores, as relative positions ask for"
    with pytest.raises(UserError, match="execution.attention=splash: splash attention adds no bias"):
        choose_backend("splash", use)


def test_sizes_are_those_published():
    """Raffel et al. 2020, and the released v1.1 and mT5 (their files' parameters)."""
    for config, published in (
        (T5_SMALL, 60_506_624),
        (T5_BASE, 222_903_552),
        (T5_V1_1_SMALL, 76_961_152),
        (T5_V1_1_BASE, 247_577_856),
        (MT5_SMALL, 300_176_768),
    ):
        assert count_params(config, "seq2seq_lm") == published


def test_operations_of_a_pair_are_those_of_its_parts():
    """6 for each parameter that a token meets in a matrix, and 12 for each pair of a query's and a key's number."""
    c, S, T = TINY, 40, 25
    heads, D, F = 4 * 6, 32, 48
    encoder = 2 * (4 * D * heads + 2 * D * F)
    own, cross = 3 * (4 * D * heads + 2 * D * F) + 200 * D, 3 * 2 * D * heads
    by_hand = 6 * (S * encoder + T * own + T * cross + S * cross)
    by_hand += 12 * heads * (2 * S * S + 3 * T * (T + 1) / 2 + 3 * S * T)
    assert flops_per_pair(c, S, T) == pytest.approx(by_hand, rel=1e-12)


def test_matrices_and_depths_are_known_in_both_stacks():
    params = jax.eval_shape(lambda: init_params(TINY, jax.random.key(0)))
    axes = matrix_axes(params)
    assert axes["decoder"]["layers"]["period"]["0"]["cross_attention"]["q"]["kernel"] == ((1,), (2, 3))
    assert axes["decoder"]["relative"]["embedding"] is None and axes["embeddings"]["token"]["embedding"] is None
    depths = layer_depths(TINY, params)
    assert np.ravel(depths["decoder"]["layers"]["period"]["0"]["mlp"]["up"]["kernel"]).tolist() == [3, 2, 1]
    assert np.ravel(depths["layers"]["period"]["0"]["mlp"]["up"]["kernel"]).tolist() == [5, 4]
    assert depths["embeddings"]["token"]["embedding"] == 6 and depths["final_norm"]["scale"] == 3
    assert depths["decoder"]["final_norm"]["scale"] == 0


def test_first_scores_are_as_if_divided_by_the_head_size():
    """Nothing divides them, so that queries begin 1/√head_dim as large (Raffel et al. 2020)."""
    config = dataclasses.replace(TINY.encoder, hidden_size=128, head_dim=64, num_hidden_layers=1)
    params = jax.jit(lambda: init_params(config, jax.random.key(0), ()))()
    attention = params["layers"]["period"]["0"]["attention"]
    assert float(attention["q"]["kernel"].std() / attention["kv"]["kernel"].std()) == pytest.approx(1 / 8, rel=0.05)


def test_what_takes_one_stack_refuses_two_in_one_line():
    batch = texts()[0]
    for refused in (
        lambda: apply(TINY, {}, batch),
        lambda: step_memory(TINY, "seq2seq_lm", {}, rows=1, length=8),
        lambda: flops_per_token(TINY, 8),
    ):
        with pytest.raises(UserError, match=r"models of one stack, and this one \(t5\) has an encoder and a decoder"):
            refused()
    for settings, message in (
        (dict(causal=True), "num_decoder_layers=3 adds a causal decoder"),
        (dict(num_decoder_layers=-1), "num_decoder_layers=-1 must be 0"),
        (dict(relative_attention_num_buckets=3), "relative_attention_num_buckets=3 and .*T5's are 32 and 128"),
        (dict(relative_attention_max_distance=1), "do not go together"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(TINY, **settings)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_generate(written, beams):
    """Prompts of different lengths, with a cache that keeps the keys and values of what was read."""
    theirs, folder = written
    config, params, _ = load_pretrained(folder)
    rng = np.random.default_rng(8)
    prompts = [rng.integers(3, 200, size).tolist() for size in (21, 9, 1)]
    ids = torch.tensor([prompt + [0] * (21 - len(prompt)) for prompt in prompts])
    how = hf.GenerationConfig(
        max_new_tokens=24, do_sample=False, num_beams=beams, pad_token_id=0, eos_token_id=7, decoder_start_token_id=0
    )
    expected = theirs.generate(ids, attention_mask=(ids > 0).long(), generation_config=how)[:, 1:].tolist()
    drawn = generate(config, params, prompts, jax.random.key(0), Sampling(24, 0.0, end_ids=(7,), beams=beams))
    found = np.maximum(drawn.tokens_BG, 0)[:, : len(expected[0])].tolist()
    assert found == expected and len({tuple(row) for row in found}) > 1


def test_commands_write_with_it(tmp_path, capsys):
    """generate and load(…).generate: what stands in a folder is read with the end token behind, by hand the same."""
    tokenizer = train_tokenizer(["the house is small and the book is old"] * 20, "bpe", 300)
    config = dataclasses.replace(SHORT, vocab_size=vocabulary_size(tokenizer), decoder_start_token_id=1)
    params = random_params(config, ("seq2seq_lm",))
    save_pretrained(tmp_path / "there", config, params, tokenizer)
    loaded = load(f"hf:{tmp_path / 'there'}")
    texts, eos = ["the house", "old", "is small and"], tokenizer.eos_token_id
    ids = [[*tokenizer(text, add_special_tokens=False).input_ids, eos] for text in texts]
    drawn = generate(config, as_jax(params), ids, jax.random.key(0), Sampling(6, 0.0, end_ids=(eos,)))
    kept = [[token for token in row if token >= 0 and token != eos] for row in drawn.tokens_BG.tolist()]
    wanted = [tokenizer.decode(row).replace("\ufffd", "") for row in kept]
    assert loaded.generate(texts, max_new_tokens=6, temperature=0.0) == wanted and any(wanted), kept
    assert use_of(loaded).name == "generate"
    asked = GenerateConfig(f"hf:{tmp_path / 'there'}", tuple(texts), sampling=SamplingConfig(6, 0.0))
    assert main(asked)["completions"] == wanted
    for refused in (lambda: loaded.embed("the house"), lambda: loaded.logits("the house")):
        with pytest.raises(UserError):
            refused()
