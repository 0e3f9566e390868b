"""The four families against PyTorch transformers: same weights, same scores; and the published parameter counts."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import BERT, GPT, LLAMA, MODERN, SIZES, batch_of, strict_and_quick  # noqa: F401

import clm.presets
import mlm.presets
from models.config import Execution
from models.counts import count_params
from models.families.llama import LLAMA_1B, LLAMA_8B
from models.heads import causal_lm_head, classification_logits, masked_lm_head
from models.layers import rotary_frequencies
from models.transformer import apply
from models.vocabulary import logits

# The published config.json of Llama 3.2 1B and 3.1 8B (where they differ from LlamaConfig's defaults).
LLAMA_3 = dict(
    vocab_size=128256,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
)
LLAMA_3_1B = LLAMA_3 | dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    head_dim=64,
    tie_word_embeddings=True,
)
LLAMA_3_8B = LLAMA_3 | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)


def rope(factor):
    return dict(
        rope_theta=500000.0,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


@pytest.mark.parametrize(
    ("ours", "head", "theirs", "published"),
    [
        (mlm.presets.bert_base(), "masked_lm", lambda: hf.BertForMaskedLM(hf.BertConfig()), 109_514_298),
        (
            mlm.presets.bert_large(),
            "masked_lm",
            lambda: hf.BertForMaskedLM(
                hf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
            ),
            335_174_458,
        ),
        (clm.presets.gpt2(), "causal_lm", lambda: hf.GPT2LMHeadModel(hf.GPT2Config()), 124_439_808),
        (
            clm.presets.gpt2_medium(),
            "causal_lm",
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
            354_823_168,
        ),
        (mlm.presets.modern_base(), "masked_lm", lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig()), 149_655_232),
        (clm.presets.llama_1b(), "causal_lm", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_3_1B)), 1_235_814_400),
        (clm.presets.llama_8b(), "causal_lm", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_3_8B)), 8_030_261_248),
    ],
    ids=["bert-base", "bert-large", "gpt2", "gpt2-medium", "modernbert-base", "llama-1b", "llama-8b"],
)
def test_full_size_models_have_the_published_number_of_parameters(ours, head, theirs, published):
    with torch.device("meta"):
        assert sum(p.numel() for p in theirs().parameters()) == published
    assert count_params(ours.model, head) == published


@pytest.mark.parametrize(("config", "published"), [(LLAMA_1B, LLAMA_3_1B), (LLAMA_8B, LLAMA_3_8B)])
def test_llama_3_frequencies(config, published):
    theirs = hf.LlamaConfig(**published, rope_parameters=rope(config.rope_scaling_factor))
    expected, attention_scale = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    ours = rotary_frequencies(config.head_size, config.rope_theta, config.rope_scaling_factor)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5)
    assert attention_scale == 1.0


# Small models: everything but the sizes is the default of the PyTorch class (Llama: the published config.json).
TINY = dict(vocab_size=200, hidden_size=32, intermediate_size=48)
MODERN_2_PERIODS = dataclasses.replace(MODERN, num_hidden_layers=7)
LLAMA_UNTIED = dataclasses.replace(LLAMA, tie_word_embeddings=False)


def tiny_hf(name, classes):
    heads = dict(num_hidden_layers=2, num_attention_heads=4)
    common = dict(attn_implementation="eager", num_labels=3, pad_token_id=0)
    if name == "bert":
        return classes["bert"](hf.BertConfig(**TINY, **heads, **common, max_position_embeddings=64))
    if name == "gpt2":
        return classes["gpt2"](
            hf.GPT2Config(vocab_size=200, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64, **common)
        )
    if name == "modernbert":
        heads |= dict(num_hidden_layers=7, local_attention=6)
        return classes["modernbert"](hf.ModernBertConfig(**TINY, **heads, **common))
    published = LLAMA_3_1B | TINY | heads | dict(num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    return classes["llama"](hf.LlamaConfig(**published, **common, rope_parameters=rope(32.0)))


LANGUAGE_MODELS = {
    "bert": hf.BertForMaskedLM,
    "gpt2": hf.GPT2LMHeadModel,
    "modernbert": hf.ModernBertForMaskedLM,
    "llama": hf.LlamaForCausalLM,
}
CLASSIFIERS = {
    "bert": hf.BertForSequenceClassification,
    "gpt2": hf.GPT2ForSequenceClassification,
    "modernbert": hf.ModernBertForSequenceClassification,
    "llama": hf.LlamaForSequenceClassification,
}
OURS = {"bert": BERT, "gpt2": GPT, "modernbert": MODERN_2_PERIODS, "llama": LLAMA_UNTIED}


@pytest.mark.parametrize("name", OURS)
def test_scores_equal_those_of_pytorch(name):
    """Language-model scores of every real token of padded rows, and class scores of every row, within 1e-4."""
    config = OURS[name]
    model, classifier = (randomised(tiny_hf(name, classes), seed=1) for classes in (LANGUAGE_MODELS, CLASSIFIERS))
    batch = batch_of(config, [[24], [17], [1]], 24)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["segment_ids"]}
    if name == "bert":
        batch["token_type_ids"] = (batch["positions"] > 7).astype(np.int32)
        inputs["token_type_ids"] = batch["token_type_ids"]
    if name in ("gpt2", "llama"):  # Their classifiers look for padding tokens to find the last real one.
        inputs["input_ids"] = batch["input_ids"] = np.where(batch["segment_ids"] == 0, 0, batch["input_ids"] % 199 + 1)
    inputs = {key: torch.tensor(value, dtype=torch.long) for key, value in inputs.items()}
    with torch.no_grad():
        expected, expected_classes = model(**inputs).logits.numpy(), classifier(**inputs).logits.numpy()

    @jax.jit
    def scores(params, classifier_params):
        head = causal_lm_head if config.causal else masked_lm_head
        x_BTD = apply(config, params, batch)
        y_BTD = apply(config, classifier_params, batch)
        lm = logits(*head(config, params, x_BTD, Execution()), config.vocab_size)
        return lm, classification_logits(config, classifier_params, y_BTD, batch["segment_ids"])

    got, got_classes = scores(params_from(name, config, model), params_from(name, config, classifier))
    real = batch["segment_ids"] != 0
    assert np.abs(expected[real]).max() > 0.5
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.asarray(got_classes), expected_classes, atol=1e-4, rtol=0)


def randomised(model, seed):
    """Every weight random, so that no bias is zero, no scale one and no layer like another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = re.search(r"(norm|\.ln_\w)\.weight$", name.lower())
            parameter.copy_(1 + 0.2 * noise if scale else 0.15 * noise)
    return model.eval()


