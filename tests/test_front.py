"""`import espalier`: light, and what it loads gives the logits of transformers."""

import contextlib
import dataclasses
import importlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from published import folder, model
from tiny_models import BERT, random_params
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import espalier
from espalier.commands.convert import ExportConfig, export_model
from espalier.data.tokenizer import fingerprint, save_tokenizer
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.files import write_json
from espalier.models.logits import batch_of_tokens
from espalier.training.checkpoint import Checkpoints
from espalier.training.config import OptimizerConfig
from espalier.training.frozen import save_frozen
from espalier.training.run import RunDirectory
from espalier.training.state import new_state

TEXTS = ["to be or not to be", "that is", "the question whether it is nobler in the mind"]
KINDS = [
    ("bert", "masked_lm"),
    ("roberta", "masked_lm"),
    ("gpt2", "causal_lm"),
    ("llama3", "causal_lm"),
    ("bert", "sequence_classification"),
    ("llama2", "sequence_classification"),
    ("distilbert", "token_classification"),
]


@pytest.fixture(scope="module")
def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Ids as the tiny models have them: 0 begins, 1 pads, 2 ends."""
    words = dict.fromkeys(" ".join(["<s> <pad> </s> <unk>", *TEXTS]).split())
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", cls_token="<s>", sep_token="</s>")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **special
    )


@pytest.mark.parametrize("name, head", KINDS)
def test_logits_are_those_of_transformers(name, head, tokenizer, tmp_path):
    """Texts; and tokens padded on the right and on the left, against PyTorch on each text alone, without padding."""
    shutil.copytree(folder(name, head), tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    loaded, reference = espalier.load(f"hf:{tmp_path}"), model(name, head)
    assert loaded.head == head and loaded.config.causal is (name in ("gpt2", "llama2", "llama3"))
    alone = []
    with torch.no_grad():
        for text in TEXTS:
            row = loaded.tokenizer(text, return_tensors="pt")
            alone.append(reference(input_ids=row["input_ids"]).logits[0].numpy())
    given = [(TEXTS, "right")]
    for side in ("right", "left"):
        tokens = tokenizer(TEXTS, return_tensors="np", padding=True, padding_side=side)
        assert tokens["attention_mask"][1, 0] == (side == "right")
        given.append((tokens, side))
    for texts, side in given:
        scores = np.asarray(loaded.logits(texts))
        assert scores.dtype == np.float32 and len(scores) == len(TEXTS)
        for row, want in zip(scores, alone, strict=True):
            if want.ndim == 2:
                row = row[: len(want)] if side == "right" else row[-len(want) :]
            np.testing.assert_allclose(row, want, atol=1e-4, rtol=0)


def test_tokens_that_cannot_be_a_batch_are_refused():
    ids = [[5, 6, 7], [8, 9, 0]]
    batch = batch_of_tokens({"input_ids": ids})
    assert batch["segment_ids"].all() and batch["positions"].tolist() == [[0, 1, 2]] * 2
    packed = {"input_ids": ids, "segment_ids": [[1, 1, 2], [1, 1, 0]]}
    given = batch_of_tokens(packed | {"position_ids": [[7, 8, 0], [0, 1, 0]], "offset_mapping": None})
    assert given["positions"].tolist() == [[7, 8, 0], [0, 1, 0]] and given["segment_ids"].tolist()[0] == [1, 1, 2]
    assert batch_of_tokens(packed)["positions"].tolist() == [[0, 1, 0], [0, 1, 0]]
    for tokens, words in [
        ({"attention_mask": ids}, "need input_ids, and these have attention_mask"),
        ({"input_ids": [[1, 2], [3]]}, "of different lengths; pad them"),
        ({"input_ids": [1, 2]}, "expected whole numbers, rows × tokens"),
        ({"input_ids": ids, "attention_mask": ids}, "values other than 0 and 1"),
        ({"input_ids": ids, "attention_mask": [[1, 1], [1, 1]]}, r"expected whole numbers, \(2, 3\)"),
    ]:
        with pytest.raises(UserError, match=words):
            batch_of_tokens(tokens)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        espalier.load(tmp_path)
    with pytest.raises(UserError, match="in Hugging Face format; write hf:"):
        espalier.load(folder("bert", "masked_lm"))
    with pytest.raises(UserError, match="has no tokenizer"):
        espalier.load(f"hf:{folder('bert', 'masked_lm')}")
    with pytest.raises(UserError, match="leave out step"):
        espalier.load(f"hf:{tmp_path}", step=3)


def test_importing_it_is_light_and_the_names_are_known():
    code = "import espalier, sys; print(*dir(espalier)); print(*(n for n in ('jax', 'numpy') if n in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, heavy = result.stdout.splitlines()
    assert {*espalier.__all__} <= {*names.split()} and heavy == ""
    for name, module in espalier._FRONT.items():
        assert getattr(espalier, name) is getattr(importlib.import_module(module), name)
    assert {*espalier._FRONT} == {*espalier.__all__}
    with pytest.raises(AttributeError, match="no attribute 'lode'; it has .*load"):
        espalier.lode  # noqa: B018


def test_a_run_with_frozen_parameters_is_loaded_and_exported_whole(tmp_path):
    """Parameters of a run that trained the head alone: the rest lies beside its checkpoints."""
    config = dataclasses.replace(BERT, vocab_size=300)
    params = random_params(config, ("masked_lm",))
    run, words = RunDirectory(tmp_path / "run"), train_tokenizer(TEXTS * 20, "wordpiece", 300)
    save_tokenizer(words, run.tokenizer)
    saved = {
        "task": "masked_lm",
        "model": dataclasses.asdict(config),
        "fingerprints": {"tokenizer": fingerprint(words)},
    }
    base = {name: part for name, part in params.items() if name != "head"}
    record = save_frozen(run.frozen, base, "elsewhere")
    state = new_state({"head": params["head"]}, lambda params: {}, OptimizerConfig(), jax.random.key(0), base)
    with contextlib.closing(Checkpoints(run.checkpoints)) as checkpoints:
        checkpoints.save(state, saved, {"frozen": record})
    write_json(run.config, saved)
    export_model(ExportConfig(str(run.path), str(tmp_path / "exported")))
    loaded, exported = espalier.load(run.path), espalier.load(f"hf:{tmp_path / 'exported'}")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    np.testing.assert_array_equal(loaded.logits(TEXTS), exported.logits(TEXTS))
