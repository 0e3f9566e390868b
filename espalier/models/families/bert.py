"""BERT (Devlin et al. 2019): post-norm encoder, learned positions, exact GELU."""

from dataclasses import replace
from typing import Any

from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.families import Family

BERT_BASE = ModelConfig(type_vocab_size=2)

BERT_LARGE = replace(BERT_BASE, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}

EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "embeddings/token/embedding: V E",
    "embeddings.position_embeddings.weight": "embeddings/position/embedding: P E",
    "embeddings.token_type_embeddings.weight": "embeddings/token_type/embedding: Y E",
    "embeddings.LayerNorm.weight": "embeddings/norm/scale: E",
    "embeddings.LayerNorm.bias": "embeddings/norm/bias: E",
}
LAYERS = {
    "encoder.layer.{}.attention.self.query.weight": "attention/q/kernel: (N H) D -> D N H",
    "encoder.layer.{}.attention.self.query.bias": "attention/q/bias: (N H) -> N H",
    "encoder.layer.{}.attention.self.key.weight": "attention/kv/kernel[0]: (K H) D -> D K H",
    "encoder.layer.{}.attention.self.key.bias": "attention/kv/bias[0]: (K H) -> K H",
    "encoder.layer.{}.attention.self.value.weight": "attention/kv/kernel[1]: (K H) D -> D K H",
    "encoder.layer.{}.attention.self.value.bias": "attention/kv/bias[1]: (K H) -> K H",
    "encoder.layer.{}.attention.output.dense.weight": "attention/out/kernel: D (N H) -> N H D",
    "encoder.layer.{}.attention.output.dense.bias": "attention/out/bias: D",
    "encoder.layer.{}.attention.output.LayerNorm.weight": "attention_norm/scale: D",
    "encoder.layer.{}.attention.output.LayerNorm.bias": "attention_norm/bias: D",
    "encoder.layer.{}.intermediate.dense.weight": "mlp/up/kernel: F D -> D F",
    "encoder.layer.{}.intermediate.dense.bias": "mlp/up/bias: F",
    "encoder.layer.{}.output.dense.weight": "mlp/down/kernel: D F -> F D",
    "encoder.layer.{}.output.dense.bias": "mlp/down/bias: D",
    "encoder.layer.{}.output.LayerNorm.weight": "mlp_norm/scale: D",
    "encoder.layer.{}.output.LayerNorm.bias": "mlp_norm/bias: D",
}
CLASSIFIER = {
    "classifier.weight": "out/kernel: C D -> D C",
    "classifier.bias": "out/bias: C",
}
SPANS = {
    "qa_outputs.weight": "out/kernel: 2 D -> D 2",
    "qa_outputs.bias": "out/bias: 2",
}
POOLER = {
    "pooler.dense.weight": "dense/kernel: O D -> D O",
    "pooler.dense.bias": "dense/bias: O",
}


def write(config: ModelConfig) -> dict[str, Any]:
    """UserError where the model has no token types, for transformers' BERT always adds one."""
    if config.type_vocab_size < 1:
        raise UserError("BERT in transformers has token types, and this model has none; train with one or two of them")
    return {}


FAMILIES = {
    "bert": Family(
        base=BERT_BASE,
        classes={
            "masked_lm": "BertForMaskedLM",
            "sequence_classification": "BertForSequenceClassification",
            "token_classification": "BertForTokenClassification",
            "question_answering": "BertForQuestionAnswering",
            "embedding": "BertModel",
        },
        keys=KEYS,
        trunk=EMBEDDINGS | LAYERS,
        heads={
            "masked_lm": {
                "cls.predictions.transform.dense.weight": "transform/kernel: E D -> D E",
                "cls.predictions.transform.dense.bias": "transform/bias: E",
                "cls.predictions.transform.LayerNorm.weight": "norm/scale: E",
                "cls.predictions.transform.LayerNorm.bias": "norm/bias: E",
                "cls.predictions.bias": "bias: V",
                "cls.predictions.decoder.weight": "kernel: V E",
            },
            # The pooler is part of the stack in BERT, so its names have the prefix.
            "sequence_classification": {f"bert.{name}": where for name, where in POOLER.items()} | CLASSIFIER,
            "token_classification": CLASSIFIER,
            "question_answering": SPANS,
            "embedding": POOLER,
        },
        prefix="bert.",
        aliases={
            "embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",),
            "cls.predictions.bias": ("cls.predictions.decoder.bias",),
        },
        untied={"cls.predictions.bias": "cls.predictions.decoder.bias"},
        ignored=r"\bposition_ids$|^cls\.seq_relationship\.",
        only={
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "position_embedding_type": ("absolute", None),
        },
        write=write,
    )
}
