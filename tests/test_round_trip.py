"""Published folders with odd but legal values: import → run → export gives back what was there, field by field."""

import copy
import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from published import ROWS
from safetensors import safe_open
from tiny_models import batch_of, strict_and_quick  # noqa: F401
from tokenizers import AddedToken

from espalier.commands.convert import ExportConfig, ImportConfig, export_model, import_model
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.families import family_of
from espalier.models.heads import sequence_logits
from espalier.models.hub import Pretrained, load_pretrained, save_pretrained
from espalier.models.pretrained import load_weights
from espalier.models.transformer import apply, init_params
from espalier.predict.sampling import SamplingConfig, sampling_of

CONFIG_MAY_DIFFER = {"transformers_version": "names the version that wrote the file"}
TOKENIZER_MAY_DIFFER = {
    "tokenizer_class": "the one that reads tokenizer.json as it is, in versions 4 and 5",
    "added_tokens_decoder": "tokenizer.json holds them; transformers 5 writes it no more",
    "model_input_names": "named always, by what the model takes",
    "unk_token": "classes of version 5 have one that their files need not name",
    "add_prefix_space": "as above",
    "errors": "as above",
}
TEXT = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun by the old stone wall "
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "eos_token_id": [3, 5, 7],
    "max_length": 4096,
    "transformers_version": "4.37.0",
    "my_own": "x",
}


@functools.cache
def trained(kind: str):
    return train_tokenizer([TEXT * 20], kind, 300, for_masked_lm=kind == "wordpiece")


def write_tokenizer(folder: pathlib.Path, causal: bool, padding: bool) -> None:
    made = copy.deepcopy(trained("bpe" if causal else "wordpiece"))
    made.add_tokens([AddedToken("zebra", lstrip=True, single_word=True)])
    made.chat_template = {"default": CHAT, "tool_use": CHAT + "!"}
    if not padding:
        made.pad_token = None
    made.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 77,
        "padding_side": "left",
        "truncation_side": "left",
        "split_special_tokens": False,
        "my_own": {"a": [1]},
    }
    path.write_text(json.dumps(settings))


def write_model(folder, row: dict, head: str, dtype: str, **more) -> torch.nn.Module:
    """A random model as transformers writes it, all its tensors in dtype."""
    settings = row | more
    config = hf.CONFIG_MAPPING[settings.pop("model_type")](**settings)
    torch.manual_seed(0)
    model = getattr(hf, family_of(config.model_type).classes[head])(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape))
        if head == "masked_lm" and not config.tie_word_embeddings:
            for unused, own in family_of(config.model_type).untied.items():
                model.get_parameter(unused).copy_(model.get_parameter(own))
    model.save_pretrained(folder)
    return model.eval()


def respell(folder: pathlib.Path, **values) -> None:
    """Change config.json; None takes a key away."""
    path = folder / "config.json"
    new = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in new.items() if value is not None}))


