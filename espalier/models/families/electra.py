"""ELECTRA (Clark et al. 2020): BERT's stack on narrower embeddings; a discriminator finds replaced tokens."""

from dataclasses import replace

from espalier.models.families import Family
from espalier.models.families.bert import BERT_BASE, CLASSIFIER, EMBEDDINGS, KEYS, LAYERS, SPANS, write

ELECTRA_SMALL = replace(
    BERT_BASE,
    model_type="electra",
    embedding_size=128,
    hidden_size=256,
    num_attention_heads=4,
    intermediate_size=1024,
    classifier_pooler="gelu",
)
ELECTRA_BASE = replace(
    ELECTRA_SMALL,
    embedding_size=768,
    hidden_size=768,
    num_attention_heads=12,
    intermediate_size=3072,
)

FAMILIES = {
    "electra": Family(
        base=ELECTRA_SMALL,
        classes={
            "replaced_token_detection": "ElectraForPreTraining",
            "masked_lm": "ElectraForMaskedLM",
            "sequence_classification": "ElectraForSequenceClassification",
            "token_classification": "ElectraForTokenClassification",
            "question_answering": "ElectraForQuestionAnswering",
            "embedding": "ElectraModel",
        },
        keys=KEYS,
        trunk=EMBEDDINGS
        | {
            "embeddings_project.weight": "embeddings/project/kernel: D E -> E D",
            "embeddings_project.bias": "embeddings/project/bias: D",
        }
        | LAYERS,
        heads={
            "replaced_token_detection": {
                "discriminator_predictions.dense.weight": "dense/kernel: O D -> D O",
                "discriminator_predictions.dense.bias": "dense/bias: O",
                "discriminator_predictions.dense_prediction.weight": "out/kernel: 1 D -> D 1",
                "discriminator_predictions.dense_prediction.bias": "out/bias: 1",
            },
            # The generator.
            "masked_lm": {
                "generator_predictions.dense.weight": "transform/kernel: E D -> D E",
                "generator_predictions.dense.bias": "transform/bias: E",
                "generator_predictions.LayerNorm.weight": "norm/scale: E",
                "generator_predictions.LayerNorm.bias": "norm/bias: E",
                "generator_lm_head.bias": "bias: V",
                "generator_lm_head.weight": "kernel: V E",
            },
            "sequence_classification": {
                "classifier.dense.weight": "dense/kernel: O D -> D O",
                "classifier.dense.bias": "dense/bias: O",
                "classifier.out_proj.weight": "out/kernel: C D -> D C",
                "classifier.out_proj.bias": "out/bias: C",
            },
            "token_classification": CLASSIFIER,
            "question_answering": SPANS,
        },
        prefix="electra.",
        aliases={
            "embeddings.word_embeddings.weight": ("generator_lm_head.weight",),
        },
        only={
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "position_embedding_type": ("absolute", None),
            "hidden_act": ("gelu",),
        },
        read=lambda hf: {"embedding_size": hf.embedding_size},
        write=lambda config: write(config) | {"embedding_size": config.embedding_width},
    )
}
