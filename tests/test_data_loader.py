"""Rows against rows written out by hand, and batches as a pure function of seed and step."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import UserError
from data.loader import Batches, Rows, permute, prefetch
from data.packing import pack_best_fit, pack_split
from data.tokenizer import SpecialIds

SPECIALS = SpecialIds(pad=0, cls=1, sep=2, mask=3, bos=4, eos=5, all=(0, 1, 2, 3, 4, 5))
BYTES = np.array([0] * 6 + [1 + index % 4 for index in range(1000)], np.int32)


class Store:
    """Documents of the given lengths; token ids count up from 6, so that each is its own address."""

    def __init__(self, lengths):
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.documents = [list(range(6 + a, 6 + b)) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]

    def take(self, index):
        assert ((index >= 0) & (index < self.offsets[-1])).all()
        return (index + 6).astype(np.int32)


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any)
row_sizes = st.integers(8, 24)


def masked_lm(lengths, T=16) -> Rows:
    store = Store(lengths)
    return Rows(store, pack_best_fit(store.offsets, T), T, SPECIALS, "masked_lm")


def causal_lm(lengths, T=16) -> Rows:
    store = Store(lengths)
    return Rows(store, pack_split(store.offsets, T), T, SPECIALS, "causal_lm", BYTES)


def segments(batch, row):
    """(input ids, positions) of every document in a row; checks that padding comes last and is empty."""
    ids, segment, positions = (batch[name][row] for name in ("input_ids", "segment_ids", "positions"))
    used = int((segment > 0).sum())
    assert (segment[used:] == 0).all() and (ids[used:] == SPECIALS.pad).all() and (positions[used:] == 0).all()
    assert (np.diff(segment[:used]) >= 0).all()
    chosen = [segment == number for number in range(1, segment.max() + 1)]
    return [(ids[here].tolist(), positions[here].tolist()) for here in chosen]


@given(lengths, row_sizes)
def test_masked_lm_rows_hold_every_document(lengths, T):
    rows = masked_lm(lengths, T)
    batch = rows.rows(np.arange(len(rows)))
    found = []
    for row in range(len(rows)):
        for ids, positions in segments(batch, row):
            assert ids[0] == SPECIALS.cls and ids[-1] == SPECIALS.sep and positions == list(range(len(ids)))
            found.append(ids[1:-1])
    expected = [d[at : at + T - 2] for d in Store(lengths).documents for at in range(0, len(d), T - 2)]
    assert sorted(found) == sorted(expected)


@given(lengths, row_sizes)
def test_causal_lm_rows_are_the_stream(lengths, T):
    inputs = [(4, *d) for d in Store(lengths).documents if d]
    labels = [(*d, 5) for d in Store(lengths).documents if d]
    places = [(i, o, number) for number, d in enumerate(inputs) for i, o in zip(d, labels[number], strict=True)]
    rows = causal_lm(lengths, T)
    batch = rows.rows(np.arange(len(rows)))
    assert len(rows) == -(-len(places) // T)
    for row in range(len(rows)):
        expected = places[row * T : (row + 1) * T]
        size = len(expected)
        assert batch["input_ids"][row, :size].tolist() == [place[0] for place in expected]
        assert batch["labels"][row, :size].tolist() == [place[1] for place in expected]
        documents = [place[2] for place in expected]
        assert batch["segment_ids"][row, :size].tolist() == [1 + document - documents[0] for document in documents]
        starts = [documents.index(document) for document in documents]
        assert batch["positions"][row, :size].tolist() == [at - start for at, start in enumerate(starts)]
        assert (batch["loss_weights"][row] == (np.arange(T) < size)).all()
        assert batch["label_bytes"][row, :size].tolist() == BYTES[batch["labels"][row, :size]].tolist()
        assert not batch["segment_ids"][row, size:].any() and not batch["label_bytes"][row, size:].any()


@given(lengths, row_sizes, st.randoms())
def test_rows_do_not_depend_on_each_other(lengths, T, random):
    for rows in (masked_lm(lengths, T), causal_lm(lengths, T)):
        chosen = np.array([random.randrange(-1, len(rows)) for _ in range(5)])
        together = rows.rows(chosen)
        for place, index in enumerate(chosen):
            alone = rows.rows(np.array([index]))
            for name, array in together.items():
                assert array.dtype == (np.float32 if name == "loss_weights" else np.int32)
                np.testing.assert_array_equal(array[place], alone[name][0])
            assert alone["segment_ids"].any() == (index >= 0)


def test_no_rows_is_an_error():
    with pytest.raises(UserError, match="no row of tokens"):
        masked_lm([0])


@given(st.integers(1, 700), st.integers(0, 2**63))
def test_permute_is_a_permutation(n, seed):
    assert sorted(permute(np.arange(n), n, seed)) == list(range(n))


def test_permute_large_and_one_by_one():
    n = 3_000_000_019
    index = np.array([0, 1, 12345, n - 1])
    image = permute(index, n, 7)
    assert ((image >= 0) & (image < n)).all()
    assert [int(permute(int(i), n, 7)) for i in index] == image.tolist()


def test_permute_draws_all_orders_alike():
    orders = [tuple(permute(np.arange(4), 4, seed)) for seed in range(4800)]
    counts = [orders.count(order) for order in set(orders)]
    # 200 of each of the 24 orders are expected; the bounds are five standard deviations.
    assert len(counts) == 24 and min(counts) > 130 and max(counts) < 270


def test_every_epoch_holds_each_row_once_in_an_order_of_its_own():
    rows = masked_lm([14] * 37)
    batches = Batches(rows, 5, seed=3)
    seen = np.concatenate([batches.batch(step)["input_ids"][:, 1] for step in range(3 * 37 // 5)])
    epochs = [seen[at : at + 37].tolist() for at in range(0, 74, 37)]
    everything = sorted(rows.rows(np.arange(37))["input_ids"][:, 1])
    assert [sorted(epoch) for epoch in epochs] == [everything, everything]
    assert len({tuple(epoch) for epoch in [*epochs, everything]}) == 3
    other = np.concatenate([Batches(rows, 5, seed=4).batch(step)["input_ids"][:, 1] for step in range(8)])
    assert other[:37].tolist() != epochs[0]


@given(st.integers(0, 10**9), st.integers(1, 12))
def test_batch_is_a_pure_function_and_parts_make_the_whole(step, size):
    rows = causal_lm([3, 50, 8, 20])
    whole = Batches(rows, 2 * size, seed=1).batch(step)
    fresh = Batches(causal_lm([3, 50, 8, 20]), 2 * size, seed=1)
    parts = [fresh.batch(step, slice(0, size)), fresh.batch(step, slice(size, None))]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("max_rows", [1, 7, 20, 1000])
def test_fixed_batches_are_spread_evenly_and_filled_up(max_rows):
    rows = causal_lm([16 * 20 - 1])
    batches = Batches(rows, 8).fixed(max_rows)
    first = np.concatenate([batch["labels"][:, 0] for batch in batches])
    weights = np.concatenate([batch["loss_weights"].sum(axis=1) for batch in batches])
    total = min(max_rows, 20)
    assert all(batch["input_ids"].shape == (8, 16) for batch in batches) and len(batches) == -(-total // 8)
    assert (weights[:total] == 16).all() and (weights[total:] == 0).all()
    assert len(set(first[:total])) == total and (np.diff(first[:total]) > 0).all()
    if max_rows == 7:
        assert first[total - 1] > 16 * 15, "the end of the text is not evaluated"
    halves = [Batches(rows, 8).fixed(max_rows, part) for part in (slice(0, 4), slice(4, 8))]
    for batch, left, right in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(batch["labels"], np.concatenate([left["labels"], right["labels"]]))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_gives_the_batches_in_order(depth):
    batches = prefetch(lambda step: {"step": np.array(step)}, start=4, depth=depth)
    assert [int(next(batches)["step"]) for _ in range(20)] == list(range(4, 24))
    batches.close()
    assert list(batches) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_raises_what_the_thread_met(depth):
    def batch_fn(step):
        if step == 3:
            raise OSError("the disk is gone")
        return {"step": np.array(step)}

    batches = prefetch(batch_fn, start=0, depth=depth)
    assert [int(next(batches)["step"]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    batches.close()


def test_prefetch_works_ahead_but_not_further_than_depth():
    made, enough = [], threading.Event()

    def batch_fn(step):
        made.append(step)
        if len(made) == 3:
            enough.set()
        return {"step": np.array(step)}

    batches = prefetch(batch_fn, start=0, depth=2)
    assert enough.wait(10), "nobody took a batch, and none was prepared"
    batches.close()
    assert len(made) <= 4