def tensors(folder) -> dict:
    with safe_open(pathlib.Path(folder, "model.safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


ODD = dict(
    use_cache=False,
    task_specific_params={"summarization": {"num_beams": 4}},
    my_own={"nested": [1, None]},
    id2label={0: "positive", 1: "negative"},
    label2id={"positive": 0, "negative": 1},
    initializer_range=0.01,
)
OLD_ROPE = dict(
    rope_parameters=None,
    rope_theta=1000000,
    rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0},
    dtype=None,
    torch_dtype="bfloat16",
    temperature=0.5,
)
# name → (row, head, dtype, settings that are odd for this family, how its config.json is spelled anew)
CASES = {
    "bert": ("bert", "masked_lm", "bfloat16", dict(classifier_dropout=0.3, hidden_dropout_prob=0.2), {}),
    "bert-untied": ("bert-untied", "masked_lm", "float16", {}, {}),
    "bert-regression": (
        "bert",
        "sequence_classification",
        "float16",
        dict(problem_type="regression", num_labels=1),
        {},
    ),
    "roberta": ("roberta", "sequence_classification", "bfloat16", dict(problem_type="multi_label_classification"), {}),
    "xlm-roberta": ("xlm-roberta", "token_classification", "float32", dict(classifier_dropout=0.2), {}),
    "camembert": ("camembert", "masked_lm", "float16", {}, {"architectures": None}),
    "distilbert": ("distilbert", "question_answering", "bfloat16", dict(qa_dropout=0.4, seq_classif_dropout=0.3), {}),
    "electra": ("electra", "replaced_token_detection", "float16", dict(summary_activation="tanh"), {}),
    "modernbert": ("modernbert", "embedding", "bfloat16", dict(mlp_dropout=0.1, embedding_dropout=0.2), {}),
    "gpt2": ("gpt2", "causal_lm", "float16", dict(embd_pdrop=0.3, attn_pdrop=0.0, pad_token_id=None), {}),
    "gpt2-labels": ("gpt2", "sequence_classification", "bfloat16", dict(problem_type="multi_label_classification"), {}),
    "llama": ("llama3", "causal_lm", "bfloat16", dict(eos_token_id=[3, 5, 7], pad_token_id=None), {}),
    "llama-old": ("llama2", "causal_lm", "bfloat16", dict(pretraining_tp=2, bos_token_id=None), OLD_ROPE),
    "mistral": ("mistral", "causal_lm", "float32", dict(attention_dropout=0.1), {"dtype": None}),
    "qwen2": ("qwen2", "causal_lm", "bfloat16", dict(bos_token_id=None, eos_token_id=[3, 5]), {}),
    "qwen3": ("qwen3", "causal_lm", "float16", dict(bos_token_id=None, pad_token_id=None), {}),
    "gemma2": ("gemma2", "causal_lm", "bfloat16", dict(eos_token_id=[3, 5], final_logit_softcapping=20.0), {}),
    "phi3": ("phi3", "causal_lm", "bfloat16", dict(eos_token_id=[3, 5], embd_pdrop=0.1), {}),
    "olmo2": ("olmo2", "sequence_classification", "float16", dict(problem_type="regression", num_labels=1), {}),
    "smollm3": ("smollm3", "causal_lm", "bfloat16", dict(eos_token_id=[3, 5]), {}),
    "eurobert": ("eurobert", "masked_lm", "bfloat16", dict(classifier_pooling="late"), {}),
    "nomic_bert": ("nomic_bert", "masked_lm", "float16", {}, {}),
    "gemma3": ("gemma3", "causal_lm", "bfloat16", dict(eos_token_id=[3, 5]), {}),
}

# Some families are younger than the oldest version of transformers.
CASES = {case: row for case, row in CASES.items() if row[0] in ROWS}


@pytest.mark.parametrize("case", CASES)
def test_import_and_export_give_back_what_was_published(case, tmp_path):
    name, head, dtype, odd, spelled = CASES[case]
    causal = head == "causal_lm" or name == "gpt2"
    size = len(trained("bpe" if causal else "wordpiece")) + 4  # a token more, and spare rows
    labels = {} if "num_labels" not in odd else {"id2label": None, "label2id": None}
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, ROWS[name], head, dtype, **ODD | labels | {"vocab_size": size} | odd)
    write_tokenizer(source, causal, padding=odd.get("pad_token_id", 0) is not None)
    respell(source, **spelled)
    if head == "causal_lm":
        (source / "generation_config.json").write_text(json.dumps(GENERATION))

    import_model(ImportConfig(str(source), str(tmp_path / "run")))
    export_model(ExportConfig(str(tmp_path / "run"), str(out)))

    def files(name):
        return tuple(json.loads((folder / name).read_text()) for folder in (source, out))

    theirs, ours = files("config.json")
    expected = {"dtype": dtype} if "dtype" in spelled and "torch_dtype" not in spelled else {}
    expected |= {"architectures": [family_of(theirs["model_type"]).classes[head]]}
    theirs |= expected
    assert {key for key in theirs | ours if theirs.get(key, "unset") != ours.get(key, "unset")} <= {*CONFIG_MAY_DIFFER}

    if head == "causal_lm":
        theirs, ours = files("generation_config.json")
        assert ours == theirs
    assert (out / "generation_config.json").exists() == (head == "causal_lm")

    theirs, ours = tensors(source), tensors(out)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key

    theirs, ours = files("tokenizer_config.json")
    differing = {key for key in theirs | ours if theirs.get(key, "unset") != ours.get(key, "unset")}
    assert differing <= {*TOKENIZER_MAY_DIFFER}
    theirs, ours = (hf.AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.pad_token_id, ours.bos_token_id) == (theirs.pad_token_id, theirs.bos_token_id)
    for setting in ("chat_template", "padding_side", "truncation_side", "model_max_length", "vocab_size"):
        assert getattr(ours, setting) == getattr(theirs, setting), setting
    for text in (TEXT, "zebra  zebras [SEP] <|endoftext|> ."):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template["tool_use"].endswith("!")


