"""Tiny models of every family as transformers makes them: a row a family, and one for each thing it may have."""

import functools
import re
import tempfile
from typing import Any

import torch
import transformers as hf

from espalier.models.families import MODULES, family_of

SMALL = dict(vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
IDS = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
ENCODER = SMALL | IDS | dict(max_position_embeddings=66)
DECODER = SMALL | IDS | dict(num_key_value_heads=2, head_dim=12, max_position_embeddings=40_000)
# The published constants, with a shorter original context, so that short rows meet all three kinds of wavelength.
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# As Qwen 3 is extended, but for an original context within a row, and bounds between whole pairs.
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=1_000_000.0,
    factor=4.0,
    original_max_position_embeddings=64,
    beta_fast=8.0,
    beta_slow=1.0,
)
ROWS: dict[str, dict[str, Any]] = {
    "bert": dict(model_type="bert", **ENCODER),
    "bert-untied": dict(model_type="bert", **ENCODER, tie_word_embeddings=False),
    "roberta": dict(model_type="roberta", **ENCODER, type_vocab_size=1),
    "xlm-roberta": dict(model_type="xlm-roberta", **ENCODER, type_vocab_size=1),
    "camembert": dict(model_type="camembert", **ENCODER, type_vocab_size=1, tie_word_embeddings=False),
    "distilbert": dict(
        model_type="distilbert", vocab_size=200, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=1
    ),
    "distilbert-untied": dict(
        model_type="distilbert",
        vocab_size=200,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        pad_token_id=1,
        tie_word_embeddings=False,
    ),
    "electra": dict(model_type="electra", **ENCODER, embedding_size=24),
    "electra-untied": dict(model_type="electra", **ENCODER, embedding_size=24, tie_word_embeddings=False),
    "electra-wide": dict(model_type="electra", **ENCODER, embedding_size=32),
    "modernbert": dict(
        model_type="modernbert",
        **SMALL | IDS | dict(num_hidden_layers=7, cls_token_id=0, sep_token_id=2),
        local_attention=6,
    ),
    "modernbert-biased": dict(
        model_type="modernbert",
        **SMALL | IDS | dict(num_hidden_layers=6, cls_token_id=0, sep_token_id=2),
        local_attention=6,
        global_attn_every_n_layers=2,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        classifier_bias=True,
        decoder_bias=False,
        classifier_pooling="mean",
        tie_word_embeddings=False,
    ),
    "gpt2": dict(model_type="gpt2", vocab_size=200, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=96, **IDS),
    "llama2": dict(model_type="llama", **DECODER | dict(num_key_value_heads=4, head_dim=8)),
    "llama3": dict(model_type="llama", **DECODER, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biased": dict(
        model_type="llama",
        **DECODER,
        rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0),
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral": dict(model_type="mistral", **DECODER, sliding_window=6),
    "mistral-global": dict(model_type="mistral", **DECODER, sliding_window=None),
    "qwen2": dict(
        model_type="qwen2",
        **DECODER | dict(num_hidden_layers=4, head_dim=8),
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "qwen3": dict(model_type="qwen3", **DECODER, tie_word_embeddings=True, rope_parameters=YARN_ROPE),
    "gemma3": dict(
        model_type="gemma3_text",
        **DECODER | dict(num_hidden_layers=7),
        sliding_window=6,
        query_pre_attn_scalar=20,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1_000_000.0, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=10_000.0),
        ),
    ),
    # Caps that the scores of so small a model reach.
    "gemma2": dict(
        model_type="gemma2",
        **DECODER | dict(num_hidden_layers=4),
        sliding_window=6,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    ),
    "phi3": dict(
        model_type="phi3",
        **DECODER,
        sliding_window=6,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.7),
    ),
    "olmo2": dict(model_type="olmo2", **DECODER),
    "smollm3": dict(model_type="smollm3", **DECODER | dict(num_hidden_layers=3), no_rope_layer_interval=2),
    "eurobert": dict(model_type="eurobert", **DECODER),
    "nomic_bert": dict(model_type="nomic_bert", **ENCODER),
}
ROWS = {name: row for name, row in ROWS.items() if row["model_type"] in hf.CONFIG_MAPPING}
DECODERS = [name for name, row in ROWS.items() if family_of(row["model_type"]).base.causal]
LANGUAGE_MODELS = [(name, "causal_lm" if name in DECODERS else "masked_lm") for name in ROWS]
# What a row adds to the one before it is in this head alone.
ONE_HEAD = {name: "masked_lm" for name in ROWS if name.endswith("-untied")}
ALL_HEADS = [
    (name, head)
    for name, row in ROWS.items()
    for head in family_of(row["model_type"]).classes
    if head == ONE_HEAD.get(name, head)
]
# Heads and layers of these are those of rows above but for what their language model shows; classifiers are seen by
# their files, and by late pooling, which only EuroBERT has.
AKIN = ("gemma2", "phi3", "olmo2", "smollm3", "eurobert", "nomic_bert")
ALL_OWN_HEADS = [
    (name, head)
    for name, head in ALL_HEADS
    if name not in AKIN or head.endswith("_lm") or (name, head) == ("eurobert", "sequence_classification")
]
ALL_OWN_LAYERS = [(name, head) for name, head in LANGUAGE_MODELS if name not in ("smollm3", "eurobert", "nomic_bert")]

