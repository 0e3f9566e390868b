"""`look`: every figure beside PyTorch or the plainest computation; the page holds what it shows and loads nothing."""

import asyncio
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import transformers as hf
from browser import page as browser_page
from tiny_models import (
    BERT,
    GPT,
    random_params,
    strict_and_quick,  # noqa: F401
)

import espalier
from espalier import cli
from espalier.commands.look import text as look
from espalier.commands.look.text import LookConfig
from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.look.asked import Wanted, ask, scored
from espalier.look.attention import attention, rollout
from espalier.look.attribution import COMPLETE, attribution
from espalier.look.lens import lens
from espalier.models.hub import save_pretrained

WORDS = "the quick brown fox jumps over the lazy dog while a cat sleeps in the sun 巴黎是法国的首都 "
TEXT = "the quick dog sleeps in 巴黎"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("look")
    for name, config in (("classifier", BERT), ("masked", BERT), ("causal", GPT)):
        kind = "bpe" if config.causal else "wordpiece"
        tokenizer = train_tokenizer([WORDS * 30], kind, 300, for_masked_lm=not config.causal)
        labels = ("no", "yes", "<b>") if name == "classifier" else ()
        head = {"classifier": "sequence_classification", "masked": "masked_lm", "causal": "causal_lm"}[name]
        config = dataclasses.replace(config, vocab_size=vocabulary_size(tokenizer), labels=labels)
        params = random_params(config, (head,))
        save_pretrained(root / name, config, params, tokenizer, head=head)
    return root


@pytest.fixture(scope="module")
def tuned(folders):
    """Models of other uses on the classifier's words."""
    own = loaded(folders, "classifier")

    def made(head: str, labels=(), **saved):
        config = dataclasses.replace(own.config, labels=labels)
        return dataclasses.replace(own, config=config, params=random_params(config, (head,)), head=head, saved=saved)

    return {
        "tag": made("token_classification", ("O", "B-X", "I-X")),
        "answer": made("question_answering"),
        "rank": made("sequence_classification", ("score",), task="ranking"),
        "several": dataclasses.replace(
            made("sequence_classification", ("a", "b"), tuned={"temperature": 2.0}),
            config=dataclasses.replace(own.config, labels=("a", "b"), problem_type="multi_label_classification"),
        ),
    }


def torch_model(folder, head: str):
    kinds = {"sequence_classification": "SequenceClassification", "causal_lm": "CausalLM", "masked_lm": "MaskedLM"}
    kind = kinds[head]
    return getattr(hf, f"AutoModelFor{kind}").from_pretrained(folder, attn_implementation="eager").eval()


def loaded(folders, name: str):
    return espalier.load(f"hf:{folders / name}")


@pytest.mark.parametrize("name", ["classifier", "causal"])
def test_what_arrives_is_what_each_head_adds_by_itself(folders, name):
    """‖α (x W_V + b_V) W_O‖ of every pair, from the weights and states of transformers."""
    model = loaded(folders, name)
    asked = ask(model, TEXT)
    found = attention(model, asked)
    theirs = torch_model(folders / name, "sequence_classification" if name == "classifier" else "causal_lm")
    ids = torch.tensor(asked.batch["input_ids"]).long()
    with torch.no_grad():
        out = theirs(ids, output_attentions=True, output_hidden_states=True)
        for layer in range(2):
            x = out.hidden_states[layer][0]
            if name == "classifier":
                block = theirs.bert.encoder.layer[layer].attention
                v, weight = block.self.value(x), block.output.dense.weight.T
            else:
                block = theirs.transformer.h[layer]
                v = block.attn.c_attn(block.ln_1(x))[:, -32:]
                weight = block.attn.c_proj.weight
            for head in range(4):
                part = slice(head * 8, head * 8 + 8)
                lengths = torch.linalg.vector_norm(v[:, part] @ weight[part], dim=-1)
                alpha = out.attentions[layer][0, head]
                np.testing.assert_allclose(found.probabilities_LNTS[layer, head], alpha, atol=1e-5)
                np.testing.assert_allclose(found.norms_LNTS[layer, head], alpha * lengths, rtol=1e-3, atol=1e-5)


def test_rollout_follows_every_path():
    """The sum over all paths through the layers, one by one."""
    random = np.random.default_rng(0)
    alpha = random.random((3, 2, 4, 4))
    alpha /= alpha.sum(-1, keepdims=True)
    steps = 0.5 * alpha.mean(1) + 0.5 * np.eye(4)
    expected = np.zeros((4, 4))
    for at in np.ndindex(4, 4, 4, 4):
        expected[at[3], at[0]] += steps[0, at[1], at[0]] * steps[1, at[2], at[1]] * steps[2, at[3], at[2]]
    np.testing.assert_allclose(rollout(alpha), expected)


