"""The published shapes of every family: parameter counts as published and as in PyTorch, and Llama 3's frequencies."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers as hf

import clm.presets
import mlm.presets
from espalier.models.counts import count_params
from espalier.models.families.bert import BERT_BASE, BERT_LARGE
from espalier.models.families.distilbert import DISTILBERT_BASE
from espalier.models.families.electra import ELECTRA_SMALL
from espalier.models.families.eurobert import EUROBERT_210M
from espalier.models.families.gemma import GEMMA2_2B, GEMMA3_1B
from espalier.models.families.gpt2 import GPT2, GPT2_MEDIUM
from espalier.models.families.llama import LLAMA_1B, LLAMA_8B
from espalier.models.families.mistral import MISTRAL_7B
from espalier.models.families.modernbert import MODERNBERT_BASE
from espalier.models.families.nomic_bert import NOMIC_BERT
from espalier.models.families.olmo2 import OLMO2_1B, OLMO2_7B
from espalier.models.families.phi3 import PHI3_MINI
from espalier.models.families.qwen import QWEN2_500M, QWEN3_600M
from espalier.models.families.roberta import ROBERTA_BASE
from espalier.models.families.smollm3 import SMOLLM3_3B
from espalier.models.hf_config import to_hf, to_ours
from espalier.models.rotary import rotary_frequencies

PUBLISHED = [
    ("bert-base", BERT_BASE, "masked_lm", 109_514_298),
    ("bert-large", BERT_LARGE, "masked_lm", 335_174_458),
    ("roberta-base", ROBERTA_BASE, "masked_lm", 124_697_433),
    ("distilbert-base", DISTILBERT_BASE, "masked_lm", 66_985_530),
    ("electra-small", ELECTRA_SMALL, "replaced_token_detection", 13_549_057),
    ("modernbert-base", MODERNBERT_BASE, "masked_lm", 149_655_232),
    ("gpt2", GPT2, "causal_lm", 124_439_808),
    ("gpt2-medium", GPT2_MEDIUM, "causal_lm", 354_823_168),
    ("llama-3.2-1b", LLAMA_1B, "causal_lm", 1_235_814_400),
    ("llama-3.1-8b", LLAMA_8B, "causal_lm", 8_030_261_248),
    ("mistral-7b", MISTRAL_7B, "causal_lm", 7_241_732_096),
    ("qwen2-0.5b", QWEN2_500M, "causal_lm", 494_032_768),
    ("qwen3-0.6b", QWEN3_600M, "causal_lm", 596_049_920),
    ("gemma-3-1b", GEMMA3_1B, "causal_lm", 999_885_952),
    ("gemma-2-2b", GEMMA2_2B, "causal_lm", 2_614_341_888),
    ("phi-3-mini-4k", PHI3_MINI, "causal_lm", 3_821_079_552),
    ("olmo-2-1b", OLMO2_1B, "causal_lm", 1_484_916_736),
    ("olmo-2-7b", OLMO2_7B, "causal_lm", 7_298_617_344),
    ("smollm3-3b", SMOLLM3_3B, "causal_lm", 3_075_098_624),
    # Published as 210 and 137 million; the exact numbers are PyTorch's for the published shapes.
    ("eurobert-210m", EUROBERT_210M, "embedding", 211_766_016),
    ("nomic-bert", NOMIC_BERT, "masked_lm", 137_354_304),
]
PUBLISHED = [row for row in PUBLISHED if row[1].model_type in hf.CONFIG_MAPPING]


@pytest.mark.parametrize(
    ("config", "head", "published"), [row[1:] for row in PUBLISHED], ids=[row[0] for row in PUBLISHED]
)
def test_full_size_models_have_the_published_number_of_parameters(config, head, published):
    assert count_params(config, head) == published
    theirs = to_hf(config, head)
    with torch.device("meta"):
        made = getattr(hf, theirs.architectures[0])(theirs)
    assert sum(p.numel() for p in made.parameters()) == published
    assert dataclasses.replace(to_ours(theirs), num_key_value_heads=config.kv_heads, head_dim=config.head_dim) == (
        dataclasses.replace(config, num_key_value_heads=config.kv_heads)
    )


@pytest.mark.parametrize(
    ("preset", "config"),
    [
        (mlm.presets.bert_base, BERT_BASE),
        (mlm.presets.bert_large, BERT_LARGE),
        (mlm.presets.modern_base, MODERNBERT_BASE),
        (clm.presets.gpt2, GPT2),
        (clm.presets.gpt2_medium, GPT2_MEDIUM),
        (clm.presets.llama_1b, LLAMA_1B),
        (clm.presets.llama_8b, LLAMA_8B),
    ],
)
def test_presets_named_after_a_model_have_its_shape(preset, config):
    model = preset().model
    dropouts = dict(hidden_dropout=model.hidden_dropout, attention_dropout=model.attention_dropout)
    assert model == dataclasses.replace(config, **dropouts)


@pytest.mark.parametrize("config", [LLAMA_1B, LLAMA_8B])
def test_llama_3_frequencies(config):
    expected, attention_scale = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](to_hf(config, "causal_lm"), "cpu")
    np.testing.assert_allclose(rotary_frequencies(config), expected.numpy(), rtol=1e-6)
    assert attention_scale == 1.0


YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32_768)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"factor": 1.0},
        {"truncate": False},
        {"beta_fast": 48.0, "beta_slow": 2.5},
        {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
        {"original_max_position_embeddings": 8, "rope_theta": 50.0},
        {"attention_factor": 0.75},
        {"mscale": 1.0, "mscale_all_dim": 0.5, "factor": 40.0},
    ],
    ids=str,
)
def test_yarn_frequencies(more):
    """The last bit apart, which transformers' own differ by from one processor to another."""
    config = hf.LlamaConfig(rope_parameters=YARN | more, max_position_embeddings=131_072, head_dim=128)
    expected, length = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = to_ours(config)
    np.testing.assert_allclose(rotary_frequencies(ours), expected.numpy(), rtol=1.5e-7)
    assert ours.rotary_length == pytest.approx(length, rel=1e-12)
    assert to_ours(to_hf(ours, "causal_lm")) == ours
