"""Families: published configurations read as they are meant, and what a family cannot have is refused."""

import dataclasses
import json

import pytest
from packaging.version import Version
from transformers import CONFIG_MAPPING, __version__

from espalier.errors import UserError
from espalier.models.families import MODULES, UNSUPPORTED, family_of, stacked
from espalier.models.hf_config import read_config, to_hf

LLAMA_LIKE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
QWEN_LIKE = LLAMA_LIKE | {"head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 131_072}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SPELLED = {
    # config.json as published, shortened to what decides; transformers 5 spells some of it anew.
    "bert-base-uncased": (
        {"architectures": ["BertForMaskedLM"], "model_type": "bert", "gradient_checkpointing": False,
         "type_vocab_size": 2, "position_embedding_type": "absolute", "hidden_act": "gelu",
         "layer_norm_eps": 1e-12, "pad_token_id": 0},
        {"num_hidden_layers": 12, "norm_eps": 1e-12, "max_position_embeddings": 512, "hidden_dropout": 0.1},
    ),
    "roberta-base": (
        {"model_type": "roberta", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "layer_norm_eps": 1e-05,
         "max_position_embeddings": 514, "type_vocab_size": 1, "vocab_size": 50265},
        {"position_offset": 2, "max_length": 512, "norm_eps": 1e-5, "type_vocab_size": 1},
    ),
    "camembert-base": (
        {"model_type": "camembert", "pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 1,
         "vocab_size": 32005, "output_past": True, "layer_norm_eps": 1e-05},
        {"position_offset": 2, "vocab_size": 32005, "tie_word_embeddings": True},
    ),
    "distilbert-base-uncased": (
        {"model_type": "distilbert", "activation": "gelu", "dim": 768, "hidden_dim": 3072, "n_heads": 12, "n_layers": 6,
         "sinusoidal_pos_embds": False, "tie_weights_": True, "dropout": 0.2, "vocab_size": 30522},
        {"num_hidden_layers": 6, "intermediate_size": 3072, "type_vocab_size": 0, "hidden_dropout": 0.2},
    ),
    "electra-small-discriminator": (
        {"architectures": ["ElectraForPreTraining"], "model_type": "electra", "embedding_size": 128, "hidden_size": 256,
         "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 12, "summary_activation": "gelu"},
        {"embedding_width": 128, "hidden_size": 256, "classifier_pooler": "gelu"},
    ),
    "ModernBERT-base": (
        {"model_type": "modernbert", "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
         "local_rope_theta": 10000.0, "local_attention": 128, "num_hidden_layers": 22, "classifier_pooling": "mean"},
        {"rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "sliding_window": 128, "repeats": 7,
         "classifier_pooling": "mean", "layer_period": ("local", "local", "global")},
    ),
    "gpt2": (
        {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
         "activation_function": "gelu_new", "task_specific_params": {"text-generation": {"do_sample": True}}},
        {"intermediate_size": 3072, "hidden_act": "gelu_new", "max_length": 1024},
    ),
    "Llama-2-7b": (
        {"model_type": "llama", **LLAMA_LIKE, "rms_norm_eps": 1e-05, "rope_scaling": None, "pretraining_tp": 1,
         "tie_word_embeddings": False, "num_key_value_heads": 4, "torch_dtype": "float16"},
        {"kv_heads": 4, "rope_theta": 10_000.0, "rope_scaling_factor": None, "tie_word_embeddings": False},
    ),
    "Llama-3.2-1B": (
        {"model_type": "llama", **LLAMA_LIKE, "head_dim": 64, "num_key_value_heads": 2, "rope_theta": 500000.0,
         "tie_word_embeddings": True, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
         "low_freq_factor": 1.0,
         "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        {"head_size": 64, "rope_theta": 500_000.0, "rope_type": "llama3", "rope_scaling_factor": 32.0, "kv_heads": 2},
    ),
    "Qwen3-8B, extended": (
        {"model_type": "qwen3", **QWEN_LIKE, "rope_theta": 1000000,
         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_type": "yarn", "rope_scaling_factor": 4.0, "rope_original_max_position_embeddings": 32768,
         "rope_theta": 1_000_000.0, "rope_beta_fast": 32.0, "rope_truncate": True},
    ),
    "the same, as transformers 5 spells it": (
        {"model_type": "qwen3", **QWEN_LIKE,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000, "factor": 4.0, "truncate": False,
         "beta_fast": 16, "attention_factor": 1.25, "original_max_position_embeddings": 32768}},
        {"rope_type": "yarn", "rope_scaling_factor": 4.0, "rope_original_max_position_embeddings": 32768,
         "rope_theta": 1_000_000.0, "rope_beta_fast": 16.0, "rope_truncate": False, "rotary_length": 1.25},
    ),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", **LLAMA_LIKE, "num_key_value_heads": 2, "rope_theta": 10000.0,
         "sliding_window": 4096},
        {"layers": ("local",) * 4, "sliding_window": 4096},
    ),
    "Mistral-7B-v0.3": (
        {"model_type": "mistral", **LLAMA_LIKE, "rope_theta": 1000000.0, "sliding_window": None,
         "num_key_value_heads": 2},
        {"layers": ("global",) * 4, "rope_theta": 1_000_000.0},
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", **LLAMA_LIKE, "max_window_layers": 24, "num_key_value_heads": 2,
         "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False,
         "tie_word_embeddings": True},
        {"layers": ("global",) * 4, "attention_bias": True, "attention_out_bias": False, "rope_theta": 1_000_000.0},
    ),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", **LLAMA_LIKE, "head_dim": 128, "num_key_value_heads": 2, "rope_theta": 1000000,
         "rope_scaling": None, "use_sliding_window": False, "attention_bias": False, "tie_word_embeddings": True},
        {"head_size": 128, "qk_norm": True, "attention_bias": False, "rope_theta": 1_000_000.0},
    ),
    "gemma-3-1b-it": (
        {"model_type": "gemma3_text", **LLAMA_LIKE | {"num_hidden_layers": 26}, "head_dim": 16,
         "num_key_value_heads": 1, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
         "rope_local_base_freq": 10000,
         "rope_theta": 1000000, "rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6,
         "final_logit_softcapping": None, "eos_token_id": [1, 106], "cache_implementation": "hybrid"},
        {"rope_theta": 1_000_000.0, "local_rope_theta": 10_000.0, "repeats": 4, "suffix_layers": ("local", "local"),
         "attention_divisor": 256, "sliding_window": 512},
    ),
    "gemma-2-27b": (
        {"model_type": "gemma2", **LLAMA_LIKE, "head_dim": 128, "num_key_value_heads": 2, "query_pre_attn_scalar": 144,
         "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0,
         "final_logit_softcapping": 30.0, "sliding_window": 4096, "sliding_window_size": 4096, "rope_theta": 10000.0},
        {"attention_divisor": 144, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "repeats": 2,
         "layer_period": ("local", "global"), "hidden_act": "gelu_pytorch_tanh", "qk_norm": False,
         "norm_position": "both", "tie_word_embeddings": True, "local_rope_theta": None},
    ),
    "Phi-3-mini-4k-instruct": (
        {"model_type": "phi3", **LLAMA_LIKE, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
         "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047, "num_key_value_heads": 4,
         "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "tie_word_embeddings": False},
        {"layers": ("local",) * 4, "sliding_window": 2047, "partial_rotary_factor": 1.0, "rope_scaling_factor": None},
    ),
    "phi-4": (
        {"model_type": "phi3", **LLAMA_LIKE, "rope_theta": 250000, "rope_scaling": None, "sliding_window": None,
         "num_key_value_heads": 2, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384},
        {"layers": ("global",) * 4, "rope_theta": 250_000.0, "kv_heads": 2, "max_position_embeddings": 16384},
    ),
    "OLMo-2-0425-1B": (
        {"model_type": "olmo2", **LLAMA_LIKE, "num_key_value_heads": 4, "rope_theta": 500000, "rms_norm_eps": 1e-06,
         "rope_scaling": None, "tie_word_embeddings": False, "attention_bias": False},
        {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all", "rope_theta": 500_000.0, "norm_eps": 1e-6,
         "tie_word_embeddings": False},
    ),
    "SmolLM3-3B": (
        {"model_type": "smollm3", **LLAMA_LIKE | {"num_hidden_layers": 8}, "num_key_value_heads": 2,
         "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 2, "rope_theta": 5000000.0,
         "rope_scaling": None, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
         "layer_types": ["full_attention"] * 8, "tie_word_embeddings": True},
        {"layer_period": ("global", "global", "global", "nope"), "repeats": 2, "rope_theta": 5_000_000.0},
    ),
    "EuroBERT-210m": (
        {"model_type": "eurobert", **LLAMA_LIKE, "auto_map": {"AutoModel": "modeling_eurobert.EuroBertModel"},
         "num_key_value_heads": 4, "rope_theta": 250000, "rms_norm_eps": 1e-05, "hidden_dropout": 0.0,
         "clf_pooling": "late", "bos_token": "<|begin_of_text|>", "mask_token_id": 128002},
        {"causal": False, "tie_word_embeddings": False, "classifier_pooling": "late", "rope_theta": 250_000.0,
         "head_transform": False, "head_bias": False},
    ),
    "nomic-embed-text-v1.5": (
        {"model_type": "nomic_bert", "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        {"norm_position": "post", "gated_mlp": True, "norm_bias": True, "mlp_bias": False, "hidden_act": "silu",
         "rope_theta": 1000.0, "type_vocab_size": 2, "vocab_size": 30528},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_published_configurations_read_as_they_are_meant(name, tmp_path):
    written, meant = SPELLED[name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    if written["model_type"] not in CONFIG_MAPPING:
        with pytest.raises(UserError, match=f"has no {written['model_type']}, which came with version 5.[35]; try pip"):
            read_config(tmp_path)
        return
    _, config = read_config(tmp_path)
    assert {key: getattr(config, key) for key in meant} == meant


def test_what_other_models_of_a_type_may_have_is_refused(tmp_path):
    base = {"model_type": "llama", **LLAMA_LIKE, "rope_theta": 10000.0}
    modern, gemma = {"model_type": "modernbert"}, {"model_type": "gemma3_text", **LLAMA_LIKE}
    phi3 = {"model_type": "phi3", **LLAMA_LIKE, "original_max_position_embeddings": 4096}
    gemma2, smollm3 = {"model_type": "gemma2", **LLAMA_LIKE}, {"model_type": "smollm3", **LLAMA_LIKE}
    long = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    scaled = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    }
    for written, message in (
        (base | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported .its frequencies ch"),
        (base | {"rope_scaling": {"rope_type": "yarn"}}, "is not a valid llama configuration: .*factor"),
        (base | {"rope_scaling": YARN | {"factor": None}}, "'yarn' comes with factor=None"),
        (base | {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supp"),
        (modern | {"classifier_activation": "silu"}, "classifier_activation='silu' is not supported"),
        (gemma | {"rope_parameters": scaled}, "'linear' in sliding layers is not supported"),
        (gemma | {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (gemma2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (phi3 | {"rope_scaling": long}, "'longrope' is not supported: beyond 4096 tokens all frequencies change"),
        (smollm3 | {"layer_types": ["sliding_attention"] * 4}, "smollm3 with sliding layers is not supported"),
        ({"model_type": "mistral", **LLAMA_LIKE, "auto_map": {"AutoModel": "a.B"}}, "auto_map.*never run"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(written))
        with pytest.raises(UserError, match=message):
            read_config(tmp_path)


def test_types_that_are_not_supported_say_why_and_what_is_near(tmp_path):
    for model_type, (why, near) in UNSUPPORTED.items():
        assert model_type in CONFIG_MAPPING, f"{model_type} is no type of transformers"
        assert {*near.split(", ")} <= MODULES.keys() and model_type not in MODULES
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UserError) as caught:
            read_config(tmp_path)
        assert str(caught.value) == f"model_type {model_type!r} is not supported: {why}; near: {near}"


def test_a_family_names_the_version_of_transformers_that_brought_it(monkeypatch):
    for model_type in MODULES:
        assert (model_type in CONFIG_MAPPING) == (Version(__version__) >= Version(family_of(model_type).since)), (
            model_type
        )
    base = family_of("nomic_bert").base
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {})
    with pytest.raises(UserError, match="has no nomic_bert, which came with version 5.5; try pip install --upgrade"):
        to_hf(base, "masked_lm")


def test_an_export_does_not_lose_a_setting_that_a_type_has_not():
    def changed(model_type, **settings):
        return dataclasses.replace(family_of(model_type).base, **settings)

    llama, olmo2 = "LlamaForCausalLM cannot have", "Olmo2ForCausalLM cannot have"
    for config, message in (
        (changed("llama", layer_period=("global", "nope")), f"{llama} layers="),
        (changed("llama", attn_logit_softcapping=50.0), f"{llama} attn_logit_softcapping=50.0"),
        (changed("llama", final_logit_softcapping=30.0), f"{llama} final_logit_softcapping=30.0"),
        (changed("llama", partial_rotary_factor=0.5), f"{llama} partial_rotary_factor=0.5"),
        (changed("olmo2", norm_position="pre"), f"{olmo2} norm_position='pre'"),
        (changed("olmo2", qk_norm_over="head"), f"{olmo2} qk_norm_over='head'"),
        (changed("gemma2", query_pre_attn_scalar=1.5), "cannot have query_pre_attn_scalar=1.5"),
        (changed("phi3", rope_scaling_factor=8.0), "phi3 in transformers has no rope_type 'llama3'"),
    ):
        with pytest.raises(UserError, match=message):
            to_hf(config, "causal_lm")


@pytest.mark.parametrize(
    ("model_type", "head", "key"),
    [
        ("bert", "masked_lm", "hidden_act"),
        ("modernbert", "masked_lm", "hidden_activation"),
        ("gpt2", "causal_lm", "activation_function"),
        ("qwen3", "causal_lm", "hidden_act"),
    ],
)
def test_squared_relu_and_zero_outputs_export_to_stock_classes(model_type, head, key):
    config = dataclasses.replace(family_of(model_type).base, hidden_act="relu2", zero_outputs=True)
    assert getattr(to_hf(config, head), key) == "relu2"


@pytest.mark.parametrize(
    ("kinds", "apart", "period"),
    [
        ("g" * 12, False, (0, 1, 0)),
        ("gllg" * 3, False, (0, 4, 0)),
        ("g" + "llg" * 7, True, (1, 3, 0)),
        (("l" * 5 + "g") * 4 + "ll", False, (0, 6, 2)),
        ("g" * 20 + "l" * 8, False, (0, 1, 8)),
        ("g", True, (0, 1, 0)),
        ("gl", True, (1, 1, 0)),
    ],
)
def test_layers_are_stacked_with_few_different_ones(kinds, apart, period):
    names = {"g": "global", "l": "local"}
    layers = [names[kind] for kind in kinds]
    found = stacked(layers, first_apart=apart)
    prefix, repeated, suffix = found["prefix_layers"], found["layer_period"], found["suffix_layers"]
    repeats = (len(layers) - len(prefix) - len(suffix)) // len(repeated)
    assert list(prefix + repeated * repeats + suffix) == layers and repeats >= 1
    assert (len(prefix), len(repeated), len(suffix)) == period