def params_from(name, config, model):
    """Weights of a PyTorch model as our tree: one small map a family."""
    weights = {key: value.detach().numpy() for key, value in model.named_parameters()}
    used = set()

    def take(key, transpose=True):
        used.add(key)
        value = weights[key]
        return value.T if transpose and value.ndim == 2 else value

    maps = {"bert": bert_map, "gpt2": gpt2_map, "modernbert": modernbert_map, "llama": llama_map}
    params = maps[name](config, weights, take)
    assert used == set(weights), set(weights) - used

    def padded(leaf):
        if leaf.shape[0] != config.vocab_size:
            return leaf
        rows = config.padded_vocab_size - config.vocab_size  # Their values must not be seen in any score.
        return np.concatenate([leaf, np.full((rows, *leaf.shape[1:]), 7.0, np.float32)])

    return jax.tree.map(padded, params)


def attention(config, q, k, v, out, biases=None):
    D, N, K, H = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size
    tree = {
        "q": {"kernel": q.reshape(D, N, H)},
        "kv": {"kernel": np.stack([k.reshape(D, K, H), v.reshape(D, K, H)])},
        "out": {"kernel": out.reshape(N, H, D)},
    }
    if biases:
        q, k, v, out = biases
        tree["q"]["bias"] = q.reshape(N, H)
        tree["kv"]["bias"] = np.stack([k.reshape(K, H), v.reshape(K, H)])
        tree["out"]["bias"] = out
    return tree


def stacked(config, layers):
    """Layers as prefix and a period of stacked ones."""
    prefix, period = len(config.prefix_layers), len(config.layer_period)
    tree = {
        "period": {
            str(j): jax.tree.map(lambda *leaves: np.stack(leaves), *layers[prefix + j :: period]) for j in range(period)
        }
    }
    if prefix:
        tree["prefix"] = {str(j): layers[j] for j in range(prefix)}
    return tree


def bert_map(config, weights, take):
    def norm(key):
        return {"scale": take(f"{key}.LayerNorm.weight"), "bias": take(f"{key}.LayerNorm.bias")}

    def dense(key):
        return {"kernel": take(f"{key}.weight"), "bias": take(f"{key}.bias")}

    layers = []
    for i in range(config.num_hidden_layers):
        at = f"bert.encoder.layer.{i}"
        keys = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")] + [f"{at}.attention.output.dense"]
        kernels, biases = [take(f"{key}.weight") for key in keys], [take(f"{key}.bias") for key in keys]
        layers.append(
            {
                "attention": attention(config, *kernels, biases),
                "attention_norm": norm(f"{at}.attention.output"),
                "mlp": {"up": dense(f"{at}.intermediate.dense"), "down": dense(f"{at}.output.dense")},
                "mlp_norm": norm(f"{at}.output"),
            }
        )
    at = "bert.embeddings"
    embeddings = {
        ours: {"embedding": take(f"{at}.{theirs}_embeddings.weight", transpose=False)}
        for ours, theirs in (("token", "word"), ("position", "position"), ("token_type", "token_type"))
    }
    params = {"embeddings": embeddings | {"norm": norm(at)}, "layers": stacked(config, layers)}
    if "classifier.weight" in weights:
        params["head"] = {"classification": {"dense": dense("bert.pooler.dense"), "out": dense("classifier")}}
        return params
    at = "cls.predictions.transform"
    head = {"transform": dense(f"{at}.dense"), "norm": norm(at), "bias": take("cls.predictions.bias")}
    return params | {"head": {"masked_lm": head}}


