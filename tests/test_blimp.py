"""BLiMP by `evaluate`: scores of decoders and encoders against transformers, phenomena, intervals, files, refusals."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import BERT, GPT, random_params

import espalier
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.models.hub import save_pretrained
from espalier.predict import outputs
from espalier.predict.likelihood import hiding
from finetune.tasks.choose import blimp

SETS = ("anaphor_gender_agreement", "anaphor_number_agreement", "only_npi_scope", "wh_island")
PAIRS = 3


@pytest.fixture(scope="module")
def there(tmp_path_factory, shared_data):
    """The first pairs of a few sets, and models in folders of Hugging Face format whose words have several tokens."""
    root = tmp_path_factory.mktemp("blimp")
    (root / "sets").mkdir()
    sentences = []
    for name in SETS:
        lines = (shared_data / "blimp" / f"{name}.tsv").read_text().splitlines()[:PAIRS]
        (root / "sets" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
        sentences += [line.split("\t") for line in lines]
    # A few hundred tokens: a word is one or several.
    texts = [one for pair in sentences for one in pair] * 5
    for name, base, kind, head in (("gpt", GPT, "bpe", "causal_lm"), ("bert", BERT, "wordpiece", "masked_lm")):
        tokenizer = train_tokenizer(texts, kind, 300, for_masked_lm=not base.causal)
        config = dataclasses.replace(base, vocab_size=vocabulary_size(tokenizer), max_position_embeddings=96)
        save_pretrained(root / name, config, random_params(config, (head,)), tokenizer, head=head)
    return root, sentences


def causal_score(model, tokenizer, sentence: str) -> float:
    """Σ log p by transformers, a sentence behind the token of the beginning of text, alone in its batch."""
    ids = [tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(scores[at, label]) for at, label in enumerate(ids[1:]))


def masked_score(model, tokenizer, sentence: str, within_word: bool) -> float:
    """Each token masked once in a pass of its own; the words are those that the tokenizer of transformers tells."""
    encoded = tokenizer(sentence)
    ids, words, total = encoded["input_ids"], encoded.word_ids(), 0.0
    for at, word in enumerate(words):
        if word is None:
            continue
        later = [place for place in range(at, len(ids)) if within_word and words[place] == word]
        masked = [tokenizer.mask_token_id if place in (at, *later) else token for place, token in enumerate(ids)]
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([masked])).logits[0, at].double(), -1)
        total += float(scores[ids[at]])
    return total


@pytest.mark.parametrize("kind", ["gpt", "bert", "bert within words"])
def test_scores_are_those_of_transformers(there, ask, tmp_path, kind):
    root, sentences = there
    name, *within = kind.split(" ", 1)
    flags = ["--data.within-word"] if within else []
    asked = (f"hf:{root / name}", "--task", "multiple_choice", "--data.validation", root / "sets", "--json", *flags)
    code, out, _ = ask(*asked, "--output", tmp_path / "out")
    assert code == 0
    metrics = json.loads(out.splitlines()[-1])["metrics"]
    tokenizer = hf.AutoTokenizer.from_pretrained(root / name)
    made = hf.AutoModelForCausalLM if name == "gpt" else hf.AutoModelForMaskedLM
    model = made.from_pretrained(root / name).eval()
    if name == "gpt":
        expected = [[causal_score(model, tokenizer, one) for one in pair] for pair in sentences]
    else:
        expected = [[masked_score(model, tokenizer, one, bool(within)) for one in pair] for pair in sentences]
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([row["log_likelihoods"] for row in rows], expected, rtol=1e-5, atol=1e-4)
    right = np.array([good > bad for good, bad in expected]).reshape(len(SETS), PAIRS).mean(1)
    assert [metrics["paradigms"][one] for one in SETS] == pytest.approx(right) and 0 < metrics["accuracy"] < 1
    assert metrics["phenomena"]["anaphor_agreement"] == pytest.approx(right[:2].mean())
    fields = {name: value for name, value in metrics["fields"].items() if not name.endswith("_interval")}
    assert fields == pytest.approx({"morphology": right[:2].mean(), "syntax_semantics": right[2], "syntax": right[3]})
    assert [name for name in metrics if isinstance(metrics[name], dict)] == ["fields", "phenomena", "paradigms"]
    assert "phenomena island_effects" in out and "95 % interval" in out


def test_batches_and_padding_change_nothing(there, monkeypatch):
    root, sentences = there
    for name in ("gpt", "bert"):
        model = espalier.load(f"hf:{root / name}")
        found = [model.choose("", pair)["log_likelihoods"] for pair in sentences]
        with monkeypatch.context() as patch:
            patch.setattr(outputs, "SHORTEST", 64)
            patch.setattr(outputs, "ROWS", 3)
            alone = [model.choose("", pair)["log_likelihoods"] for pair in sentences[::4]]
        np.testing.assert_allclose(alone, found[::4], rtol=1e-5)


def test_the_later_tokens_of_a_word_are_hidden_with_it(there):
    root, _ = there
    model = espalier.load(f"hf:{root / 'bert'}")
    ids = model.tokenizer("Whose hat should Karla", add_special_tokens=False)["input_ids"]
    pieces = model.tokenizer.convert_ids_to_tokens(ids)
    assert any(piece.startswith("##") for piece in pieces), pieces
    mask = model.tokenizer.mask_token_id
    for at, row in enumerate(hiding(model, [(ids, len(ids))], within_word=True)):
        end = next((n for n in range(at + 1, len(ids)) if not pieces[n].startswith("##")), len(ids))
        assert row.ids[1:-1] == [*ids[:at], *[mask] * (end - at), *ids[end:]] and row.of_row["at"] == at + 1


def test_the_published_files_are_read_too(there, ask, tmp_path):
    root, sentences = there
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"sentence_good": good, "sentence_bad": bad, "UID": SETS[number // PAIRS], "field": "syntax"}
        for number, (good, bad) in enumerate(sentences)
    ]
    for name in SETS:
        own = [json.dumps(row) + "\n" for row in rows if row["UID"] == name]
        (folder / f"{name}.jsonl").write_text("".join(own))
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for path in (root / "sets", folder, tmp_path / "all.jsonl"):
        code, out, _ = ask(f"hf:{root / 'gpt'}", "--task", "multiple_choice", "--data.validation", path, "--json")
        assert code == 0
        found.append(json.loads(out.splitlines()[-1])["metrics"])
    assert found[0] == found[1] == found[2] and len(found[0]["paradigms"]) == 2 * len(SETS)
    asked = [f"hf:{root / 'gpt'}", "--task", "multiple_choice", "--data.validation", folder]
    _, out, _ = ask(*asked, "--data.per-file", 2, "--output", tmp_path / "out")
    few = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [row["choices"] for row in few] == [sentences[n * PAIRS + at] for n in range(len(SETS)) for at in (0, 1)]
    (folder / "wh_island.jsonl").write_text(json.dumps({"sentence_good": "a", "sentence_bad": " "}) + "\n")
    for flags, words in (
        ((), "wh_island.jsonl:1: sentence_good and sentence_bad must be texts"),
        (("--data.per-file", 0), "data.per_file=0 must be at least 1"),
        (("--data.validation", root / "sets", "--data.within-word"), "this one is a decoder; leave it out"),
    ):
        code, _, err = ask(*asked, *flags)
        assert code == 2 and words in err.splitlines()[-1]


def test_every_file_has_its_phenomenon_and_intervals_are_those_of_the_bootstrap(shared_data):
    """The paper's table 4: 12 phenomena, of 1 to 9 paradigms in these files, and 67 in all."""
    assert {path.stem for path in (shared_data / "blimp").glob("*.tsv")} == blimp.PARADIGMS.keys()
    assert len({kind.phenomenon for kind in blimp.PARADIGMS.values()}) == 12
    assert {kind.field for kind in blimp.PARADIGMS.values()} == {
        "morphology",
        "semantics",
        "syntax",
        "syntax_semantics",
    }
    some = [blimp.Paradigm("a", 70, 100), blimp.Paradigm("b", 45, 50)]
    assert blimp.accuracy(some) == pytest.approx((0.7 + 0.9) / 2)
    # The normal approximation of a mean of two proportions.
    error = 1.96 * np.sqrt(0.7 * 0.3 / 100 + 0.9 * 0.1 / 50) / 2
    np.testing.assert_allclose(blimp.accuracy_interval(some, samples=20_000), [0.8 - error, 0.8 + error], atol=0.005)
    assert blimp.accuracy_interval([blimp.Paradigm("a", 5, 5)]) == [1.0, 1.0]
    uneven = blimp.summary([*some, blimp.Paradigm("wh_island", 1, 2), blimp.Paradigm("adjunct_island", 2, 2)])
    assert uneven["phenomena"]["island_effects"] == 0.75 and uneven["fields"]["syntax"] == 0.75
