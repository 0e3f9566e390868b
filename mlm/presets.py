"""Named masked-LM runs. A preset is a function; its docstring says what it is, how to run it and what it reached."""

from __future__ import annotations

from dataclasses import replace

from espalier.data.config import DataConfig
from espalier.models.config import Execution
from espalier.models.families.bert import BERT_BASE, BERT_LARGE
from espalier.models.families.electra import ELECTRA_BASE, ELECTRA_SMALL
from espalier.models.families.modernbert import MODERNBERT_BASE
from espalier.models.families.qwen import QWEN3_600M
from espalier.models.families.t5 import T5_V1_1_SMALL
from espalier.training.config import CheckpointConfig, OptimizerConfig
from mlm.config import (
    DiffusionConfig,
    ElectraConfig,
    GeneratorConfig,
    HybridConfig,
    MaskedNextTokenConfig,
    MaskingConfig,
    PretrainConfig,
    SpanCorruptionConfig,
)


def debug() -> PretrainConfig:
    """A toy that trains in seconds, to see that everything runs: `./launch.sh mlm debug`. Any hardware."""
    return PretrainConfig(
        steps=20,
        batch_size=8,
        log_every=5,
        eval_every=10,
        eval_rows=16,
        model=replace(
            BERT_BASE,
            vocab_size=1024,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
        ),
        data=DataConfig(builtin="pydoc", sequence_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        checkpoint=CheckpointConfig(every=10),
    )


def demo() -> PretrainConfig:
    """A small encoder for 2 CPU cores on built-in text: `./launch.sh mlm demo`.

    4 minutes (JAX 0.10.1, 10,000 tokens/s): held-out loss 4.6 to 5.1, accuracy 20 to 27 % of the masked tokens, with
    --data.lowercase.
    """
    return PretrainConfig(
        steps=550,
        batch_size=32,
        log_every=25,
        eval_every=275,
        eval_rows=128,
        model=replace(
            MODERNBERT_BASE,
            vocab_size=4096,
            hidden_size=128,
            num_hidden_layers=4,
            layer_period=("global",),
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=512,
            classifier_pooling="mean",
        ),
        data=DataConfig(builtin="pydoc", sequence_length=128),
        masking=MaskingConfig(rate=0.3, final_rate=0.15, whole_words=True),
        execution=Execution(scan_layers=True),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=0.1, weight_decay=0.01),
        checkpoint=CheckpointConfig(every=100),
    )


def bert_base() -> PretrainConfig:
    """BERT-base (110M; Devlin et al. 2019), length 512, 256 rows: `./launch.sh mlm bert-base --data.files …`.

    Not yet run to the end. The recipe's first 90 % at length 128 is `--data.sequence-length 128 --batch-size 1024`.
    """
    return PretrainConfig(
        steps=1_000_000,
        batch_size=256,
        log_every=50,
        eval_every=5000,
        model=BERT_BASE,
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=1e-4, b2=0.999, eps=1e-6, warmup=10_000, weight_decay=0.01),
        checkpoint=CheckpointConfig(every=5000),
    )


def bert_large() -> PretrainConfig:
    """BERT-large (335M), fully sharded over the devices: `./launch.sh mlm bert-large --data.files …`. Not yet run."""
    from sharding.mesh import MeshConfig

    return replace(bert_base(), model=BERT_LARGE, mesh=MeshConfig(fsdp=-1))


def modern_base() -> PretrainConfig:
    """ModernBERT-base's architecture (149M; Warner et al. 2024): `./launch.sh mlm modern-base --data.files …`.

    Not yet run. Length 1024 and a warm-up, stable, decay schedule as in the paper's first phase; extend it with
    `--init-from RUN --init-optimizer --data.sequence-length 8192`.
    """
    return PretrainConfig(
        steps=400_000,
        batch_size=512,
        log_every=50,
        eval_every=5000,
        model=MODERNBERT_BASE,
        data=DataConfig(sequence_length=1024, tokenizer_kind="bpe"),
        masking=MaskingConfig(rate=0.3, mask_fraction=1.0, random_fraction=0.0),
        optimizer=OptimizerConfig(
            learning_rate=8e-4, schedule="wsd", warmup=2000, decay_fraction=0.1, weight_decay=1e-5, b2=0.98, eps=1e-6
        ),
        checkpoint=CheckpointConfig(every=5000),
    )


