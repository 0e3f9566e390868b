"""Files of Hugging Face: what is read, however it is spelled, and written bit by bit; nothing half-written."""

import dataclasses
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import BERT, GPT, LLAMA, random_params, rewrite, same
from transformers import CONFIG_MAPPING

from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.families import MODULES, family_of
from espalier.models.hub import Pretrained, load_pretrained, save_pretrained
from espalier.models.placement import place
from espalier.models.tensor_files import TensorFiles
from espalier.models.weight_map import param_shapes, tensors_of
from sharding.mesh import MeshConfig, build_mesh
from sharding.rules import shard_params

SIZES = dict(vocab_size=200, hidden_size=32, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
LABELS = ("no", "perhaps", "yes")


def small(model_type: str) -> ModelConfig:
    """The family's published shape, made small: every feature stays."""
    base = family_of(model_type).base
    sizes = SIZES | dict(
        num_hidden_layers=len(base.prefix_layers) + 2 * len(base.layer_period) + len(base.suffix_layers),
        head_dim=base.head_dim and 8,
        num_key_value_heads=base.num_key_value_heads and 2,
        embedding_size=base.embedding_size and 24,
        sliding_window=base.sliding_window and 6,
    )
    return dataclasses.replace(base, **sizes)


def without_padding(config, params):
    """Rows that only fill up the vocabulary are no part of a file."""

    def trimmed(leaf):
        return leaf[: config.vocab_size] if leaf.shape[0] == config.padded_vocab_size else leaf

    return jax.tree.map(trimmed, params)


CASES = [(model_type, head) for model_type in MODULES for head in family_of(model_type).classes]


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_export_and_import_keep_every_bit(tmp_path, model_type, head):
    # Dropout that no class has by default, where its files know it.
    base = small(model_type)
    hidden, keys = 0.3 if base.hidden_dropout else 0.0, family_of(model_type).keys
    one = keys.get("attention_dropout") == keys.get("hidden_dropout")
    config = dataclasses.replace(base, attention_dropout=hidden if one else 0.25, hidden_dropout=hidden)
    if head.endswith("classification"):
        config = dataclasses.replace(config, labels=LABELS)
    params = random_params(config, (head,))
    if model_type not in CONFIG_MAPPING:
        with pytest.raises(UserError, match=f"transformers .* has no {model_type}, which came with version 5"):
            save_pretrained(tmp_path / "there", config, params, head=head)
        return
    save_pretrained(tmp_path / "there", config, params, head=head)
    back, again, tokenizer = load_pretrained(tmp_path / "there")
    assert Pretrained(tmp_path / "there").head == head and tokenizer is None
    kv_heads = config.kv_heads if config.num_key_value_heads or back.num_key_value_heads else None
    assert back == dataclasses.replace(config, num_key_value_heads=kv_heads)
    same(without_padding(config, again), without_padding(config, params))


OLD = {
    "gamma and beta": lambda tensors: {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    },
    "no prefix": lambda tensors: {name.removeprefix("bert."): tensor for name, tensor in tensors.items()},
    "tied copies, buffers and another head": lambda tensors: (
        tensors
        | {
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
            "bert.embeddings.position_ids": np.arange(64)[None],
            "bert.pooler.dense.weight": np.ones((32, 32), np.float32),
            "bert.pooler.dense.bias": np.ones(32, np.float32),
            "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
        }
    ),
    "only the tied copy": lambda tensors: {
        {
            "bert.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight",
            "cls.predictions.bias": "cls.predictions.decoder.bias",
        }.get(name, name): tensor
        for name, tensor in tensors.items()
    },
}


@pytest.mark.parametrize("spelling", OLD)
def test_old_names(bert, spelling):
    folder, params = bert
    rewrite(folder, OLD[spelling])
    _, again, _ = load_pretrained(folder)
    same(without_padding(BERT, again), without_padding(BERT, params))


def test_tied_head_of_a_decoder_under_either_name(tmp_path):
    params = random_params(GPT, ("causal_lm",))
    save_pretrained(tmp_path / "gpt2", GPT, params)

    def older(tensors):
        buffers = {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32), "h.0.attn.masked_bias": np.float32([-1e4])}
        return buffers | {
            name.removeprefix("transformer.").replace("wte.weight", "lm_head.weight"): tensor
            for name, tensor in tensors.items()
        }

    rewrite(tmp_path / "gpt2", older)
    _, again, _ = load_pretrained(tmp_path / "gpt2")
    same(without_padding(GPT, again), without_padding(GPT, params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly_and_written(tmp_path, dtype):
    params = random_params(LLAMA, ("causal_lm",))
    save_pretrained(tmp_path / "half", LLAMA, params, dtype=dtype)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype
    _, again, _ = load_pretrained(tmp_path / "half")
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    rounded = jax.tree.map(lambda leaf: leaf.astype(kind).astype(np.float32), params)
    same(without_padding(LLAMA, again), without_padding(LLAMA, rounded))


def test_several_files_with_an_index(tmp_path):
    params = random_params(LLAMA, ("causal_lm",))
    save_pretrained(tmp_path / "whole", LLAMA, params)
    save_pretrained(tmp_path / "shards", LLAMA, params, shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert max((tmp_path / "shards" / name).stat().st_size for name in names[1:]) < 22_000
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    same(load_pretrained(tmp_path / "shards")[1], load_pretrained(tmp_path / "whole")[1])


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (1, 1, 8), (8, 1, 1)])
def test_weights_are_placed_on_the_mesh_piece_by_piece(bert, sizes):
    """Pieces of any size give the same; every device holds its part and no more."""
    folder, _ = bert
    mesh = build_mesh(MeshConfig(*sizes))
    config = dataclasses.replace(BERT, num_attention_heads=8)
    wide = random_params(config, ("masked_lm",))
    save_pretrained(folder.parent / "wide", config, wide)
    _, params, _ = load_pretrained(folder.parent / "wide", mesh=mesh)
    layout = shard_params(param_shapes(config, "masked_lm"), mesh)
    for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(layout), strict=True):
        assert leaf.sharding == where
        assert {shard.data.shape for shard in leaf.addressable_shards} == {where.shard_shape(leaf.shape)}
    same(without_padding(config, jax.device_get(params)), without_padding(config, wide))

    view = np.arange(2 * 24 * 8, dtype=np.float32).reshape(2, 24, 8)
    abstract = jax.ShapeDtypeStruct(
        (2, 32, 8),
        np.float32,
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor", "fsdp")),
    )
    for piece_bytes in (4, 100, 10_000):
        with jax.set_mesh(mesh):  # as the training loop has it
            made = place(abstract, [((number,), view[number]) for number in range(2)], piece_bytes)
        np.testing.assert_array_equal(np.asarray(made), np.pad(view, [(0, 0), (0, 8), (0, 0)]))


