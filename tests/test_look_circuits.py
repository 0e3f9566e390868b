"""`look heads`, `induction`, `patch` and `probe`: every figure beside PyTorch, scikit-learn or the plainest way."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import (
    BERT,
    GPT,
    random_params,
    strict_and_quick,  # noqa: F401
)

import espalier
from espalier import cli
from espalier.commands.look import heads as heads_command
from espalier.commands.look import induction as induction_command
from espalier.commands.look import lens as lens_command
from espalier.commands.look import patch, probe
from espalier.commands.look import text as look_text
from espalier.data.examples import encode_pairs
from espalier.data.tokenizer import special_ids, vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.data.word_pieces import sentence_of_words
from espalier.errors import UserError
from espalier.look.asked import Wanted, ask
from espalier.look.heads import importance, pruned, within_layers
from espalier.look.induction import REPEATED, induction, repeated_tokens
from espalier.look.lens import lens
from espalier.look.patching import patching
from espalier.look.probes import INVERSE_PENALTY, fitted, probes, states
from espalier.look.rows import MASKED, labelled_rows, text_rows
from espalier.look.tuned_lens import TunedLens, tune, untrained
from espalier.look.tuned_lens import _measured as measured_lens
from espalier.look.tuned_lens import load as load_lens
from espalier.models.hub import save_pretrained

WORDS = "the quick brown fox jumps over the lazy dog while a cat sleeps in the sun 巴黎是法国的首都 "
KINDS = {
    "classifier": ("sequence_classification", hf.AutoModelForSequenceClassification),
    "masked": ("masked_lm", hf.AutoModelForMaskedLM),
    "causal": ("causal_lm", hf.AutoModelForCausalLM),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name → ours, the same in transformers, and its folder."""
    root, found = tmp_path_factory.mktemp("circuits"), {}
    for name, (head, kind) in KINDS.items():
        base = dataclasses.replace(GPT if name == "causal" else BERT, max_position_embeddings=128)
        tokenizer = train_tokenizer(
            [WORDS * 30], "bpe" if base.causal else "wordpiece", 300, for_masked_lm=not base.causal
        )
        labels = ("no", "yes", "<b>") if name == "classifier" else ()
        config = dataclasses.replace(base, vocab_size=vocabulary_size(tokenizer), labels=labels)
        save_pretrained(root / name, config, random_params(config, (head,)), tokenizer, head=head)
        theirs = kind.from_pretrained(root / name, attn_implementation="eager").eval()
        found[name] = SimpleNamespace(ours=espalier.load(f"hf:{root / name}"), theirs=theirs.double(), path=root / name)
    return found


def out_kernels(theirs):
    """The projection behind the heads of each layer: its weight, inputs first."""
    if hasattr(theirs, "transformer"):
        return [block.attn.c_proj.weight.data for block in theirs.transformer.h]
    return [layer.attention.output.dense.weight.data.T for layer in theirs.bert.encoder.layer]


def loss_of(theirs, row):
    """−log p of what is right for an example, in transformers: (the mean, the part that is the most probable)."""
    with torch.no_grad():
        logits = theirs(torch.tensor(np.array(row.ids, np.int64))[None]).logits[0]
    logits = logits[torch.tensor(row.of_row["places"]).long()] if "places" in row.of_row else logits[None]
    labels = torch.tensor(np.array(row.of_row["labels"], np.int64)).reshape(-1)
    nats = torch.nn.functional.cross_entropy(logits.reshape(len(labels), -1), labels)
    return float(nats), float((logits.reshape(len(labels), -1).argmax(-1) == labels).double().mean())


def rows_for(name, model):
    if name == "classifier":
        texts = ["the quick dog", "a cat sleeps in 巴黎", "the lazy fox jumps"]
        encoded = encode_pairs(model.tokenizer, texts, None, 32, False)
        return labelled_rows(encoded, [0, 2, 1])
    ids = model.tokenizer(WORDS * 4, add_special_tokens=False)["input_ids"]
    return text_rows(model, ids, 24, 3)


