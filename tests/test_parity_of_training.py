"""Fifty losses of each task are within 1e-3 of those of a PyTorch loop (tests/parity.py says what a row is)."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from parity import STEPS, TOLERANCE, Row, our_losses, pytorch_losses, settings
from tiny_runs import write_run

from espalier.models.families.bert import BERT_BASE
from espalier.models.families.llama import LLAMA_1B
from finetune.tasks.answer.record import AnswerConfig, AnswerData
from finetune.tasks.classify.record import ClassifyConfig, ClassifyData
from finetune.tasks.tag.record import TagConfig, TagData

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, head_dim=None)
BERT = dataclasses.replace(BERT_BASE, **TINY, max_position_embeddings=128)
LLAMA = dataclasses.replace(LLAMA_1B, **TINY, num_key_value_heads=2)


def classified(folder, model, rows, length=None, **data) -> Row:
    """rows: with text (and text_b), and a label."""
    path, few = folder / "train.jsonl", folder / "few.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines))
    few.write_text("".join(lines[:8]))
    texts = [row[name] for row in rows for name in ("text", "text_b") if name in row]
    columns = tuple(name for name in ("text", "text_b") if name in rows[0])
    files = ClassifyData(train=str(path), validation=str(few), text=columns, max_length=length, **data)
    config = ClassifyConfig(**settings(folder, write_run(folder / "base", model, texts, vocabulary=600), data=files))

    def loss(model, tokenizer, chosen):
        both = [[rows[row][name] for row in chosen] for name in columns]
        encoded = tokenizer(*both, truncation=True, max_length=length, padding=True, return_tensors="pt")
        return model(**encoded, labels=_targets(model, [rows[row]["label"] for row in chosen])).loss

    return Row(config, len(rows), loss)


def _targets(model, labels) -> torch.Tensor:
    """As the class in transformers wants them for its problem_type, by which it chooses its loss."""
    numbers = model.config.label2id
    if model.config.problem_type == "regression":
        return torch.tensor(labels, dtype=torch.float32)
    if model.config.problem_type == "multi_label_classification":
        return torch.tensor([[float(name in label) for name in numbers] for label in labels])
    return torch.tensor([numbers[label] for label in labels])


def sentences(folder, shared_data) -> Row:
    """SST-2, several examples a row."""
    lines = (shared_data / "glue" / "SST-2" / "train.tsv").read_text().splitlines()[1:200]
    pairs = [line.split("\t") for line in lines]
    rows = [{"text": text, "label": "good" if label == "1" else "bad"} for text, label in pairs if len(text) < 60]
    return classified(folder, BERT, rows[:32], examples_per_row=0)


def chinese(folder, shared_data) -> Row:
    """Pairs of Chinese sentences, read by a decoder; the longer ones are cut."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        first, second = random.choice(["这部电影", "这本书", "那家饭店的菜"], 2)
        feeling = random.choice(["很好，非常值得推荐", "太差了", "一般"])
        label = "好评" if "很好" in feeling else "差评"
        rows.append({"text": f"你觉得{first}怎么样？", "text_b": f"我觉得{second}{feeling}。", "label": label})
    return classified(folder, LLAMA, rows)


def tags(folder, shared_data) -> Row:
    """Sentences of WNUT-17; the loop gives the first piece of each word its tag."""
    parts = (shared_data / "wnut17" / "train.conll").read_text().replace("\n\t\n", "\n\n").strip().split("\n\n")[:600]
    rows = [[line.split("\t") for line in part.split("\n") if line.strip()] for part in parts]
    rows = [row for row in rows if 20 < sum(len(word) for word, _ in row) < 60]
    path, few = folder / "train.conll", folder / "few.conll"
    for file, some in ((path, rows), (few, rows[:8])):
        file.write_text("\t\n".join("".join(f"{word}\t{tag}\n" for word, tag in row) for row in some))
    texts = [" ".join(word for word, _ in row) for row in rows]
    files = TagData(train=str(path), validation=str(few))
    config = TagConfig(**settings(folder, write_run(folder / "base", BERT, texts, vocabulary=1000), data=files))

    def loss(model, tokenizer, chosen):
        words = [[word for word, _ in rows[row]] for row in chosen]
        encoded = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        labels = torch.full_like(encoded["input_ids"], -100)
        for place, row in enumerate(chosen):
            before = None
            for at, word in enumerate(encoded.word_ids(place)):
                if word not in (None, before):
                    labels[place, at] = model.config.label2id[rows[row][word][1]]
                before = word
        return model(**encoded, labels=labels).loss

    return Row(config, len(rows), loss)