def pytorch_score(folders, model, asked):
    """Vectors that enter the encoder [T, D] → (logit, probability), in transformers."""
    theirs = torch_model(folders / "classifier", "sequence_classification").double()

    def score(x):
        states = theirs.bert.encoder(x[None], attention_mask=None)[0]
        row = theirs.classifier(theirs.bert.pooler(states))[0]
        return row[asked.target], torch.softmax(row, -1)[asked.target]

    def embedded(ids):
        return theirs.bert.embeddings(input_ids=torch.tensor(ids[None]).long())[0].detach()

    return score, embedded


def test_attributions_are_those_of_pytorch(folders):
    model = loaded(folders, "classifier")
    asked = ask(model, TEXT)
    found = attribution(model, asked)
    score, embedded = pytorch_score(folders, model, asked)
    ids = asked.batch["input_ids"][0]
    inside = np.zeros(len(ids), bool)
    for begin, end in asked.words:
        inside[begin:end] = True
    assert not inside[0] and not inside[-1] and inside[1:-1].all()
    pad = model.tokenizer.pad_token_id
    x, empty = embedded(ids), embedded(np.where(inside, pad, ids))

    def slope(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(score(at)[0], at)[0]

    def of_words(values):
        return [float(values[begin:end].sum()) for begin, end in asked.words]

    integral = sum(slope(empty + (k + 0.5) / 256 * (x - empty)) for k in range(256)) / 256 * (x - empty)
    np.testing.assert_allclose(found.words["gradient_x_input"], of_words((slope(x) * x).sum(-1)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.words["integrated_gradients"], of_words(integral.sum(-1)), rtol=0.02, atol=0.01)
    assert found.gap <= COMPLETE and found.baseline == "[PAD]"
    total = found.words["integrated_gradients"].sum()
    assert total == pytest.approx(found.score - found.baseline_score, rel=COMPLETE + 1e-6)

    # What becomes the baseline is [PAD] in its place: the same as other tokens.
    def measured(kept):
        return score(embedded(np.where(kept, ids, pad)))

    with torch.no_grad():
        for word, (begin, end) in enumerate(asked.words):
            kept = np.ones(len(ids), bool)
            kept[begin:end] = False
            assert found.words["occlusion"][word] == pytest.approx(float(score(x)[0] - measured(kept)[0]), abs=1e-3)
        for method, values in found.words.items():
            kept, come = np.ones(len(ids), bool), ~inside
            for count, word in enumerate([None, *np.argsort(-values, kind="stable")]):
                if word is not None:
                    begin, end = asked.words[word]
                    kept[begin:end], come[begin:end] = False, True
                assert found.deletion[method][count] == pytest.approx(float(measured(kept)[1]), abs=1e-4)
                assert found.insertion[method][count] == pytest.approx(float(measured(come)[1]), abs=1e-4)


def test_masks_and_next_words_are_explained(folders):
    masked, causal = loaded(folders, "masked"), loaded(folders, "causal")
    asked = ask(masked, "the quick [MASK] sleeps")
    (row,) = masked.fill(["the quick [MASK] sleeps"], top_k=1)
    assert asked.name == row["masks"][0][0]["token"] and asked.tokens[asked.places[0]] == "[MASK]"
    assert asked.probability == pytest.approx(row["masks"][0][0]["probability"], rel=1e-4)
    found = attribution(masked, asked)
    at = [begin for begin, _ in asked.words].index(asked.places[0])
    assert all(abs(found.words[name][at]) < 1e-5 for name in ("integrated_gradients", "occlusion"))

    asked = ask(causal, "the quick brown")
    next_word = np.asarray(causal.logits("the quick brown"))[0, -1]
    assert asked.target == next_word.argmax() and asked.places == (len(asked.tokens) - 1,)
    found = attribution(causal, asked)
    assert found.score == pytest.approx(float(next_word.max()), abs=1e-4)
    assert ask(causal, "the quick brown", Wanted("q")).name.strip() == "q"
    assert asked.texts == ["the", "quick", "brown"]


def test_scores_are_those_of_the_predictions(folders, tuned):
    """Pairs, tags, answers, rankings and several labels: the same row, the same score, the same probability."""
    classifier = loaded(folders, "classifier")
    asked = ask(classifier, "the dog", Wanted(text_b="a cat 巴黎"))
    (row,) = classifier.classify([("the dog", "a cat 巴黎")])
    assert (asked.name, asked.probability) == (row["label"], pytest.approx(row["probability"], rel=1e-5))
    assert asked.texts[:4] == ["the", "dog", "a", "cat"] and asked.tokens.count("[SEP]") == 2

    (row,) = tuned["several"].classify(["the dog"])
    asked = ask(tuned["several"], "the dog", Wanted("b"))
    assert asked.probability == pytest.approx(row["probabilities"]["b"], rel=1e-5)

    asked = ask(tuned["rank"], "a cat sleeps", Wanted(query="the dog"))
    (best,) = tuned["rank"].rank("the dog", ["a cat sleeps"])
    assert float(scored(tuned["rank"], asked)[0]) == pytest.approx(best["score"], rel=1e-4, abs=1e-5)

    (row,) = tuned["tag"].tag(["the quick dog, 巴黎"])
    for at, (word, found) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
        asked = ask(tuned["tag"], "the quick dog, 巴黎", Wanted(word=word))
        assert asked.name == found and asked.texts == row["tokens"] and asked.places == (asked.words[at][0],)
    assert ask(tuned["tag"], "the quick dog").name != "O"

    model, context = tuned["answer"], "the dog sleeps in 巴黎"
    (row,) = model.answer(["a cat"], [context])
    asked = ask(model, context, Wanted(question="a cat"))
    assert asked.name == row["answer"]
    logits_T2 = np.asarray(model.outputs_of_head([asked.example])[0], np.float64)
    begin, end = asked.places
    inside = [at for at, kind in enumerate(asked.example.types) if kind == 1][:-1]
    assert begin in inside and end in inside and asked.tokens[inside[-1] + 1] == "[SEP]"
    assert float(scored(model, asked)[0]) == pytest.approx(logits_T2[begin, 0] + logits_T2[end, 1], rel=1e-4)
    chance = np.exp(logits_T2[[begin, end], [0, 1]]) / np.exp(logits_T2[inside]).sum(0)
    assert asked.probability == pytest.approx(chance.prod(), rel=1e-4)
    assert ask(model, context, Wanted("dog sleeps", question="a cat")).name == "dog sleeps"
    for one, score in ((model, asked), (tuned["tag"], ask(tuned["tag"], "the quick dog"))):
        found = attribution(one, score)
        total = found.words["integrated_gradients"].sum()
        assert total == pytest.approx(found.score - found.baseline_score, rel=COMPLETE + 1e-6)


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_the_lens_is_the_head_of_transformers_on_each_layer(folders, name):
    model = loaded(folders, name)
    asked = ask(model, "the [MASK] dog [MASK]" if name == "masked" else "the quick brown 巴黎")
    found = lens(model, asked)
    theirs = torch_model(folders / name, "masked_lm" if name == "masked" else "causal_lm")
    with torch.no_grad():
        states = theirs(torch.tensor(asked.batch["input_ids"]).long(), output_hidden_states=True).hidden_states
        head = theirs.cls if name == "masked" else lambda x: theirs.lm_head(theirs.transformer.ln_f(x))
        # The last one of a decoder in transformers is behind the norm already.
        last = head(states[-1]) if name == "masked" else theirs.lm_head(states[-1])
        logprobs = torch.stack([head(x)[0] for x in states[:-1]] + [last[0]]).log_softmax(-1).double().numpy()
    assert found.places_P.tolist() == ([2, 4] if name == "masked" else list(range(len(asked.tokens))))
    (place,) = asked.places
    np.testing.assert_allclose(found.chance_E, np.exp(logprobs[:, place, asked.target]), rtol=1e-3)
    assert found.chance_E[-1] == pytest.approx(asked.probability, rel=1e-4)
    for layer in range(3):
        for at, place in enumerate(found.places_P):
            row, end = logprobs[layer, place], logprobs[-1, place]
            assert found.ids_EPK[layer, at].tolist() == np.argsort(-row)[:5].tolist()
            np.testing.assert_allclose(found.chances_EPK[layer, at], np.exp(np.sort(row)[::-1][:5]), rtol=1e-3)
            assert found.final_EP[layer, at] == pytest.approx(np.exp(row[end.argmax()]), rel=1e-3)
            divergence = (np.exp(end) * (end - row)).sum()
            assert found.divergence_EP[layer, at] == pytest.approx(divergence, rel=1e-3, abs=1e-5)


def test_a_word_is_all_of_its_tokens(folders):
    """Words as whole-word masking finds them: also in Chinese, and in scripts without a segmenter each character."""
    asked = ask(loaded(folders, "causal"), "the unquick 首都")
    assert "".join(asked.texts).replace(" ", "") == "theunquick首都"
    assert [begin for begin, _ in asked.words] == [0, *(end for _, end in asked.words)][:-1]
    asked = ask(loaded(folders, "masked"), "巴黎是法国的首都[MASK]")
    assert asked.texts == ["巴黎", "是", "法国", "的", "首都", "[MASK]"]


def test_from_python_and_in_a_notebook(folders):
    seen = espalier.look(loaded(folders, "masked"), "the [MASK] 巴黎", target="dog")
    assert seen.asked.what == "word at [MASK]" and [word for word, _ in seen.owed] == seen.asked.texts
    assert seen._repr_html_().startswith("<iframe srcdoc='&lt;!doctype html&gt;") and "sandbox=" in seen._repr_html_()
    assert {"rollout_TS", "chance_E", "deletion_occlusion", "tokens"} <= seen.arrays().keys()
    assert re.fullmatch(r"Looked\('the \[MASK\] 巴黎': word at \[MASK\] 'dog', \d+\.\d%\)", repr(seen)), repr(seen)
    assert repr(seen.model).startswith("LoadedModel(bert for masked LM: 2 layers × "), repr(seen.model)


def test_what_cannot_be_explained_is_refused(folders, tuned):
    classifier, masked = loaded(folders, "classifier"), loaded(folders, "masked")
    for model, wanted, said in (
        (tuned["answer"], Wanted(), "reads a question with the text; give question"),
        (tuned["answer"], Wanted("cat", question="the"), "target='cat' does not stand in the text"),
        (tuned["rank"], Wanted(), "reads a query with the text; give query"),
        (tuned["rank"], Wanted("x", query="the"), "it has one score"),
        (tuned["tag"], Wanted(word="cat"), "word='cat' is no word of the text; it has the, dog"),
        (classifier, Wanted(query="the"), "query='the' is not for a model that can classify"),
    ):
        with pytest.raises(UserError, match=said):
            ask(model, "the dog", wanted)
    for model, text, target, said in (
        (classifier, " ", None, "the text is empty"),
        (classifier, "the " * 80, None, "tokens, and at most 64 are read"),
        (classifier, "the", "maybe", "'maybe' is no class of this model; it has no, yes, <b>"),
        (masked, "the", None, "no \\[MASK\\] in the text"),
        (masked, "[MASK]", "quick brown", "is several tokens"),
        (dataclasses.replace(masked, head="embedding"), "the", None, "a model that can embed is not explained"),
    ):
        with pytest.raises(UserError, match=said):
            ask(model, text, Wanted(target))
    for wrong in (dict(text=None), dict(output="a.png"), dict(output="none/a.html")):
        with pytest.raises(UserError):
            LookConfig("run", **{"text": "a"} | wrong)


def test_the_command_writes_a_page_that_loads_nothing_and_the_numbers(folders, tmp_path, capsys):
    output = tmp_path / "page.html"
    cli.run_config(
        look.main, LookConfig, prog="look",
        argv=[f"hf:{folders / 'classifier'}", "--text", f"{TEXT} </script>", "--target", "<b>", "--output", str(output),
              "--json"],
    )  # fmt: skip
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["answer"] == "<b>" and found["words"][:2] == ["the", "quick"] and "owed to" in out
    text = output.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(?!data:)|https?://|url\(|@import""", text)
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "“<b>”" not in text
    with np.load(tmp_path / "page.npz") as numbers:
        tokens = len(numbers["tokens"])
        assert numbers["probabilities_LNTS"].shape == numbers["norms_LNTS"].shape == (2, 4, tokens, tokens)
        np.testing.assert_allclose(numbers["occlusion"], found["attribution"]["occlusion"])


@pytest.mark.browser
def test_the_page_in_a_browser(folders, tmp_path):
    """From the overview to one head is one click, to what another token looks at a second; by keyboard too."""
    output = tmp_path / "page.html"
    cli.run_config(
        look.main, LookConfig, prog="look",
        argv=[f"hf:{folders / 'classifier'}", "--text", TEXT, "--output", str(output)],
    )  # fmt: skip

    async def visit():
        async with browser_page(tmp_path) as page:
            await page.open(output.as_uri())
            assert await page.evaluate("document.querySelectorAll('.overview button').length") == 8
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            await page.click(".overview button:nth-child(7)")
            assert await page.evaluate("document.querySelector('.one h3').textContent") == "Layer 2, head 3"
            await page.evaluate("document.querySelectorAll('.lines button')[2].focus()")
            await page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", text="\r")
            await page.until("document.querySelectorAll('.lines button')[2].getAttribute('aria-pressed') === 'true'")
            await page.click(".kinds button:nth-child(3)")
            assert await page.evaluate("document.querySelector('.one h3').textContent") == "All layers"
            assert page.errors == []

    asyncio.run(visit())