def gpt2_map(config, weights, take):
    def norm(key):
        return {"scale": take(f"{key}.weight"), "bias": take(f"{key}.bias")}

    def dense(key):  # Conv1D: already [in, out].
        return {"kernel": take(f"{key}.weight", transpose=False), "bias": take(f"{key}.bias")}

    layers = []
    for i in range(config.num_hidden_layers):
        at = f"transformer.h.{i}"
        qkv, out = dense(f"{at}.attn.c_attn"), dense(f"{at}.attn.c_proj")
        kernels, biases = np.split(qkv["kernel"], 3, axis=1), np.split(qkv["bias"], 3)
        layers.append(
            {
                "attention": attention(config, *kernels, out["kernel"], (*biases, out["bias"])),
                "attention_norm": norm(f"{at}.ln_1"),
                "mlp": {"up": dense(f"{at}.mlp.c_fc"), "down": dense(f"{at}.mlp.c_proj")},
                "mlp_norm": norm(f"{at}.ln_2"),
            }
        )
    embeddings = {
        ours: {"embedding": take(f"transformer.{theirs}.weight", transpose=False)}
        for ours, theirs in (("token", "wte"), ("position", "wpe"))
    }
    params = {"embeddings": embeddings, "layers": stacked(config, layers), "final_norm": norm("transformer.ln_f")}
    if "score.weight" in weights:
        params["head"] = {"classification": {"out": {"kernel": take("score.weight")}}}
    return params


def modernbert_map(config, weights, take):
    layers = []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        q, k, v = np.split(take(f"{at}.attn.Wqkv.weight"), 3, axis=1)
        gate, up = np.split(take(f"{at}.mlp.Wi.weight"), 2, axis=1)
        layer = {
            "attention": attention(config, q, k, v, take(f"{at}.attn.Wo.weight")),
            "mlp": {"gate_up": {"kernel": np.stack([gate, up])}, "down": {"kernel": take(f"{at}.mlp.Wo.weight")}},
            "mlp_norm": {"scale": take(f"{at}.mlp_norm.weight")},
        }
        if i > 0:
            layer["attention_norm"] = {"scale": take(f"{at}.attn_norm.weight")}
        layers.append(layer)
    params = {
        "embeddings": {
            "token": {"embedding": take("model.embeddings.tok_embeddings.weight", transpose=False)},
            "norm": {"scale": take("model.embeddings.norm.weight")},
        },
        "layers": stacked(config, layers),
        "final_norm": {"scale": take("model.final_norm.weight")},
    }
    dense, norm = {"kernel": take("head.dense.weight")}, {"scale": take("head.norm.weight")}
    if "classifier.weight" in weights:
        out = {"kernel": take("classifier.weight"), "bias": take("classifier.bias")}
        return params | {"head": {"classification": {"dense": dense, "norm": norm, "out": out}}}
    return params | {"head": {"masked_lm": {"transform": dense, "norm": norm, "bias": take("decoder.bias")}}}


def llama_map(config, weights, take):
    layers = []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        kernels = [take(f"{at}.self_attn.{part}_proj.weight") for part in "qkvo"]
        gate, up, down = (take(f"{at}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        layers.append(
            {
                "attention": attention(config, *kernels),
                "attention_norm": {"scale": take(f"{at}.input_layernorm.weight")},
                "mlp": {"gate_up": {"kernel": np.stack([gate, up])}, "down": {"kernel": down}},
                "mlp_norm": {"scale": take(f"{at}.post_attention_layernorm.weight")},
            }
        )
    params = {
        "embeddings": {"token": {"embedding": take("model.embed_tokens.weight", transpose=False)}},
        "layers": stacked(config, layers),
        "final_norm": {"scale": take("model.norm.weight")},
    }
    if "score.weight" in weights:
        return params | {"head": {"classification": {"out": {"kernel": take("score.weight")}}}}
    return params | {"head": {"causal_lm": {"kernel": take("lm_head.weight", transpose=False)}}}