@pytest.mark.parametrize("name", list(KINDS))
def test_heads_are_judged_as_by_hand(models, name):
    """Importance by differences of the loss of transformers, each head's part of the projection scaled; the curve by
    setting these parts to 0."""
    model, theirs = models[name].ours, models[name].theirs
    rows = rows_for(name, model)
    found = importance(model, rows)
    kernels, step = out_kernels(theirs), 1e-4

    def scaled(gates, run):
        kept = [kernel.clone() for kernel in kernels]
        for layer, head in np.argwhere(gates != 1):
            kernels[layer][head * 8 : head * 8 + 8] *= gates[layer, head]
        result = run()
        for kernel, before in zip(kernels, kept, strict=True):
            kernel.copy_(before)
        return result

    for layer, head in ((0, 0), (0, 3), (1, 2)):
        slopes = []
        for row in rows:
            gates = np.ones((2, 4))
            ends = []
            for sign in (1, -1):
                gates[layer, head] = 1 + sign * step
                ends.append(scaled(gates, lambda row=row: loss_of(theirs, row)[0]))
            slopes.append(abs(ends[0] - ends[1]) / (2 * step))
        assert found[layer, head] == pytest.approx(np.mean(slopes), rel=2e-3, abs=1e-5)

    relative = within_layers(found)
    np.testing.assert_allclose(np.linalg.norm(relative, axis=1), 1)
    curves = pruned(model, rows, found)
    order = np.argsort(relative, axis=None, kind="stable")
    for curve, taken in (("least", order), ("most", order[::-1])):
        for at in (0, 3, len(curves[curve].removed_S) - 1):
            gates = np.ones(8)
            gates[taken[: curves[curve].removed_S[at]]] = 0
            expected = scaled(gates.reshape(2, 4), lambda: np.mean([loss_of(theirs, row) for row in rows], axis=0))
            assert curves[curve].nats_S[at] == pytest.approx(expected[0], rel=1e-4)
            assert curves[curve].right_S[at] == pytest.approx(expected[1])
    assert [*curves["least"].removed_S] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_rows_of_text(models):
    model = models["masked"].ours
    ids = np.arange(10, 10 + 70)
    rows = text_rows(model, ids, 24, 9)
    specials = special_ids(model.tokenizer)
    assert len(rows) == 3
    for number, row in enumerate(rows):
        whole, places = np.array(row.ids), row.of_row["places"]
        assert len(set(places.tolist())) == round(MASKED * 22) and (whole[places] == specials.mask).all()
        whole[places] = row.of_row["labels"]
        assert whole.tolist() == [specials.cls, *ids[22 * number : 22 * number + 22], specials.sep]
    row = text_rows(models["causal"].ours, ids, 24, 9)[1]
    assert row.ids[1:].tolist() == row.of_row["labels"].tolist() == [*ids[23:46]]
    with pytest.raises(UserError, match="has 5 tokens, and a row 22"):
        text_rows(model, ids[:5], 24, 9)


def test_induction_is_what_the_loops_say(models):
    model, theirs = models["causal"].ours, models["causal"].theirs
    ids = repeated_tokens(model)
    assert (ids[:, 1 : REPEATED + 1] == ids[:, REPEATED + 1 :]).all() and ids.shape == (16, 101)
    found = induction(model)
    with torch.no_grad():
        out = theirs(torch.tensor(ids).long(), output_attentions=True)
    nats = -out.logits.log_softmax(-1)[:, :-1].gather(-1, torch.tensor(ids[:, 1:, None]).long())[..., 0].numpy()
    for layer in range(2):
        alpha = out.attentions[layer].numpy()
        for head in range(4):
            seconds = range(REPEATED + 1, 2 * REPEATED + 1)
            score = np.mean([[alpha[row, head, t, t - REPEATED + 1] for t in seconds] for row in range(16)])
            assert found.score_LN[layer, head] == pytest.approx(score, rel=1e-4)
            previous = np.mean([[alpha[row, head, t, t - 1] for t in range(1, 101)] for row in range(16)])
            assert found.previous_LN[layer, head] == pytest.approx(previous, rel=1e-4)
    assert found.first == pytest.approx(nats[:, :REPEATED].mean(), rel=1e-4)
    assert found.second == pytest.approx(nats[:, REPEATED + 1 :].mean(), rel=1e-4)