def test_host_memory_stays_near_one_tensor(tmp_path):
    """Extra memory while 0.6 GB are read: below 1.3 × the largest tensor, though two layers in one stack are larger."""
    code = textwrap.dedent(f"""
        import os, sys, threading, time
        os.environ["XLA_FLAGS"] = ""
        import jax, numpy as np
        from espalier.models.config import ModelConfig
        from espalier.models.hub import load_pretrained, save_pretrained
        from espalier.models.weight_map import param_shapes
        config = ModelConfig(vocab_size=40_000, hidden_size=1024, num_hidden_layers=4, num_attention_heads=8,
                             intermediate_size=16_384, type_vocab_size=2, max_position_embeddings=64)
        folder = {str(tmp_path / "large")!r}
        if sys.argv[1] == "write":
            shapes = param_shapes(config, "masked_lm")
            save_pretrained(folder, config, jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes))
            sys.exit()

        tiny = ModelConfig(vocab_size=128, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, type_vocab_size=2)
        if not os.path.exists(folder + "-tiny"):
            shapes = param_shapes(tiny, "masked_lm")
            save_pretrained(folder + "-tiny", tiny, jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes))
        load_pretrained(folder + "-tiny")  # the code itself is loaded before the memory is watched

        def resident():  # without the pages of mapped files, which the system takes back when it needs them
            return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024

        before, peak, done = resident(), 0, False

        def watch():
            global peak
            while not done:
                peak = max(peak, resident())
                time.sleep(0.002)

        thread = threading.Thread(target=watch); thread.start()
        _, params, _ = load_pretrained(folder)
        done = True; thread.join()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        stack = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        largest = 40_000 * 1024 * 4
        assert size > 3 * largest and stack > 1.5 * largest, (size, stack)
        extra = peak - before - size
        print(extra / largest)
        assert extra < 1.3 * largest, extra / largest
    """)
    for phase in ("write", "read"):
        done = subprocess.run([sys.executable, "-c", code, phase], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_repository_comes_from_the_cache_of_the_hub(bert, tmp_path, monkeypatch):
    """Laid out as huggingface_hub does; a revision is one of its snapshots."""
    import huggingface_hub.constants

    folder, params = bert
    repository = tmp_path / "hub" / "models--somebody--small-bert"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lines = sorted(
        (path.name, f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}") for path in folder.iterdir()
    )
    listed = hashlib.sha256("\n".join(line for _, line in lines).encode()).hexdigest()
    assert Pretrained(folder).revision == f"{folder} at SHA-256 {listed}"
    assert Pretrained("somebody/small-bert").revision == f"somebody/small-bert at {commit}"
    for revision in (None, "main", commit):
        _, again, _ = load_pretrained("somebody/small-bert", revision=revision)
        same(without_padding(BERT, again), without_padding(BERT, params))
    with pytest.raises(UserError, match="the Hub could not be reached"):
        load_pretrained("somebody/small-bert", revision="v9")


def test_an_export_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    params = random_params(BERT, ("masked_lm",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        save_pretrained(tmp_path / "full", BERT, params)
    monkeypatch.setattr("espalier.models.hub.write_tensors", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path / "out", BERT, params)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("model_type", MODULES)
def test_every_tensor_fills_the_parameters_exactly(model_type):
    """Each element of each parameter comes from one element of one tensor, padding of the vocabulary apart."""
    family = family_of(model_type)
    for head in family.classes:
        config = dataclasses.replace(small(model_type), labels=LABELS)
        shapes = param_shapes(config, head)
        tensors = tensors_of(family, config, head, shapes)
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        padding = config.padded_vocab_size - config.vocab_size
        spare = sum(
            padding * int(np.prod(leaf.shape[1:]))
            for leaf in jax.tree.leaves(shapes)
            if leaf.shape[0] == config.padded_vocab_size
        )
        elements = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        assert sum(int(np.prod(tensor.shape)) for tensor in tensors) == elements - spare


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_no_header_looks_like_a_pickle(tmp_path, length):
    """Headers of some lengths begin with the bytes of a pickle."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", length) + header.ljust(length) + struct.pack("<f", 2.5)
    )
    assert TensorFiles(tmp_path)["a"] == 2.5
