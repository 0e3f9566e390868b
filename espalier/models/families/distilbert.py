"""DistilBERT (Sanh et al. 2019): BERT without token types and pooler, and with names of its own."""

from dataclasses import replace

from espalier.models.families import Family
from espalier.models.families.bert import BERT_BASE, CLASSIFIER, SPANS

DISTILBERT_BASE = replace(
    BERT_BASE, model_type="distilbert", num_hidden_layers=6, type_vocab_size=0, classifier_pooler="relu"
)

FAMILIES = {
    "distilbert": Family(
        base=DISTILBERT_BASE,
        classes={
            "masked_lm": "DistilBertForMaskedLM",
            "sequence_classification": "DistilBertForSequenceClassification",
            "token_classification": "DistilBertForTokenClassification",
            "question_answering": "DistilBertForQuestionAnswering",
            "embedding": "DistilBertModel",
        },
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "max_position_embeddings": "max_position_embeddings",
            "hidden_dropout": "dropout",
            "attention_dropout": "attention_dropout",
            "initializer_range": "initializer_range",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        trunk={
            "embeddings.word_embeddings.weight": "embeddings/token/embedding: V E",
            "embeddings.position_embeddings.weight": "embeddings/position/embedding: P E",
            "embeddings.LayerNorm.weight": "embeddings/norm/scale: E",
            "embeddings.LayerNorm.bias": "embeddings/norm/bias: E",
            "transformer.layer.{}.attention.q_lin.weight": "attention/q/kernel: (N H) D -> D N H",
            "transformer.layer.{}.attention.q_lin.bias": "attention/q/bias: (N H) -> N H",
            "transformer.layer.{}.attention.k_lin.weight": "attention/kv/kernel[0]: (K H) D -> D K H",
            "transformer.layer.{}.attention.k_lin.bias": "attention/kv/bias[0]: (K H) -> K H",
            "transformer.layer.{}.attention.v_lin.weight": "attention/kv/kernel[1]: (K H) D -> D K H",
            "transformer.layer.{}.attention.v_lin.bias": "attention/kv/bias[1]: (K H) -> K H",
            "transformer.layer.{}.attention.out_lin.weight": "attention/out/kernel: D (N H) -> N H D",
            "transformer.layer.{}.attention.out_lin.bias": "attention/out/bias: D",
            "transformer.layer.{}.sa_layer_norm.weight": "attention_norm/scale: D",
            "transformer.layer.{}.sa_layer_norm.bias": "attention_norm/bias: D",
            "transformer.layer.{}.ffn.lin1.weight": "mlp/up/kernel: F D -> D F",
            "transformer.layer.{}.ffn.lin1.bias": "mlp/up/bias: F",
            "transformer.layer.{}.ffn.lin2.weight": "mlp/down/kernel: D F -> F D",
            "transformer.layer.{}.ffn.lin2.bias": "mlp/down/bias: D",
            "transformer.layer.{}.output_layer_norm.weight": "mlp_norm/scale: D",
            "transformer.layer.{}.output_layer_norm.bias": "mlp_norm/bias: D",
        },
        heads={
            "masked_lm": {
                "vocab_transform.weight": "transform/kernel: E D -> D E",
                "vocab_transform.bias": "transform/bias: E",
                "vocab_layer_norm.weight": "norm/scale: E",
                "vocab_layer_norm.bias": "norm/bias: E",
                "vocab_projector.bias": "bias: V",
                "vocab_projector.weight": "kernel: V E",
            },
            "sequence_classification": {
                "pre_classifier.weight": "dense/kernel: O D -> D O",
                "pre_classifier.bias": "dense/bias: O",
                **CLASSIFIER,
            },
            "token_classification": CLASSIFIER,
            "question_answering": SPANS,
        },
        prefix="distilbert.",
        aliases={"embeddings.word_embeddings.weight": ("vocab_projector.weight",)},
    )
}