def test_patches_are_those_of_hooks(models):
    """A hook on each part of transformers puts the first text's values into the pass over the second."""
    model, theirs = models["classifier"].ours, models["classifier"].theirs
    first, second = ask(model, "the quick dog", Wanted("yes")), ask(model, "the lazy dog", Wanted("no"))
    found = patching(model, first, second)
    layers = theirs.bert.encoder.layer
    parts = {
        "attention.heads": [layer.attention.self for layer in layers],
        "attention.out": [layer.attention.output.dense for layer in layers],
        "mlp.out": [layer.output.dense for layer in layers],
    }
    ids = [torch.tensor(one.batch["input_ids"]).long() for one in (first, second)]

    def run(tokens, *hooks):
        handles = [part.register_forward_hook(hook) for part, hook in hooks]
        with torch.no_grad():
            logits = theirs(tokens).logits[0]
        for handle in handles:
            handle.remove()
        return float(logits[first.target] - logits[second.target])

    whole = [run(tokens) for tokens in ids]
    assert (found.first, found.second) == (pytest.approx(whole[0], rel=1e-4), pytest.approx(whole[1], rel=1e-4))
    kept = {}

    def keep(place, layer):
        def hook(module, inputs, output):
            kept[place, layer] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    run(ids[0], *((part, keep(place, at)) for place, some in parts.items() for at, part in enumerate(some)))

    def put(place, layer, where):
        def hook(module, inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            value = value.clone()
            value[(0, *where)] = kept[place, layer][(0, *where)]
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    for place, some in parts.items():
        columns = 4 if place == "attention.heads" else len(first.tokens)
        for layer, part in enumerate(some):
            for column in range(columns):
                where = (slice(None), slice(8 * column, 8 * column + 8)) if columns == 4 else (column,)
                patched = run(ids[1], (part, put(place, layer, where)))
                expected = (patched - whole[1]) / (whole[0] - whole[1])
                assert found.restored[place][layer, column] == pytest.approx(expected, rel=2e-3, abs=2e-3)
    # Before the first layer the texts differ in one token alone.
    differs = [at for at, pair in enumerate(zip(first.tokens, second.tokens, strict=True)) if pair[0] != pair[1]]
    assert found.restored["stream"][0, differs].sum() == pytest.approx(1, abs=1e-3) or len(differs) > 1
    assert np.abs(np.delete(found.restored["stream"][0], differs)).max() < 1e-4


def test_what_cannot_be_patched_is_refused(models):
    model = models["classifier"].ours
    asked = ask(model, "the quick dog", Wanted("yes"))
    for text, target, said in (
        ("the quick dog sleeps", "no", "give two that differ in single words: .* the . quick"),
        ("the lazy dog", "yes", "both texts are answered by 'yes'"),
        ("the quick dog", "no", "makes no difference"),
    ):
        with pytest.raises(UserError, match=said):
            patching(model, asked, ask(model, text, Wanted(target)))


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_a_tuned_lens_is_measured_and_trained(models, name):
    """KL of every layer through random maps, in PyTorch; training brings what is said nearer to the end."""
    model, theirs = models[name].ours, models[name].theirs
    ids = model.tokenizer(WORDS * 60, add_special_tokens=False)["input_ids"]
    rows = text_rows(model, ids, 24, 40)
    random = np.random.default_rng(0)
    maps = TunedLens(*(np.float32(0.1 * random.standard_normal(shape)) for shape in ((2, 32, 32), (2, 32))))
    found = measured_lens(model, maps, rows[:8])
    with torch.no_grad():
        tokens = torch.tensor(np.array([row.ids for row in rows[:8]], np.int64))
        out = theirs(tokens, output_hidden_states=True)
        head = theirs.cls if name == "masked" else lambda x: theirs.lm_head(theirs.transformer.ln_f(x))
        places = torch.tensor(np.array([row.of_row["places"] for row in rows[:8]], np.int64))[..., None]
        end = out.logits.log_softmax(-1).take_along_dim(places, 1)
        for layer in range(2):
            x = out.hidden_states[layer]
            x = x + x @ torch.tensor(maps.kernel_LDD[layer]).double() + torch.tensor(maps.bias_LD[layer]).double()
            here = head(x).log_softmax(-1).take_along_dim(places, 1)
            assert found[layer] == pytest.approx(float((end.exp() * (end - here)).sum(-1).mean()), rel=1e-3)

    tuned = tune(model, rows, 40)
    assert (tuned.after_L < tuned.before_L).all()
    asked = ask(model, "the [MASK] dog" if name == "masked" else "the dog")
    plain, zeros, better = (lens(model, asked, maps) for maps in (None, untrained(model.config), tuned.lens))
    np.testing.assert_allclose(plain.divergence_EP, zeros.divergence_EP, rtol=1e-5, atol=1e-6)
    assert better.tuned and not np.allclose(better.divergence_EP[:-1], plain.divergence_EP[:-1])
    np.testing.assert_allclose(better.divergence_EP[-1], 0, atol=1e-5)


def tagged(random, count):
    """Sentences whose words say their tags, but for words that two tags share."""
    kinds = {"D": ["the", "a"], "N": ["dog", "cat", "fox", "sun"], "V": ["jumps", "sleeps"]}
    sentences, tags = [], []
    for _ in range(count):
        row = random.choice(list(kinds), 5).tolist()
        sentences.append(sentence_of_words([str(random.choice(kinds[kind])) for kind in row]))
        tags.append(row)
    return sentences, tags


def test_probes_are_logistic_regressions(models):
    from sklearn.linear_model import LogisticRegression

    model, random = models["masked"].ours, np.random.default_rng(0)
    train, held_out = tagged(random, 40), tagged(random, 20)
    x_EWD = states(model, train[0])
    with torch.no_grad():
        sentence = torch.tensor(model.tokenizer(" ".join(train[0][0].words))["input_ids"])[None]
        theirs = torch.stack(models["masked"].theirs(sentence, output_hidden_states=True).hidden_states)[:, 0]
    first = model.tokenizer(" ".join(train[0][0].words)).word_ids()
    at = [first.index(word) for word in range(5)]
    np.testing.assert_allclose(x_EWD[:, :5], theirs[:, at], rtol=1e-3, atol=1e-4)

    x_WD = x_EWD[1]
    x_WD = (x_WD - x_WD.mean(0)) / (x_WD.std(0) + 1e-6)
    tags = np.array([tag for row in train[1] for tag in row])
    numbers = np.unique(tags, return_inverse=True)[1].astype(np.int32)
    kernel_DC, bias_C = (np.asarray(part) for part in fitted(x_WD, numbers))
    theirs = LogisticRegression(C=INVERSE_PENALTY, max_iter=3000, tol=1e-8).fit(x_WD, tags)
    np.testing.assert_allclose(kernel_DC.T, theirs.coef_, atol=2e-2)
    chances = np.exp(x_WD @ kernel_DC + bias_C)
    np.testing.assert_allclose(chances / chances.sum(1, keepdims=True), theirs.predict_proba(x_WD), atol=5e-3)

    found = probes(model, train, held_out)
    assert found.accuracy_E.shape == (3,) and found.words == (200, 100)
    # Words say their tags, so that all is known before the first layer; and the control task is learnt by heart.
    assert found.accuracy_E[0] == 1 and found.by_word == 1 and found.control_E[0] == 1
    learnt, held = (sum(part[1], []) for part in (train, held_out))
    assert found.majority == held.count(max("DNV", key=learnt.count)) / 100
    assert (found.selectivity_E == found.accuracy_E - found.control_E).all()


def run(module, config, arguments, capsys):
    if hasattr(module, "command"):
        module.command([*arguments, "--json"])
    else:
        cli.run_config(module.main, config, prog="look", argv=[*arguments, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_commands_write_pages_and_numbers(models, tmp_path, capsys):
    classifier, causal, masked = (f"hf:{models[name].path}" for name in ("classifier", "causal", "masked"))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nthe dog\tno\na cat <b>\tyes\nthe sun\t<b>\n", "utf-8")
    (tmp_path / "text.txt").write_text(WORDS * 30, "utf-8")
    (tmp_path / "tags.conll").write_text("the\tD\ndog\tN\n\na\tD\n巴黎\tN\nsleeps\tV\n" * 3, "utf-8")
    output = ["--output", str(tmp_path / "page.html")]

    found = run(heads_command, None, [classifier, "--data.validation", str(tmp_path / "dev.tsv"), *output], capsys)
    assert np.shape(found["importance"]) == (2, 4) and found["removed"] == list(range(9))
    found = run(
        heads_command, None,
        [masked, "--data.validation", str(tmp_path / "text.txt"), "--rows", "4", "--length", "32", *output], capsys,
    )  # fmt: skip
    with np.load(tmp_path / "page.npz") as numbers:
        np.testing.assert_allclose(numbers["importance_LN"], found["importance"])
    maps = ["--output", str(tmp_path / "lens.safetensors")]
    text = ["--data.validation", str(tmp_path / "text.txt"), "--length", "24", "--rows", "40", "--steps", "3"]
    found = run(lens_command, lens_command.LensConfig, [masked, *text, *maps], capsys)
    assert len(found["before"]) == len(found["after"]) == 2
    asked = [masked, "--text", "the [MASK]", "--lens", str(tmp_path / "lens.safetensors"), *output]
    run(look_text, look_text.LookConfig, asked, capsys)
    assert "Belrose et al. 2023" in (tmp_path / "page.html").read_text("utf-8")
    with pytest.raises(UserError, match="holds no lens"):
        load_lens(str(tmp_path / "text.txt"), models["masked"].ours.config)
    wider = dataclasses.replace(models["masked"].ours.config, hidden_size=64)
    with pytest.raises(UserError, match="a model of 2 layers, 32 wide, and this one has 2, 64 wide"):
        load_lens(str(tmp_path / "lens.safetensors"), wider)
    found = run(induction_command, induction_command.InductionConfig, [causal, *output], capsys)
    assert found["steps"] == [None] and np.shape(found["score"]) == (1, 2, 4)
    found = run(
        patch, patch.PatchConfig,
        [masked, "--text", "the [MASK] dog", "--other", "a [MASK] dog", "--target", "fox", "--other-target", "cat",
         *output], capsys,
    )  # fmt: skip
    assert found["answers"] == ["fox", "cat"] and np.shape(found["restored"]["stream"]) == (2, 5)
    tags = str(tmp_path / "tags.conll")
    found = run(probe, probe.ProbeConfig, [masked, "--data.train", tags, "--data.validation", tags, *output], capsys)
    assert len(found["accuracy"]) == 3
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in text and not re.search(r"""(src|href)=["']?(?!data:)|https?://|url\(|@import""", text)
    for arguments, said in (
        ([masked, "--rows", "0"], "give at least 1 row"),
        ([masked], "no --data.validation FILE given"),
    ):
        with pytest.raises(SystemExit) as exit:
            heads_command.command(arguments)
        assert exit.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(UserError, match="induction is what decoders learn"):
        induction(models["masked"].ours)
