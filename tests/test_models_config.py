"""Architectures that cannot be, and that a configuration is what it was after JSON."""

import dataclasses
import json

import pytest
from tiny_models import EVERYTHING, MODERN

from espalier.errors import UserError
from espalier.models.config import ModelConfig


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(num_hidden_layers=9), "num_hidden_layers=9 does not fit prefix 1 .* try 10"),
        (dict(prefix_layers=(), num_hidden_layers=3), "first_attention_norm=False needs the first layer in prefix"),
        (dict(sliding_window=None), "local layers need sliding_window"),
        (dict(num_attention_heads=5), "hidden_size=32 is not divisible by num_attention_heads=5"),
        (dict(num_key_value_heads=3), "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        (dict(attn_logit_softcapping=0.0), "attn_logit_softcapping=0.0 must be above 0"),
        (dict(final_logit_softcapping=-30.0), "final_logit_softcapping=-30.0 must be above 0"),
        (dict(partial_rotary_factor=1.5), "partial_rotary_factor=1.5 must lie above 0 and up to 1"),
        (dict(partial_rotary_factor=0.4), r"head_dim=8 × partial_rotary_factor=0.4 = 3 is not an even number"),
        (dict(head_dim=7), "head_dim=7 is not an even number"),
        (dict(suffix_layers=("nope",), num_hidden_layers=5, position_embedding="learned"), "nope layers go without"),
        (dict(norm_position="output"), "norm_position=output has none there; try first_attention_norm=True"),
    ],
)
def test_impossible_models_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MODERN, **bad)


def test_a_config_survives_json():
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(EVERYTHING)))) == EVERYTHING