# Not every row meets every property. One row of each family has all of its heads; a further row has its language model
# and one more head, which is another from row to row, and the language model meets the other properties in one row of
# each family, again another from property to property. tests/test_models_parity.py checks what `covered` promises.
FAMILY = {name: MODULES[row["model_type"]] for name, row in ROWS.items()}
"""Row → the file in espalier/models/families."""
FULL = {family: name for name, family in reversed(FAMILY.items())}
"""Family → its first row."""


def covered(cases: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """(family, head) of cases: a choice of them is to have what all have."""
    return {(FAMILY[name], head) for name, head in cases}


def _heads(cases: list[tuple[str, str]]) -> list[tuple[str, str]]:
    more = [name for name in ROWS if name not in FULL.values() and name not in AKIN]

    def chosen(name: str, head: str) -> bool:
        others = [other for row, other in cases if row == name and not other.endswith("_lm")]
        return name not in more or head.endswith("_lm") or others.index(head) == more.index(name) % len(others)

    return [case for case in cases if chosen(*case)]


def _one_a_family(cases: list[tuple[str, str]], turn: int) -> list[tuple[str, str]]:
    rows = {family: [case for case in cases if FAMILY[case[0]] == family] for family in FULL}
    return [those[turn % len(those)] for those in rows.values() if those]


HEADS, OWN_HEADS = _heads(ALL_HEADS), _heads(ALL_OWN_HEADS)
ALL_DECODERS = [(name, head) for name, head in LANGUAGE_MODELS if head == "causal_lm"]
GREEDY, IN_BFLOAT16, ON_A_MESH = (
    _one_a_family(cases, turn) for turn, cases in enumerate((ALL_DECODERS, ALL_OWN_LAYERS, ALL_OWN_LAYERS))
)


@functools.cache
def model(name: str, head: str):
    """The PyTorch model, in float32, every weight random: no bias is zero, no scale one, no layer like another."""
    settings = dict(ROWS[name])
    settings["num_labels"] = 3 if head.endswith("classification") else 2
    config = hf.CONFIG_MAPPING[settings.pop("model_type")](**settings)
    config._attn_implementation = "eager"
    made = getattr(hf, family_of(config.model_type).classes[head])(config)
    generator = torch.Generator().manual_seed(1)
    plus_one = config.model_type.startswith("gemma")
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = re.search(r"(norm|\.ln_\w)\.weight$", key.lower()) and not plus_one
            parameter.copy_(1 + 0.2 * noise if scale else 0.15 * noise)
        if head == "masked_lm" and not config.tie_word_embeddings:
            # A bias that no score meets then; older versions of transformers hold the other one under its name.
            for unused, own in family_of(config.model_type).untied.items():
                made.get_parameter(unused).copy_(made.get_parameter(own))
    return made.eval()


_WRITTEN = tempfile.TemporaryDirectory(prefix="published-")


@functools.cache
def folder(name: str, head: str) -> str:
    """A folder with that model as transformers writes it; it goes when the tests end."""
    place = f"{_WRITTEN.name}/{name}-{head}"
    model(name, head).save_pretrained(place)
    return place
