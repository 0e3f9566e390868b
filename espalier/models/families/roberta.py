"""RoBERTa (Liu et al. 2019), XLM-R (Conneau et al. 2020), CamemBERT (Martin et al. 2020): BERT with other positions.

The table of positions begins with the padding token's row and those before it, which no position uses.
"""

from dataclasses import replace
from typing import Any

from espalier.models.config import ModelConfig
from espalier.models.families import Family
from espalier.models.families.bert import BERT_BASE, CLASSIFIER, EMBEDDINGS, KEYS, LAYERS, POOLER, SPANS, write

ROBERTA_BASE = replace(
    BERT_BASE,
    model_type="roberta",
    vocab_size=50265,
    norm_eps=1e-5,
    max_position_embeddings=514,
    position_offset=2,
    type_vocab_size=1,
)


def _read(hf: Any) -> dict[str, Any]:
    return {"position_offset": hf.pad_token_id + 1}


def _write(config: ModelConfig) -> dict[str, Any]:
    return write(config) | {"pad_token_id": config.position_offset - 1}


def _family(model_type: str, name: str) -> Family:
    return Family(
        base=replace(ROBERTA_BASE, model_type=model_type),
        classes={
            "masked_lm": f"{name}ForMaskedLM",
            "sequence_classification": f"{name}ForSequenceClassification",
            "token_classification": f"{name}ForTokenClassification",
            "question_answering": f"{name}ForQuestionAnswering",
            "embedding": f"{name}Model",
        },
        keys=KEYS,
        trunk=EMBEDDINGS | LAYERS,
        heads={
            "masked_lm": {
                "lm_head.dense.weight": "transform/kernel: E D -> D E",
                "lm_head.dense.bias": "transform/bias: E",
                "lm_head.layer_norm.weight": "norm/scale: E",
                "lm_head.layer_norm.bias": "norm/bias: E",
                "lm_head.bias": "bias: V",
                "lm_head.decoder.weight": "kernel: V E",
            },
            "sequence_classification": {
                "classifier.dense.weight": "dense/kernel: O D -> D O",
                "classifier.dense.bias": "dense/bias: O",
                "classifier.out_proj.weight": "out/kernel: C D -> D C",
                "classifier.out_proj.bias": "out/bias: C",
            },
            "token_classification": CLASSIFIER,
            "question_answering": SPANS,
            "embedding": POOLER,
        },
        prefix="roberta.",
        aliases={
            "embeddings.word_embeddings.weight": ("lm_head.decoder.weight",),
            "lm_head.bias": ("lm_head.decoder.bias",),
        },
        untied={"lm_head.bias": "lm_head.decoder.bias"},
        only={
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "position_embedding_type": ("absolute", None),
            "hidden_act": ("gelu",),
        },
        read=_read,
        write=_write,
    )


FAMILIES = {
    "roberta": _family("roberta", "Roberta"),
    "xlm-roberta": _family("xlm-roberta", "XLMRoberta"),
    "camembert": _family("camembert", "Camembert"),
}