def questions(folder, shared_data) -> Row:
    """Chinese questions: who has a thing, out of three sentences."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(48):
        names, things = (
            random.choice(list("甲乙丙丁戊己"), 3, False),
            random.choice(["苹果", "书", "自行车", "茶"], 3, False),
        )
        context = "".join(f"{name}先生有{thing}。" for name, thing in zip(names, things, strict=True))
        at = int(random.integers(3))
        answer = f"{names[at]}先生"
        rows.append((f"谁有{things[at]}？", context, context.index(answer), answer))
    path, few = folder / "train.json", folder / "few.json"
    for file, some in ((path, rows), (few, rows[:8])):
        answers = [[{"text": text, "answer_start": at}] for _, _, at, text in some]
        asked = [{"id": f"q{n}", "question": row[0], "answers": answers[n]} for n, row in enumerate(some)]
        paragraphs = [{"context": row[1], "qas": [one]} for row, one in zip(some, asked, strict=True)]
        file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    base = write_run(folder / "base", BERT, [question + context for question, context, _, _ in rows], vocabulary=600)
    config = AnswerConfig(**settings(folder, base, data=AnswerData(train=str(path), validation=str(few))))

    def loss(model, tokenizer, chosen):
        both = [[rows[row][part] for row in chosen] for part in (0, 1)]
        encoded = tokenizer(*both, padding=True, return_tensors="pt")
        found = model(**encoded)
        ends = [
            (encoded.char_to_token(place, at, 1), encoded.char_to_token(place, at + len(text) - 1, 1))
            for place, (_, _, at, text) in enumerate(rows[row] for row in chosen)
        ]
        # The class itself takes padding for places where an answer may be.
        padding = encoded["attention_mask"] == 0
        scores = [logits.masked_fill(padding, -torch.inf) for logits in (found.start_logits, found.end_logits)]
        return sum(
            torch.nn.functional.cross_entropy(score, torch.tensor(places)) / 2
            for score, places in zip(scores, zip(*ends, strict=True), strict=True)
        )

    return Row(config, len(rows), loss)


def judged(folder, shared_data) -> Row:
    """How alike two texts are, from 0 to 5 as in STS-B: what they share of their characters, which are Chinese."""
    random, rows = np.random.default_rng(0), []
    for _ in range(64):
        first, second = ("".join(random.choice(list("红蓝绿黄黑白"), 4, False)) for _ in range(2))
        rows.append({"text": first, "text_b": second, "label": 2.5 * (len(set(first) & set(second)) - 2)})
    return classified(folder, BERT, rows, length=16)


def several(folder, shared_data) -> Row:
    """Several labels a text, or none; texts are cut."""
    random, rows = np.random.default_rng(0), []
    for _ in range(24):
        said = [word for word in ("sweet", "sour", "咸") if random.random() < 0.5]
        rows.append({"text": " ".join([*said, "soup, and so is all that comes after it"]), "label": said})
    return classified(folder, BERT, rows, length=10, examples_per_row=2)


ROWS = {
    "classify": sentences,
    "classify Chinese pairs by a decoder": chinese,
    "classify by numbers": judged,
    "classify by several labels": several,
    "tag": tags,
    "answer": questions,
}


@pytest.mark.parametrize("name", ROWS)
def test_fifty_losses_are_those_of_a_pytorch_loop(name, tmp_path, shared_data):
    row = ROWS[name](tmp_path, shared_data)
    ours, theirs = our_losses(row, tmp_path / "exported"), pytorch_losses(row, tmp_path / "exported")
    assert len(ours) == STEPS and np.mean(theirs[-5:]) < theirs[0] - 20 * TOLERANCE, "something is learnt"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
