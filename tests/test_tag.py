"""Tagging from end to end: what is learnt, measured, written, predicted and exported; what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import write_run

import espalier
from espalier.commands.convert import ExportConfig, export_model
from espalier.data.tokenizer import load_tokenizer
from espalier.errors import UserError
from espalier.intervals import draws
from espalier.models.config import ModelConfig
from espalier.predict.tags import entities
from espalier.predict.use import use_of
from espalier.report.run_files import read_run
from espalier.task import find
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneOptimizer
from finetune.tasks.tag.counts import entity_counts
from finetune.tasks.tag.examples import read_examples
from finetune.tasks.tag.metrics import intervals, metrics
from finetune.tasks.tag.record import TagConfig, TagData
from finetune.tasks.tag.report import sections, tiles
from finetune.train import main
from sharding.mesh import MeshConfig

ENCODER = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, type_vocab_size=2,
    max_position_embeddings=16, hidden_dropout=0.3, attention_dropout=0.3,
)  # fmt: skip
DECODER = dataclasses.replace(
    ENCODER, causal=True, norm_position="pre", final_norm=True, embedding_norm=False, type_vocab_size=0, head_bias=False
)
PEOPLE, TOWNS, CITIES = ("Ann", "Bob", "Eve", "Max"), ("Rome", "Oslo", "Bonn", "Nice"), ("北京", "上海", "南京")


def sentences(count: int, length: int = 1) -> tuple[list[list[str]], list[list[str]]]:
    """Names and towns among other words, every fourth sentence in Chinese; `length` such sentences make one."""
    random = np.random.default_rng(count)
    words, tags = [], []
    for number in range(count):
        some: list[tuple[str, str]] = []
        for _ in range(length):
            if number % 4 == 3:
                city = random.choice(CITIES)
                some += [("我", "O"), ("在", "O"), (city[0], "B-town"), (city[1], "I-town"), ("。", "O")]
            else:
                some += [(random.choice(PEOPLE), "B-person"), ("Smith", "I-person")][: random.integers(1, 3)]
                some += [("went", "O"), ("to", "O"), (random.choice(TOWNS), "B-town"), (".", "O")]
        words.append([word for word, _ in some])
        tags.append([tag for _, tag in some])
    return words, tags


def write_conll(path, words, tags):
    lines = (
        "".join(f"{word}\t{tag}\n" for word, tag in zip(*pair, strict=True)) for pair in zip(words, tags, strict=True)
    )
    path.write_text("\t\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("tag")
    texts = ["".join(words) if "我" in words else " ".join(words) for words in sentences(60)[0]] * 3
    return SimpleNamespace(
        root=root,
        encoder=write_run(root / "encoder", ENCODER, texts),
        decoder=write_run(root / "decoder", DECODER, texts),
        train=write_conll(root / "train.conll", *sentences(64)),
        validation=write_conll(root / "validation.conll", *sentences(24)),
    )


def config_for(there, run_dir, init_from=None, **changes) -> TagConfig:
    data = {"train": there.train, "validation": there.validation} | changes.pop("data", {})
    defaults = dict(
        init_from=str(init_from or there.encoder),
        run_dir=str(run_dir),
        steps=40,
        batch_size=16,
        eval_every=20,
        data=TagData(**data),
        optimizer=FinetuneOptimizer(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=100),
        dropout=0.0,
        log_every=1,
        mesh=MeshConfig(2, 2, 2),
    )
    return TagConfig(**defaults | changes)


@pytest.fixture(scope="module")
def run(there):
    """An encoder that has learnt it, on 8 devices."""
    folder = there.root / "run"
    return SimpleNamespace(path=folder, summary=main(config_for(there, folder)))


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_encoder_learns_entities(there, run):
    found = run.summary["metrics"]
    assert found["f1"] == found["precision"] == found["recall"] == found["strict_f1"] == found["accuracy"] == 1.0
    names = {"f1", "precision", "recall", "strict_f1", "accuracy", "baseline_f1"}
    assert found.keys() == names | {"f1_interval", "accuracy_interval"}
    assert run.summary["eval"]["f1"] == 1.0 and run.summary["eval"].keys() == {"loss", "accuracy", "f1"}
    config = json.loads((run.path / "config.json").read_text())
    assert config["labels"] == ["O", "B-person", "B-town", "I-person", "I-town"] and config["scheme"] == "IOB2"
    rows, (words, tags) = lines_of(run.path / "predictions.jsonl"), sentences(24)
    assert [row["tokens"] for row in rows] == words and [row["tags"] for row in rows] == tags
    for row in rows:
        assert row["prediction"] == row["tags"] and all(0.3 < span["score"] <= 1 for span in row["spans"])
        assert [(span["type"], span["begin"], span["end"]) for span in row["spans"]] == entities(row["tags"])
    types = json.loads((run.path / "types.json").read_text())
    assert types["scheme"] == "IOB2" and [row["name"] for row in types["types"]] == ["person", "town"]
    assert [row["right"] for row in types["types"]] == [18, 24]


def test_a_resumed_run_on_one_device_ends_alike(there, run):
    """One device and micro-batches, stopped and resumed, against eight devices at once: every loss, every score."""
    folder = there.root / "parts"
    changes = dict(mesh=MeshConfig(1, 1, 1), accumulation=2)
    assert not main(config_for(there, folder, stop_at=20, **changes))["finished"]
    summary = main(config_for(there, folder, **changes))
    assert summary["finished"] and summary["metrics"] == run.summary["metrics"]
    losses, others = (
        {row["step"]: row["loss"] for row in lines_of(path / "metrics.jsonl") if "loss" in row}
        for path in (folder, run.path)
    )
    assert len(losses) == 40 and losses == pytest.approx(others, rel=1e-4, abs=1e-6)
    ours, theirs = (lines_of(path / "predictions.jsonl") for path in (folder, run.path))
    for row, other in zip(ours, theirs, strict=True):
        assert row["prediction"] == other["prediction"]
        scores, expected = ([span["score"] for span in line["spans"]] for line in (row, other))
        assert scores == pytest.approx(expected, abs=1e-4)


def test_texts_are_tagged_with_their_places(run):
    model = espalier.load(run.path)
    text, chinese = "Ann Smith went to Oslo. Bob went to Nice.", "我在南京。我在Rome。"
    assert use_of(model).name == "tag"
    found, of_chinese = model.tag([text, chinese])
    assert [(span["type"], span["text"]) for span in found["spans"]] == [
        ("person", "Ann Smith"), ("town", "Oslo"), ("person", "Bob"), ("town", "Nice"),
    ]  # fmt: skip
    assert all(text[span["begin"] : span["end"]] == span["text"] for span in found["spans"])
    assert found["tokens"][:2] == ["Ann", "Smith"] and len(found["tags"]) == len(found["tokens"])
    first = of_chinese["spans"][0]
    assert (first["type"], first["begin"], first["end"], first["text"]) == ("town", 2, 4, "南京")
    assert of_chinese["tokens"] == list("我在南京。我在") + ["Rome", "。"]
    (of_words,) = model.tag([["Ann", "Smith", "went"]])
    assert [(span["begin"], span["end"], span["text"]) for span in of_words["spans"]] == [(0, 2, "Ann Smith")]
    assert model.tag("") == [{"tokens": [], "tags": [], "spans": []}]
    for bad in ({"label": 3}, {"tokens": [1]}, {"text": 3}):
        with pytest.raises(UserError, match="no words: a row has text, or a list of tokens"):
            use_of(model).reads(bad)
    assert use_of(model).reads({"tokens": "Ann went"}).words == ["Ann", "went"]
    with pytest.raises(UserError, match="does not classify; it can tag"):
        model.classify(text)


def test_long_sentences_are_learnt_and_tagged_in_windows(there, run):
    """Sentences of up to 48 words through rows of 16 tokens: no word is lost, and none is worse off."""
    words, tags = sentences(12, length=8)
    path = write_conll(there.root / "long.conll", words, tags)
    data = TagData(train=path, validation=path)
    found = read_examples(data, load_tokenizer(there.encoder / "tokenizer"), ENCODER)
    assert len(found.train.windows) > 40 and max(len(example.ids) for example in found.train.examples) <= 16
    learnt = [[] for _ in words]
    for window in found.train.windows:
        targets = window.example.of_tokens
        places = np.flatnonzero(targets["loss_weights"])
        assert places.tolist() == window.places.tolist()
        learnt[window.sentence] += [found.names[label] for label in targets["labels"][places]]
    assert learnt == tags
    assert found.facts[1] == (
        f"{path}: 12 of 12 sentences are longer than 16 tokens; they are read in windows that overlap, "
        f"{len(found.train.windows)} rows in all, and lose no word"
    )
    model = espalier.load(run.path)
    evaluation = find("token_classification").evaluate(model, data)
    assert [row["tokens"] for row in evaluation.rows] == words
    # The run has seen no place behind the first few of a row.
    assert evaluation.metrics["f1"] > 0.8 and "baseline_f1" not in evaluation.metrics
    result = model.tag([words[0]])[0]
    assert len(result["tags"]) == len(words[0]) > 30


def test_a_decoder_learns_tags_of_words(there, capsys):
    """Parts of speech: accuracy, F1 of each, and the most frequent tag of each word beside them."""
    words, _ = sentences(48)
    tags = [["X-1" if word in PEOPLE else "VERB" if word == "went" else "NN" for word in some] for some in words]
    path = there.root / "pos.jsonl"
    path.write_text("".join(json.dumps({"words": a, "upos": b}) + "\n" for a, b in zip(words, tags, strict=True)))
    folder = there.root / "pos"
    changes = dict(data=dict(train=str(path), validation=str(path)), mesh=MeshConfig(1, 1, 1))
    summary = main(config_for(there, folder, there.decoder, **changes))
    right = {"accuracy": 1.0, "macro_f1": 1.0, "baseline_accuracy": 1.0}
    assert summary["metrics"] == right | {"accuracy_interval": [1.0, 1.0]}
    assert "tags are taken each for itself (3 of them)" in capsys.readouterr().out
    assert "spans" not in lines_of(folder / "predictions.jsonl")[0]
    assert "spans" not in espalier.load(folder).tag("Ann went")[0]
    assert [section.title for section in sections(read_run(folder))] == ["Each tag"]


def test_an_exported_tagger_gives_the_same_logits(run, tmp_path):
    export_model(ExportConfig(str(run.path), str(tmp_path / "out")))
    theirs = hf.AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == dict(enumerate(["O", "B-person", "B-town", "I-person", "I-town"]))
    texts = ["Ann Smith went to Oslo.", "我在南京。"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**tokens).logits.numpy()
    ours = espalier.load(run.path).logits(texts)
    back = espalier.load(f"hf:{tmp_path / 'out'}")
    for row, mask in enumerate(tokens["attention_mask"].numpy().astype(bool)):
        np.testing.assert_allclose(ours[row][: len(mask)][mask], expected[row][mask], atol=1e-4)
    assert back.tag(texts) == espalier.load(run.path).tag(texts)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "token-classification" in card and "F1 of entities (conlleval)" in card


def test_the_report_shows_each_type_and_the_mistakes(there, run, tmp_path):
    lines = [
        {
            "tokens": ["Ann", "<b>", "went", "to", "Oslo"],
            "tags": ["B-person", "O", "O", "O", "B-town"],
            "prediction": ["B-person", "I-person", "O", "B-person", "B-person"],
            "spans": [{"score": 0.9}, {"score": 0.8}, {"score": 0.95}],
        },
        {
            "tokens": list("我在南京"), "tags": ["O", "O", "B-town", "I-town"], "prediction": ["O", "O", "O", "B-town"],
            "spans": [{"score": 0.5}],
        },
    ]  # fmt: skip
    for name in ("config.json", "types.json", "summary.json"):
        (tmp_path / name).write_text((run.path / name).read_text())
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    each, mistakes = sections(read_run(tmp_path))
    assert each.title == "Each type" and "<th lang" in each.body and "100.0\u202f%" in each.body
    assert mistakes.body.count("<li>") == 4 and "4 predicted entities" in mistakes.note
    first = mistakes.body.split("<li>")[1]
    assert "\u2068person\u2069, which is \u2068town\u2069" in first and "95\u202f%" in first
    assert "&lt;b&gt;" in mistakes.body and "<b>" not in mistakes.body
    assert "<mark" in first and "<u class='s" in first and "lang=zh" in mistakes.body.split("<li>")[4]
    assert ("F1 of entities", "100.0\u202f%") in tiles(read_run(tmp_path))
    page = (run.path / "report.html").read_text()
    assert "Each type" in page and "Tagger with 5 tags" in page


COUNTED = jax.jit(entity_counts, static_argnums=0)


@given(
    st.lists(
        st.lists(
            st.tuples(*[st.sampled_from(["O", "B-x", "I-x", "E-x", "S-x", "B-y", "I-y"])] * 2, st.booleans()),
            min_size=6,
            max_size=6,
        ),
        min_size=2,
        max_size=2,
    )
)
def test_entities_are_counted_alike_on_the_device(rows):
    names = ["O", "B-x", "I-x", "E-x", "S-x", "B-y", "I-y"]
    right, predicted = (
        np.array([[names.index(cell[side]) for cell in row] for row in rows], np.int32) for side in (0, 1)
    )
    words = np.array([[cell[2] for cell in row] for row in rows])
    found = COUNTED(tuple(names), jnp.array(right), jnp.array(predicted), jnp.array(words))
    expected = [0, 0, 0]
    for row in rows:
        wanted, guessed = (set(entities([cell[side] for cell in row if cell[2]])) for side in (0, 1))
        for at, group in enumerate((wanted & guessed, guessed, wanted)):
            expected[at] += len(group)
    assert [int(count) for count in found] == expected


def test_wnut17_is_read_whole(there, shared_data):
    """Every word of it is learnt from, in rows of 64 tokens; what several annotators said is refused."""
    folder = shared_data / "wnut17"
    data = TagData(train=str(folder / "train.conll"), validation=str(folder / "dev.conll"), max_length=64)
    model = dataclasses.replace(ENCODER, max_position_embeddings=64)
    found = read_examples(data, load_tokenizer(there.encoder / "tokenizer"), model)
    assert found.scheme == "IOB2" and len(found.names) == 13
    for part in (found.train, found.validation):
        learnt = sum(int(window.example.of_tokens["loss_weights"].sum()) for window in part.windows)
        assert learnt == sum(map(len, part.file.words))
    with pytest.raises(UserError, match="no example of: 'B-corporation,B-group'.*commas between them must become one"):
        read_examples(dataclasses.replace(data, validation=str(folder / "test.conll")), None, model)


BAD = {
    "no training file": (dict(train=None), {}, "no --data.train FILE given"),
    "one tag": (dict(), dict(train=(["a"], ["O"])), "every word has the tag 'O'; a tagger needs two"),
    "no scheme": (
        dict(), dict(train=(["a", "b", "c"], ["B-x", "I-x", "person"])),
        r"train.conll:1: the tag 'person' is neither O nor like B-TYPE, .*\(B-x, I-x\).*--data.tag-kind words",
    ),
    "unknown type": (dict(), dict(validation=(["a"], ["B-river"])), "has no example of: 'B-river'; known are"),
    "malformed": (dict(), dict(validation=(["a"], ["town"])), "has no example of: 'town'; known are"),
    "stride": (dict(stride=8), {}, "stride=8 is too large for rows of 16 tokens"),
    "too long": (dict(max_length=99), {}, "exceeds the model's 16 learned positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_leaves_nothing_behind(there, tmp_path, case):
    data, files, words = BAD[case]
    written = {
        name: write_conll(tmp_path / f"{name}.conll", [tokens], [tags]) for name, (tokens, tags) in files.items()
    }
    with pytest.raises(UserError, match=words) as error:
        main(config_for(there, tmp_path / "run", data=data | written))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="stride=-1 must not be negative"):
        TagData(stride=-1)


def test_a_tag_of_a_known_type_may_be_new_in_the_validation_file(there, tmp_path):
    path = write_conll(tmp_path / "a.conll", [["Ann", "in", "Rome"]], [["B-person", "O", "S-town"]])
    found = read_examples(
        TagData(train=there.train, validation=path), load_tokenizer(there.encoder / "tokenizer"), ENCODER
    )
    assert found.names == ["O", "B-person", "B-town", "I-person", "I-town", "S-town"] and found.scheme == "IOB2"


def test_intervals_are_those_of_sentences_drawn_anew():
    """Each draw measured as a file of its own."""
    random = np.random.default_rng(1)
    tags = ["O", "B-a", "I-a", "B-b"]
    right, said = ([[tags[at] for at in random.integers(0, 4, size)] for size in (3, 5, 2, 7, 4, 6)] for _ in range(2))
    found = intervals(right, said, "IOB2")
    drawn = [metrics([right[at] for at in some], [said[at] for at in some], "IOB2")[0] for some in draws(6)]
    for name in ("accuracy", "f1"):
        expected = np.quantile([figures[name] for figures in drawn], [0.025, 0.975])
        assert found[f"{name}_interval"] == pytest.approx(expected.tolist())
    assert intervals([["O"], ["O"]], [["O"], ["O"]], "IOB2").keys() == {"accuracy_interval"}
    assert intervals(right[:1], said[:1], "IOB2") == {}
