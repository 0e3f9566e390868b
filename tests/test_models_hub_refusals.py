"""Files of Hugging Face that are refused, and models that have none: in one line, and nothing is written."""

import dataclasses
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import BERT, LLAMA, random_params, rewrite, same

from espalier.errors import UserError
from espalier.models.hub import load_pretrained, save_pretrained
from espalier.models.tensor_files import TensorFiles


def corrupt_header(folder, header: bytes, length: int | None = None):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


def as_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"w": [1.0]}))


def as_zip(folder):
    with zipfile.ZipFile(folder / "model.safetensors", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"w": 1}))


def only_pickle(folder):
    as_zip(folder)
    (folder / "model.safetensors").rename(folder / "weights.data")


def config_with(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def index_of(file):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))

    return change


BAD = {
    "a pickle by another name": (as_pickle, "is a pickle, whatever its name"),
    "a zip of pickles by another name": (as_zip, "is a pickle, whatever its name"),
    "only a pickle": (only_pickle, r"weights as a pickle \(weights.data\).*AutoModel"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors and no"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "remote code": (config_with(auto_map={"AutoModel": "evil.Model"}), "auto_map.*never run"),
    "unknown type": (config_with(model_type="owl"), "'owl' is not known; known are bert, roberta, .*gemma3_text"),
    "a decoder": (config_with(is_decoder=True), "is_decoder=True is not supported; it must be False"),
    "quantised": (config_with(quantization_config={"bits": 4}), "quantised"),
    "an unknown kind of labels": (
        config_with(architectures=["BertForSequenceClassification"], problem_type="ranking"),
        "problem_type.*ranking",
    ),
    "a number as text": (config_with(hidden_size="wide"), "is not a valid bert configuration"),
    "no sizes": (config_with(num_attention_heads=None), "is not a valid bert configuration"),
    "another activation": (config_with(hidden_act="mish"), "hidden_act='mish' is not one of gelu"),
    "more layers": (config_with(num_hidden_layers=3), "layer.2.output.dense.weight is missing; .* is missing"),
    "fewer layers": (config_with(num_hidden_layers=1), "layer.1.output.dense.bias is not expected; .* not expected"),
    "another width": (
        config_with(intermediate_size=64),
        r"encoder.layer.0.intermediate.dense.weight is float32 \(48, 32\), expected \(64, 32\); .*layer.1",
    ),
    "header beyond the file": (lambda folder: corrupt_header(folder, b"{}", 10**12), "is truncated"),
    "header is no JSON": (lambda folder: corrupt_header(folder, b"{nonsense}"), "not a valid safetensors"),
    "tensor beyond the file": (
        lambda folder: corrupt_header(folder, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        "not a valid safetensors",
    ),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is truncated"),
    "a name with dots": (
        lambda folder: rewrite(folder, lambda tensors: tensors | {"../x": np.ones(1, np.float32)}),
        r"tensor called '\.\./x'",
    ),
    "an index to elsewhere": (index_of("../elsewhere.safetensors"), "only .safetensors files beside it"),
    "an index to a pickle": (index_of("pytorch_model.bin"), "only .safetensors files beside it"),
    "an index to nothing": (index_of("model-00001-of-00001.safetensors"), "which is not there"),
    "an index that lists too much": (index_of("elsewhere.safetensors"), "lists tensors that no file holds: a;"),
    "an index that is none": (
        lambda folder: (index_of("x")(folder), (folder / "model.safetensors.index.json").write_text("[]")),
        "is not a tensor index",
    ),
    "twice": (
        lambda folder: rewrite(
            folder, lambda t: t | {"embeddings.word_embeddings.weight": t["bert.embeddings.word_embeddings.weight"]}
        ),
        "twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_in_one_line(bert, case):
    folder, _ = bert
    change, message = BAD[case]
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_every_fault_is_listed_at_once(bert):
    folder, _ = bert

    def spoil(tensors):
        del tensors["bert.encoder.layer.0.output.dense.bias"], tensors["cls.predictions.transform.dense.weight"]
        tensors["bert.encoder.layer.1.output.dense.bias"] = np.ones(7, np.float32)
        tensors["bert.encoder.layer.1.intermediate.dense.bias"] = np.ones(48, np.int64)
        return tensors | {"adapter.weight": np.ones(3, np.float32)}

    rewrite(folder, spoil)
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    for fault in (
        "bert.encoder.layer.0.output.dense.bias is missing",
        "cls.predictions.transform.dense.weight is missing",
        "bert.encoder.layer.1.output.dense.bias is float32 (7,), expected (32,)",
        "bert.encoder.layer.1.intermediate.dense.bias is I64 (48,), expected (48,)",
        "adapter.weight is not expected",
    ):
        assert fault in str(error.value)


def test_heads_that_are_not_there(bert):
    folder, params = bert
    with pytest.raises(UserError, match="has no head question_answering, but masked_lm"):
        load_pretrained(folder, head="question_answering")
    with pytest.raises(UserError, match="may have masked_lm, sequence_classification"):
        load_pretrained(folder, head="causal_lm")
    _, stack, _ = load_pretrained(folder, head="embedding")
    assert stack.keys() == {"embeddings", "layers"}
    same(stack["layers"], params["layers"])


def test_what_cannot_be_found(tmp_path):
    for given, message in (
        (str(tmp_path / "none"), "there is no folder"),
        ("../x/y", "there is no folder"),
        ("organisation/name", "there is no folder organisation/name, and the Hub could not be reached"),
        (__file__, "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            load_pretrained(given)


EXOTIC = {
    "no class": (dataclasses.replace(LLAMA, model_type="bert"), "transformers has no bert with the head causal_lm"),
    "norms of queries": (dataclasses.replace(LLAMA, qk_norm=True), r"LlamaForCausalLM cannot have qk_norm=True \(it"),
    "pre-norm BERT": (dataclasses.replace(BERT, norm_position="pre"), "BertForMaskedLM cannot have norm_position='pre"),
    "no token types": (dataclasses.replace(BERT, type_vocab_size=0), "token types, and this model has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXOTIC)
def test_an_architecture_without_class_is_not_exported(tmp_path, case):
    config, message = EXOTIC[case]
    params = random_params(config, ("causal_lm" if config.causal else "masked_lm",))
    with pytest.raises(UserError, match=message):
        save_pretrained(tmp_path / "out", config, params)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_all_its_parameters_is_not_exported(tmp_path):
    """For instance what a run over a frozen base trains."""
    trained = {"head": random_params(BERT, ("masked_lm",))["head"]}
    with pytest.raises(UserError, match="embeddings/.*not among the parameters"):
        save_pretrained(tmp_path / "out", BERT, trained)
    assert not list(tmp_path.iterdir())


def test_an_untied_head_is_no_embedding(tmp_path):
    config = dataclasses.replace(LLAMA, tie_word_embeddings=False)
    save_pretrained(tmp_path / "x", config, random_params(config, ("causal_lm",)))

    def without(tensors):
        del tensors["model.embed_tokens.weight"]
        return tensors

    rewrite(tmp_path / "x", without)
    with pytest.raises(UserError, match="model.embed_tokens.weight is missing"):
        load_pretrained(tmp_path / "x")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for number in (1, 2):
        save_file({"a": np.ones(1, np.float32)}, tmp_path / f"m-{number}.safetensors")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="another file has too: a"):
        TensorFiles(tmp_path)


def test_values_too_large_for_half_precision_are_refused(tmp_path):
    params = random_params(BERT, ("masked_lm",))
    params["head"]["masked_lm"]["bias"][3] = 1e6
    with pytest.raises(UserError, match="cls.predictions.bias has values up to 1e.06, too large for float16"):
        save_pretrained(tmp_path / "x", BERT, params, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    save_pretrained(tmp_path / "x", BERT, params, dtype="bfloat16")