@pytest.mark.parametrize("name", ["bert", "llama2"])
@pytest.mark.parametrize("labels", [1, 3])
def test_scores_of_regression_and_of_several_labels_are_those_of_pytorch(name, labels, tmp_path):
    kind = "regression" if labels == 1 else "multi_label_classification"
    theirs = write_model(
        tmp_path, ROWS[name], "sequence_classification", "float32", problem_type=kind, num_labels=labels
    )
    config, params, _ = load_pretrained(tmp_path)
    assert config.problem_type == kind and len(config.labels) == labels
    batch = batch_of(config, [[20], [20]], 20)
    batch["input_ids"] = 3 + batch["input_ids"] % 190
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(batch["input_ids"], dtype=torch.long)).logits.numpy()
    x_BTD = jax.jit(functools.partial(apply, config))(params, batch)
    got = sequence_logits(config, params, x_BTD, batch["segment_ids"])
    assert got.shape == (2, labels) and np.abs(expected).max() > 0.05
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "labels"), [("regression", ("LABEL_0",)), ("multi_label_classification", None)])
def test_a_classifier_of_one_label_gets_a_new_head(kind, labels, tmp_path, capsys):
    """Even where the labels have the same names, for each of their scores stood alone; the stack stays."""
    more = {} if labels else {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    write_model(
        tmp_path,
        ROWS["bert"],
        "sequence_classification",
        "float32",
        problem_type=kind,
        **more | ({"num_labels": 1} if labels else {}),
    )
    source = Pretrained(tmp_path)
    _, old, _ = load_pretrained(tmp_path)
    model = dataclasses.replace(ModelConfig.from_dict(source.config["model"]), labels=("no", "yes"), problem_type=None)

    def init(key):
        return init_params(model, key, ("sequence_classification",))

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
        jax.eval_shape(init, jax.random.key(0)),
    )
    params = load_weights(source, model, "sequence_classification", init, 0)(shapes)
    assert f"({kind}): a new one begins at random" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, params["layers"], old["layers"])
    out = params["head"]["sequence_classification"]["out"]["kernel"]
    assert out.shape == (32, 2)
    assert not np.array_equal(out[:, 0], old["head"]["sequence_classification"]["out"]["kernel"][:, 0])