def encoder_small() -> PretrainConfig:
    """An encoder of 33M by the recipe of docs/experiments.md: `./launch.sh mlm encoder-small --data.files …`.

    Not yet run at this size: what the recipe reached at 64 × 4, on 2 CPU cores, is on that page. ModernBERT's layers,
    all global, with Muon, 30 % of the tokens hidden at first and 15 % at the end; rates are half of those of that
    size. Exports as ModernBertForMaskedLM.
    """
    return PretrainConfig(
        steps=50_000,
        batch_size=256,
        log_every=50,
        eval_every=2500,
        model=replace(
            MODERNBERT_BASE,
            vocab_size=30_522,
            hidden_size=384,
            num_hidden_layers=12,
            layer_period=("global",),
            num_attention_heads=6,
            intermediate_size=1024,
            max_position_embeddings=512,
            classifier_pooling="mean",
        ),
        data=DataConfig(sequence_length=512),
        masking=MaskingConfig(rate=0.3, final_rate=0.15),
        optimizer=OptimizerConfig(
            name="muon", learning_rate=4e-3, muon_learning_rate=0.02, warmup=0.1, weight_decay=0.01, b2=0.98, eps=1e-6
        ),
        checkpoint=CheckpointConfig(every=2500),
    )


def hybrid() -> HybridConfig:
    """GPT-BERT's objective (Charpentier & Samuel 2024), 33M: `./launch.sh mlm hybrid --data.files …`.

    Not yet run at this size. Of 16 rows one is causal; in the others hidden tokens, 30 % at first and 15 % at the end,
    are predicted from the place before. Exports as Qwen3ForCausalLM; `evaluate --bidirectional` reads it as masked.
    """
    return HybridConfig(
        steps=20_000,
        batch_size=256,
        log_every=50,
        eval_every=1000,
        model=replace(
            QWEN3_600M,
            vocab_size=16_384,
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=None,
            head_dim=None,
            intermediate_size=1408,
            max_position_embeddings=512,
            rope_theta=10_000.0,
        ),
        data=DataConfig(tokenizer_kind="bpe", sequence_length=512),
        masking=MaskingConfig(rate=0.3, final_rate=0.15),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=4e-3,
            muon_learning_rate=0.02,
            schedule="cosine",
            warmup=0.05,
            final_fraction=0.1,
            weight_decay=0.1,
            b2=0.95,
            eps=1e-8,
        ),
        checkpoint=CheckpointConfig(every=1000),
    )


def mntp() -> MaskedNextTokenConfig:
    """A decoder that learns to see both sides (LLM2Vec): `./launch.sh mlm mntp --init-from RUN --data.files …`.

    Not yet run at size. For 1,000 steps it predicts 20 % of the tokens, hidden by a token that --masking.token names
    where the vocabulary has none for that. Then `finetune` takes it for an encoder.
    """
    base = hybrid()
    return MaskedNextTokenConfig(
        steps=1000,
        batch_size=32,
        log_every=10,
        eval_every=250,
        model=replace(base.model, causal=False),
        data=base.data,
        masking=MaskingConfig(rate=0.2),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup=100),
        checkpoint=CheckpointConfig(every=250),
    )


def t5_small() -> SpanCorruptionConfig:
    """T5 v1.1 small (77M) by span corruption: `./launch.sh mlm t5-small --data.files …`.

    Not yet run. A row is 566 tokens of text, of which 85 in 28 spans are hidden: 512 are read and 116 written.
    """
    return SpanCorruptionConfig(
        steps=100_000,
        batch_size=128,
        log_every=50,
        eval_every=2000,
        model=replace(T5_V1_1_SMALL, hidden_dropout=0.0, attention_dropout=0.0),
        data=DataConfig(tokenizer_kind="bpe", sequence_length=566),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=2000, weight_decay=0.1, b2=0.98),
        checkpoint=CheckpointConfig(every=2000),
    )


