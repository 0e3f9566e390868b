"""The presets by the recipe of docs/experiments.md are of stock classes of transformers, which compute what they do."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import as_jax, batch_of, random_params, same

import clm.presets
import mlm.presets
from espalier.models.config import Execution
from espalier.models.heads import causal_lm_head, masked_lm_head
from espalier.models.hub import load_pretrained, save_pretrained
from espalier.models.transformer import apply
from espalier.models.vocabulary import logits

SMALL = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


@pytest.mark.parametrize(
    ("preset", "head", "lm_head", "made"),
    [
        (mlm.presets.encoder_small, "masked_lm", masked_lm_head, hf.ModernBertForMaskedLM),
        (clm.presets.decoder_small, "causal_lm", causal_lm_head, hf.Qwen3ForCausalLM),
    ],
    ids=["encoder", "decoder"],
)
def test_a_small_preset_exports_to_a_stock_class_and_comes_back(preset, head, lm_head, made, tmp_path):
    config = dataclasses.replace(preset().model, **SMALL)
    params = random_params(config, (head,))
    save_pretrained(tmp_path / "there", config, params, head=head)

    theirs = made.from_pretrained(tmp_path / "there").eval()
    batch = batch_of(config, [[9]], 9)
    x_BTD = apply(config, params, as_jax(batch), execution=Execution(dtype="float32"))
    x_BTD, table_VD, bias_V = lm_head(config, params, x_BTD, Execution(dtype="float32"))
    ours = logits(x_BTD, table_VD, bias_V, config.vocab_size, None)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.asarray(batch["input_ids"], np.int64))).logits.numpy()
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4, rtol=0)

    back, again, _ = load_pretrained(tmp_path / "there")
    sizes = dict(num_key_value_heads=back.num_key_value_heads, head_dim=back.head_dim)
    assert back == dataclasses.replace(config, **sizes)
    assert (back.kv_heads, back.head_size) == (config.kv_heads, config.head_size)
    same(jax.device_get(again), jax.device_get(params))