def test_what_has_changed_since_is_written_and_the_rest_stays(tmp_path):
    """Other sizes, another head, another type, another vocabulary: each changes what it must and no more."""
    row = ROWS["llama2"] | dict(eos_token_id=[3, 5, 7], id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    write_model(tmp_path / "there", row, "causal_lm", "bfloat16", **ODD | {"id2label": {0: "a", 1: "b"}})
    (tmp_path / "there" / "generation_config.json").write_text(json.dumps(GENERATION | {"suppress_tokens": [9]}))
    write_tokenizer(tmp_path / "there", True, padding=True)
    respell(tmp_path / "there", vocab_size=320, rope_parameters=None, rope_theta=5000)
    source = Pretrained(tmp_path / "there")
    assert source.published.dtype == "bfloat16" and source.published.end_ids == (3, 5, 7)
    config, made = source.config_for("causal_lm"), source.tokenizer()

    def exported(name, config, head, tokenizer=made, **more):
        params = init_params(config, jax.random.key(0), heads=(head,))
        save_pretrained(tmp_path / name, config, params, tokenizer, head=head, published=source.published, **more)
        return json.loads((tmp_path / name / "config.json").read_text())

    there = json.loads((tmp_path / "there" / "config.json").read_text())
    longer = exported(
        "longer", dataclasses.replace(config, max_position_embeddings=50_000), "causal_lm", dtype="float16"
    )
    changed = {key for key in there | longer if there.get(key) != longer.get(key)} - {*CONFIG_MAY_DIFFER}
    assert changed == {"max_position_embeddings", "dtype"} and longer["dtype"] == "float16"
    assert json.loads((tmp_path / "longer" / "tokenizer_config.json").read_text())["model_max_length"] == 50_000

    scaled = exported("scaled", dataclasses.replace(config, rope_theta=9000.0), "causal_lm")
    assert hf.LlamaConfig.from_dict(scaled).rope_parameters["rope_theta"] == 9000
    assert scaled["my_own"] == there["my_own"] and scaled["eos_token_id"] == [3, 5, 7]

    labelled = dataclasses.replace(config, labels=("x", "y", "z"))
    classifier = exported("classifier", labelled, "sequence_classification")
    assert classifier["id2label"] == {"0": "x", "1": "y", "2": "z"} and classifier["eos_token_id"] == [3, 5, 7]
    assert not (tmp_path / "classifier" / "generation_config.json").exists()

    other = train_tokenizer([TEXT[::-1] * 20], "bpe", 300, for_masked_lm=False)
    renamed = exported("renamed", config, "causal_lm", other)
    generation = json.loads((tmp_path / "renamed" / "generation_config.json").read_text())
    kept = {key: value for key, value in GENERATION.items() if key != "eos_token_id"}
    named = {f"{name}_token_id": getattr(other, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    assert generation == kept | named
    assert {key: renamed[key] for key in named} == named


def test_tokens_that_nothing_names_are_not_invented(tmp_path):
    """GPT-2 has no padding, Qwen no beginning: neither the model's files nor the tokenizer's get one."""
    made = copy.deepcopy(trained("bpe"))
    made.pad_token = made.bos_token = None
    config = dataclasses.replace(family_of("qwen2").base, vocab_size=len(made), num_hidden_layers=1, hidden_size=28)
    config = dataclasses.replace(config, intermediate_size=8, head_dim=2)
    save_pretrained(tmp_path / "x", config, init_params(config, jax.random.key(0), ("causal_lm",)), made)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "x" / name).read_text())
        assert values["eos_token_id"] == made.eos_token_id
        assert values.get("pad_token_id") is None and values.get("bos_token_id") is None
    again = hf.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert again.pad_token is None and again.bos_token is None


@pytest.mark.parametrize("kinds", [("float32", "bfloat16"), ("float16", "bfloat16")])
def test_weights_of_several_types_go_back_in_one_that_holds_them_all(kinds, tmp_path):
    model = write_model(tmp_path / "there", ROWS["gpt2"], "causal_lm", kinds[0])
    model.transformer.h[0].mlp.to(getattr(torch, kinds[1]))
    model.save_pretrained(tmp_path / "mixed")
    config, params, _ = load_pretrained(tmp_path / "mixed")
    published = Pretrained(tmp_path / "mixed").published
    assert published.dtype == "float32"
    save_pretrained(tmp_path / "out", config, params, published=published)
    theirs, ours = tensors(tmp_path / "mixed"), tensors(tmp_path / "out")
    assert all(torch.equal(ours[key], tensor.float()) for key, tensor in theirs.items())


def test_sampling_is_that_of_the_model_unless_it_is_given():
    ours = SamplingConfig()
    for values, given, expected, ignored in (
        ({}, {}, (0.8, 0, 1.0), []),
        ({"eos_token_id": 3, "_from_model_config": True}, {}, (0.8, 0, 1.0), []),
        (GENERATION, {}, (0.6, 20, 0.9), ["my_own x"]),
        (GENERATION, {"temperature": 0.0, "top_k": 0}, (0.0, 0, 0.9), ["my_own x"]),
        ({"do_sample": True}, {}, (1.0, 50, 1.0), []),
        ({"do_sample": False, "temperature": 0.6, "num_beams": 1}, {}, (0.0, 0, 1.0), []),
        ({"temperature": 0.9, "top_p": 0.6, "num_beams": 4}, {}, (0.9, 0, 0.6), ["num_beams 4"]),
    ):
        sampling, left_out = sampling_of(values, dataclasses.replace(ours, **given))
        assert (sampling.drawn, left_out) == (expected, ignored)
    with pytest.raises(UserError, match="temperature=-1"):
        sampling_of({"temperature": -1}, ours)