def t5_debug() -> SpanCorruptionConfig:
    """A toy encoder-decoder that trains in seconds by span corruption: `./launch.sh mlm t5-debug`. Any hardware."""
    base = t5_small()
    return replace(
        base,
        steps=20,
        batch_size=8,
        log_every=5,
        eval_every=10,
        eval_rows=16,
        model=replace(
            base.model,
            vocab_size=1024,
            hidden_size=64,
            head_dim=16,
            num_hidden_layers=2,
            num_decoder_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
        ),
        data=DataConfig(builtin="pydoc", tokenizer_kind="bpe", sequence_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        checkpoint=CheckpointConfig(every=10),
    )


def electra_demo() -> ElectraConfig:
    """A small ELECTRA for 2 CPU cores on built-in text: `./launch.sh mlm electra-demo`. Not yet run."""
    base = demo()
    return ElectraConfig(
        steps=base.steps,
        batch_size=base.batch_size,
        log_every=base.log_every,
        eval_every=base.eval_every,
        eval_rows=base.eval_rows,
        model=replace(
            ELECTRA_SMALL,
            vocab_size=4096,
            embedding_size=64,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=128,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        data=base.data,
        execution=base.execution,
        optimizer=replace(base.optimizer, learning_rate=2e-3),
        checkpoint=base.checkpoint,
    )


def electra_small() -> ElectraConfig:
    """ELECTRA-small (14M; Clark et al. 2020), by the paper: `./launch.sh mlm electra-small --data.files …`.

    Not yet run to the end. The generator is a quarter as wide (docs/electra.md).
    """
    return ElectraConfig(
        steps=1_000_000,
        batch_size=128,
        log_every=50,
        eval_every=5000,
        model=ELECTRA_SMALL,
        data=DataConfig(sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=5e-4, b2=0.999, eps=1e-6, warmup=10_000, weight_decay=0.01),
        checkpoint=CheckpointConfig(every=5000),
    )


def electra_base() -> ElectraConfig:
    """ELECTRA-base (109M; Clark et al. 2020), length 512, 256 rows: `./launch.sh mlm electra-base --data.files …`.

    Not yet run to the end. The generator is a third as wide.
    """
    return replace(
        electra_small(),
        steps=766_000,
        batch_size=256,
        model=ELECTRA_BASE,
        generator=GeneratorConfig(size=1 / 3),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=2e-4, b2=0.999, eps=1e-6, warmup=10_000, weight_decay=0.01),
    )


def diffusion_demo() -> DiffusionConfig:
    """A small masked diffusion model for 2 CPU cores, on built-in text: `./launch.sh mlm diffusion-demo`.

    Not yet run.
    """
    base = demo()
    return DiffusionConfig(
        steps=base.steps,
        batch_size=base.batch_size,
        log_every=base.log_every,
        eval_every=base.eval_every,
        eval_rows=256,
        model=base.model,
        data=replace(base.data, tokenizer_kind="bpe"),
        execution=base.execution,
        optimizer=replace(base.optimizer, weight_decay=0.03),
        checkpoint=base.checkpoint,
    )


def diffusion_base() -> DiffusionConfig:
    """Masked diffusion, ModernBERT's layers (149M), as long as MDLM: `./launch.sh mlm diffusion-base --data.files …`.

    Sahoo et al. 2024: a million steps, 3e-4 after a warm-up. Not yet run (docs/diffusion.md).
    """
    return DiffusionConfig(
        steps=1_000_000,
        batch_size=512,
        log_every=50,
        eval_every=5000,
        model=replace(MODERNBERT_BASE, prefix_layers=("global",), layer_period=("global",)),
        data=DataConfig(sequence_length=1024, tokenizer_kind="bpe"),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="constant", warmup=2500, weight_decay=0.0, b2=0.999, eps=1e-8
        ),
        checkpoint=CheckpointConfig(every=5000),
    )


PRESETS = {
    "debug": debug,
    "demo": demo,
    "bert-base": bert_base,
    "bert-large": bert_large,
    "modern-base": modern_base,
    "encoder-small": encoder_small,
    "hybrid": hybrid,
    "mntp": mntp,
    "t5-debug": t5_debug,
    "t5-small": t5_small,
    "electra-demo": electra_demo,
    "electra-small": electra_small,
    "electra-base": electra_base,
    "diffusion-demo": diffusion_demo,
    "diffusion-base": diffusion_base,
}
