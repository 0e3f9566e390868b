"""Tokens of a domain in a pretrained vocabulary: one id each, rows that are means, and all loads in transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from tiny_models import BERT, GPT, LLAMA, close, random_params, strict_and_quick  # noqa: F401

from espalier.commands.convert import ExportConfig, ImportConfig, export_model, import_model
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.loading import load
from espalier.models.hub import save_pretrained

TEXTS = ["the patient took paracetamol at home", "a new art of parties", "病人服用阿司匹林", "对乙酰氨基酚"] * 20
NEW = ["ibuprofen", "blood-pressure", "art", "阿司匹林", "布洛芬", "ibuprofen"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "new.txt"
    file.write_text("\n".join(NEW) + "\n\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["wordpiece", "untied bpe", "llama"])
def test_new_tokens_begin_as_the_mean_of_their_pieces_and_load_everywhere(kind, tokens, tmp_path, capsys):
    config, head = {"wordpiece": (BERT, "masked_lm"), "untied bpe": (GPT, "causal_lm"), "llama": (LLAMA, "causal_lm")}[
        kind
    ]
    tokenizer = train_tokenizer(
        TEXTS, "wordpiece" if head == "masked_lm" else "bpe", 383, for_masked_lm=head == "masked_lm"
    )
    config = dataclasses.replace(config, vocab_size=len(tokenizer), tie_word_embeddings=kind != "untied bpe")
    before = random_params(config, (head,))
    save_pretrained(tmp_path / "base", config, before, tokenizer)
    import_model(ImportConfig(str(tmp_path / "base"), str(tmp_path / "run"), add_tokens=str(tokens)))
    model = load(tmp_path / "run")
    new = [word for word in dict.fromkeys(NEW) if word not in tokenizer.get_vocab()]
    assert f"{len(new)} tokens added, {len(tokenizer) + len(new)} in the vocabulary" in capsys.readouterr().out
    assert model.config.vocab_size == len(model.tokenizer) == len(tokenizer) + len(new)
    assert model.config.padded_vocab_size % 128 == 0

    table, old = (np.asarray(params["embeddings"]["token"]["embedding"]) for params in (model.params, before))
    np.testing.assert_array_equal(table[: len(tokenizer)], old[: len(tokenizer)])
    for word in new:
        (index,) = model.tokenizer(word, add_special_tokens=False).input_ids
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        assert index >= len(tokenizer)
        np.testing.assert_allclose(table[index], old[pieces].mean(0), rtol=1e-6)
    # A whole word is a token, a part of another is not; Chinese has no blanks.
    assert model.tokenizer.tokenize("parties") == tokenizer.tokenize("parties")
    assert "布洛芬" in model.tokenizer.tokenize("病人服用布洛芬")
    # Text without them is what it was.
    plain = "the patient took paracetamol at home"
    assert model.tokenizer(plain).input_ids == tokenizer(plain).input_ids

    export_model(ExportConfig(str(tmp_path / "run"), str(tmp_path / "exported")))
    kinds = {"masked_lm": transformers.AutoModelForMaskedLM, "causal_lm": transformers.AutoModelForCausalLM}
    theirs = kinds[head].from_pretrained(tmp_path / "exported").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "the patient took ibuprofen 病人服用布洛芬"
    ids = their_tokenizer(text, return_tensors="np").input_ids
    assert ids[0].tolist() == model.tokenizer(text).input_ids
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert expected.shape[-1] == model.config.vocab_size
    close(model.logits({"input_ids": ids, "attention_mask": np.ones_like(ids)}), expected, 1e-4)
    assert jax.tree.structure(model.params) == jax.tree.structure(before)


def test_files_without_new_tokens_are_refused(tmp_path):
    tokenizer = train_tokenizer(TEXTS, "wordpiece", 383, for_masked_lm=True)
    config = dataclasses.replace(BERT, vocab_size=len(tokenizer))
    save_pretrained(tmp_path / "base", config, random_params(config, ("masked_lm",)), tokenizer)
    (tmp_path / "old.txt").write_text("paracetamol\n[SEP]\n")
    (tmp_path / "odd.txt").write_bytes("é".encode("latin1"))
    for name, said in (("old", "no token that is new .2 are there"), ("odd", "in UTF-8"), ("none", "in UTF-8")):
        with pytest.raises(UserError, match=said) as error:
            import_model(
                ImportConfig(str(tmp_path / "base"), str(tmp_path / "run"), add_tokens=str(tmp_path / f"{name}.txt"))
            )
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
