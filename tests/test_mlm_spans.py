"""Span corruption against a walk through each row in plain Python, and runs of it."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from espalier.errors import UserError
from espalier.loading import load
from mlm.config import SpanConfig
from mlm.presets import t5_debug
from mlm.pretrain import main
from mlm.spans import SPARE, SpanVocabulary, _parts, corrupt, counts, lengths, sentinels_needed
from sharding.mesh import MeshConfig, build_mesh, place_batch

V, BOS, EOS, START = 500, 2, 1, 0
SPECIAL = np.isin(np.arange(V), (START, EOS, BOS)) | (np.arange(V) >= 400)
KNOWN = SpanVocabulary(np.arange(499, 399, -1, dtype=np.int32), EOS, START, SPECIAL)
T5 = SpanConfig()


def rows(count: int, length: int, most: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Documents behind a special token each, of up to `most` tokens, cut at the ends of rows; the last row is short."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((count, length), np.int32) for name in ("input_ids", "segment_ids")}
    for row in range(count):
        at, number, end = 0, 0, length if row < count - 1 else length // 3
        while at < end:
            number, size = number + 1, min(int(rng.integers(1, most + 1)), end - at)
            batch["input_ids"][row, at : at + size] = rng.integers(3, 400, size)
            batch["input_ids"][row, at] = BOS
            batch["segment_ids"][row, at : at + size] = number
            at += size
    return batch


def put_back(source: dict, target: dict, row: int) -> tuple[list[tuple[int, int]], list[int]]:
    """((token, document) of the text, sizes of spans), by what is read and what is written."""
    read, written = (
        [(int(x), int(s)) for x, s in zip(part[name][row], part["segment_ids"][row], strict=True) if s]
        for part, name in ((source, "input_ids"), (target, "labels"))
    )
    assert read.pop()[0] == EOS and written.pop()[0] == EOS
    spans: dict[int, list[tuple[int, int]]] = {}
    for token, segment in written:
        if token >= 400:
            spans[token] = []
            mark = (token, segment)
            assert mark in read, "a sentinel stands in its document on both sides"
        else:
            spans[mark[0]].append((token, segment))
    assert list(spans) == KNOWN.sentinels[: len(spans)].tolist()
    text = [item for token, segment in read for item in spans.get(token, [(token, segment)])]
    return text, [len(span) for span in spans.values()]


@pytest.mark.parametrize(("length", "most"), [(64, 200), (96, 9), (566, 80)])
def test_what_is_read_and_written_puts_the_text_together(length, most):
    batch = rows(16, length, most)
    made = jax.device_get(jax.jit(lambda batch, key: corrupt(batch, key, T5, KNOWN))(batch, jax.random.key(3)))
    assert (made["source"]["input_ids"].shape[1], made["target"]["labels"].shape[1]) == lengths(T5, length)
    for row in range(16):
        real = (batch["segment_ids"][row] > 0) & ~SPECIAL[batch["input_ids"][row]]
        wanted = list(
            zip(batch["input_ids"][row][real].tolist(), batch["segment_ids"][row][real].tolist(), strict=True)
        )
        text, sizes = put_back(made["source"], made["target"], row)
        assert text == wanted
        hidden, spans = counts(T5, len(wanted))
        assert sum(sizes) == hidden and spans <= len(sizes) <= spans + SPARE and min(sizes) >= 1
        target = {name: array[row] for name, array in made["target"].items()}
        new = np.diff(target["segment_ids"], prepend=0) != 0
        shifted = np.where(new, START, np.concatenate([[0], target["labels"][:-1]]))
        np.testing.assert_array_equal(target["input_ids"], shifted)
        assert (np.diff(target["segment_ids"][target["segment_ids"] > 0]) >= 0).all()


def test_shares_and_lengths_are_those_of_t5():
    """512 tokens read are 568 of text and 114 written (Raffel et al. 2020's code, random_spans_helper)."""
    hidden, spans = counts(T5, 568)
    assert (568 - hidden + spans + 1, hidden + spans + 1) == (512, 114)
    assert lengths(T5, 568, spare=0) == (512, 114) and lengths(T5, 566) == (512, 116)
    assert sentinels_needed(T5, 568) == 28 + SPARE
    batch = {"input_ids": np.full((64, 400), 7, np.int32), "segment_ids": np.ones((64, 400), np.int32)}
    target = corrupt(batch, jax.random.key(1), T5, KNOWN)["target"]
    tokens = np.asarray(target["labels"])[np.asarray(target["segment_ids"]) > 0]
    assert (tokens == 7).sum() / (64 * 400) == 0.15 and (tokens == 7).sum() / (tokens >= 400).sum() == 3.0


def test_every_way_to_cut_is_equally_probable():
    """6 items in 3 parts: 10 ways, 4,000 draws; within 4 deviations."""
    found = _parts(jax.random.key(5), np.full(4000, 6, np.int32), np.full(4000, 3, np.int32), 9)
    seen = {cut: 0 for cut in itertools.product(range(1, 5), repeat=3) if sum(cut) == 6}
    for cut in np.asarray(found)[:, :3].tolist():
        seen[tuple(cut)] += 1
    assert len(seen) == 10 and np.asarray(found)[:, 3:].sum() == 0
    assert all(abs(count - 400) < 4 * 19 for count in seen.values()), seen


def test_a_mesh_draws_the_same():
    batch = rows(8, 64, 30)
    run = jax.jit(lambda batch, key: corrupt(batch, key, T5, KNOWN))
    whole, mesh = jax.device_get(run(batch, jax.random.key(0))), build_mesh(MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        jax.tree.map(
            np.testing.assert_array_equal, jax.device_get(run(place_batch(batch, mesh), jax.random.key(0))), whole
        )


def test_a_run_learns_resumes_and_is_exported(tmp_path):
    """2 + 2 steps are 4; what is exported writes."""
    config = dataclasses.replace(
        t5_debug(), steps=4, log_every=1, eval_every=4, checkpoint=dataclasses.replace(t5_debug().checkpoint, every=2)
    )
    small = dataclasses.replace(config.model, num_hidden_layers=1, num_decoder_layers=1)
    config = dataclasses.replace(config, model=small, eval_rows=8)

    def run(name, **settings):
        main(dataclasses.replace(config, run_dir=str(tmp_path / name), **settings))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line and "learning_rate" in line}

    whole = run("whole", export=str(tmp_path / "there"))
    run("parts", stop_at=2)
    assert run("parts") == whole and len(whole) == 4
    model = load(f"hf:{tmp_path / 'there'}")
    assert model.config.model_type == "t5" and model.head == "seq2seq_lm" and not model.config.tie_word_embeddings
    assert model.config.vocab_size == len(model.tokenizer) + 100
    assert len(model.generate(["def"], max_new_tokens=4)) == 1


def test_what_will_not_do_is_one_line(tmp_path):
    base = t5_debug()
    for change, message in (
        (lambda: SpanConfig(density=1.5), "spans.density=1.5 must lie between 0 and 1"),
        (lambda: SpanConfig(mean_length=0.5), "spans.mean_length=0.5 be at least 1"),
        (
            lambda: dataclasses.replace(base, model=dataclasses.replace(base.model, num_decoder_layers=0)),
            "what is hidden is written by a decoder",
        ),
        (
            lambda: main(
                dataclasses.replace(
                    base, run_dir=str(tmp_path / "long"), data=dataclasses.replace(base.data, sequence_length=4000)
                )
            ),
            "up to 202 hidden spans, and there are 100 sentinels; try --data.sequence-length",
        ),
    ):
        with pytest.raises(UserError, match=message):
            change()
