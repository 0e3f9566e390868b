"""Rows against rows written out by hand, and batches as a pure function of seed and step."""

import threading
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from espalier.data.loader import Batches, Mixture, Rows, permute, prefetch, shuffled
from espalier.data.packing import pack_best_fit, pack_split
from espalier.data.tokenizer import SpecialIds
from espalier.errors import UserError

SPECIALS = SpecialIds(pad=0, cls=1, sep=2, mask=3, bos=4, eos=5, all=(0, 1, 2, 3, 4, 5))
BYTES = np.array([0] * 6 + [1 + index % 4 for index in range(20_000)], np.int32)


class Store:
    """Documents of the given lengths; token ids count up from 6, so that each is its own address."""

    label = "the text"

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
    return Rows(store, pack_best_fit(store.offsets, T), T, SPECIALS, "framed")


def causal_lm(lengths, T=16) -> Rows:
    store = Store(lengths)
    return Rows(store, pack_split(store.offsets, T), T, SPECIALS, "shifted", BYTES)


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


@pytest.mark.parametrize("make", [masked_lm, causal_lm])
@given(lengths, row_sizes, st.integers(0, 3))
def test_the_documents_of_a_batch_are_those_whose_tokens_it_holds(make, lengths, T, step):
    batches = Batches({"first": make(lengths, T), "second": make([5, 30, 0, 7], T)}, batch_size=3, seed=1)
    found = set(batches.documents(step))
    # Tokens of both sources count up from 6, so the sources are asked one by one.
    source_B, row_B = batches._drawn(step, slice(None))
    expected = set()
    for number, (name, own) in enumerate((("first", lengths), ("second", [5, 30, 0, 7]))):
        rows = make(own, T)
        batch = rows.rows(row_B[source_B == number])
        offsets = Store(own).offsets
        for ids in (batch["input_ids"], batch.get("labels", batch["input_ids"])):
            for token in ids[ids > 5]:
                expected.add(f"{name}:{np.flatnonzero(offsets <= token - 6)[-1]}")
    assert found == expected


def test_no_rows_is_an_error():
    with pytest.raises(UserError, match="the text makes no row of tokens"):
        masked_lm([0])
    store = Store([0])
    store.label = "validation text of wiki"
    with pytest.raises(UserError, match="validation text of wiki makes no row of tokens"):
        Rows(store, pack_split(store.offsets, 16), 16, SPECIALS, "shifted", BYTES)


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
    batches = Batches({"text": rows}, 5, seed=3)
    seen = np.concatenate([batches.batch(step)["input_ids"][:, 1] for step in range(3 * 37 // 5)])
    epochs = [seen[at : at + 37].tolist() for at in range(0, 74, 37)]
    everything = sorted(rows.rows(np.arange(37))["input_ids"][:, 1])
    assert [sorted(epoch) for epoch in epochs] == [everything, everything]
    assert len({tuple(epoch) for epoch in [*epochs, everything]}) == 3
    other = np.concatenate([Batches({"text": rows}, 5, seed=4).batch(step)["input_ids"][:, 1] for step in range(8)])
    assert other[:37].tolist() != epochs[0]


@given(st.integers(0, 10**9), st.integers(1, 12))
def test_batch_is_a_pure_function_and_parts_make_the_whole(step, size):
    rows = causal_lm([3, 50, 8, 20])
    whole = Batches({"text": rows}, 2 * size, seed=1).batch(step)
    fresh = Batches({"text": causal_lm([3, 50, 8, 20])}, 2 * size, seed=1)
    parts = [fresh.batch(step, slice(0, size)), fresh.batch(step, slice(size, None))]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("max_rows", [1, 7, 20, 1000])
def test_fixed_batches_are_spread_evenly_and_filled_up(max_rows):
    rows = causal_lm([16 * 20 - 1])
    batches = Batches({"text": rows}, 8).fixed(max_rows)
    first = np.concatenate([batch["labels"][:, 0] for batch in batches])
    weights = np.concatenate([batch["loss_weights"].sum(axis=1) for batch in batches])
    total = min(max_rows, 20)
    assert all(batch["input_ids"].shape == (8, 16) for batch in batches) and len(batches) == -(-total // 8)
    assert (weights[:total] == 16).all() and (weights[total:] == 0).all()
    assert len(set(first[:total])) == total and (np.diff(first[:total]) > 0).all()
    if max_rows == 7:
        assert first[total - 1] > 16 * 15, "the end of the text is not evaluated"
    halves = [Batches({"text": rows}, 8).fixed(max_rows, part) for part in (slice(0, 4), slice(4, 8))]
    for batch, left, right in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(batch["labels"], np.concatenate([left["labels"], right["labels"]]))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_gives_the_batches_in_order(depth):
    batches = prefetch(lambda step: {"step": np.array(step)}, start=4, depth=depth)
    assert [int(next(batches)["step"]) for _ in range(20)] == list(range(4, 24))
    batches.close()
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


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
        if len(made) == 2:
            enough.set()
        return {"step": np.array(step)}

    batches = prefetch(batch_fn, start=0, depth=2)
    assert enough.wait(10), "nobody took a batch, and none was prepared"
    batches.close()
    assert len(made) <= 3


class Watched(Store):
    """Remembers how many tokens were asked for."""

    def __init__(self, lengths):
        super().__init__(lengths)
        self.taken = 0

    def take(self, index):
        self.taken += len(index)
        return super().take(index)


def sources(*sizes) -> dict[str, Rows]:
    """Causal rows of 16 tokens, as many as the sizes say."""
    return {f"source{number}": causal_lm([16 * size - 1]) for number, size in enumerate(sizes)}


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mixed", [False, True])
def test_any_number_of_hosts_makes_the_same_batch(hosts, mixed):
    """Each reads its slice and no more."""
    stores = [Watched([16 * size - 1]) for size in ((70, 31) if mixed else (70,))]
    rows = {
        str(number): Rows(store, pack_split(store.offsets, 16), 16, SPECIALS, "shifted", BYTES)
        for number, store in enumerate(stores)
    }
    batches = Batches(rows, 48, seed=5, weights={"0": 0.7, "1": 0.3} if mixed else None)
    for step in (0, 7, 10**6):
        whole = batches.batch(step)
        each = 48 // hosts
        for host in range(hosts):
            for store in stores:
                store.taken = 0
            part = batches.batch(step, slice(host * each, (host + 1) * each))
            assert sum(store.taken for store in stores) == 2 * 16 * each, "inputs and labels of its rows"
            for name, array in part.items():
                np.testing.assert_array_equal(array, whole[name][host * each : (host + 1) * each])


@pytest.mark.parametrize("workers, depth", [(1, 0), (1, 1), (1, 5), (3, 1), (4, 6)])
def test_any_number_of_workers_makes_the_same_batches(workers, depth):
    batches = Batches(sources(70), 8, seed=2)
    stream = prefetch(batches.batch, 3, depth, workers)
    for step in range(3, 20):
        np.testing.assert_array_equal(next(stream)["input_ids"], batches.batch(step)["input_ids"])
    stream.close()


def test_a_far_step_costs_what_a_near_one_costs(monkeypatch):
    """Counted in the numbers that the permutation mixes and the tokens that are read."""
    import espalier.data.loader

    store, mixed = Watched([16 * 999 - 1]), []
    feistel = espalier.data.loader._feistel
    monkeypatch.setattr(
        espalier.data.loader, "_feistel", lambda value, *rest: mixed.append(len(value)) or feistel(value, *rest)
    )
    batches = Batches({"a": Rows(store, pack_split(store.offsets, 16), 16, SPECIALS, "shifted", BYTES)}, 64)
    costs = []
    for step in (10, 10**6):
        mixed.clear()
        store.taken = 0
        batches.batch(step)
        costs.append((sum(mixed), store.taken))
    assert costs[0][1] == costs[1][1] and 0.5 < costs[0][0] / costs[1][0] < 2


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=6), st.integers(1, 100_000))
@example([1_000_000, 50, 50], 20_000)
@example([1, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6], 100_000)
def test_any_first_rows_hold_each_sources_share(weights, rows):
    mixture = Mixture(weights)
    source, number = mixture.at(np.arange(rows))
    counts = np.bincount(source, minlength=len(weights))
    assert counts.tolist() == mixture.taken(rows)
    exact = np.array(weights) / sum(weights)
    # To within rounding to 1/10,000 and a few rows that are under way; a source that small gets one in 10,000, which
    # the greatest gives up.
    given_up = np.where(exact == exact.max(), len(weights) - 1, 0)
    assert (abs(counts - exact * rows) <= len(weights) + rows / 10_000 * (1 + given_up)).all()
    assert (mixture.shares > 0).all() and mixture.shares.sum() == pytest.approx(1)
    for one in range(len(weights)):
        assert number[source == one].tolist() == list(range(counts[one]))


def test_the_realised_share_over_an_epoch():
    rows = sources(7000, 5000)
    batches = Batches(rows, 32, weights={"source0": 0.7, "source1": 0.3})
    report = batches.epochs(10_000 // 32)
    assert abs(report["source0"]["share"] - 0.7) < 0.001 and abs(report["source1"]["share"] - 0.3) < 0.001
    assert abs(report["source0"]["epochs"] - 1) < 0.01 and abs(report["source1"]["epochs"] - 0.6) < 0.01


def test_each_source_of_a_mixture_has_epochs_of_its_own():
    rows = sources(30, 50)
    batches = Batches(rows, 10, seed=4, weights={"source0": 0.5, "source1": 0.5})
    seen = np.concatenate([batches.batch(step)["labels"][:, 0] for step in range(6)])
    # The texts begin with the same tokens: told apart by the pattern of the mixture.
    source, _ = batches._mixture.at(np.arange(60))
    first = {name: row["labels"][:, 0].tolist() for name, r in rows.items() for row in [r.rows(np.arange(len(r)))]}
    assert sorted(seen[source == 0]) == sorted(first["source0"])
    assert len(set(seen[source == 1])) == 30 and set(seen[source == 1]) <= set(first["source1"])


class Numbered:
    """Rows that are nothing but their source and number."""

    fill = 1.0

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return self.size

    def rows(self, indices):
        return {"row": np.stack([np.full(len(indices), self.source), indices], axis=-1)}


@pytest.mark.parametrize("sizes", [(30, 50, 20), (7, 99_991), (99_991, 7, 2)])
def test_without_weights_every_row_of_every_source_comes_once_an_epoch(sizes):
    """Whatever the sizes: none is rounded away, and the order is another in each epoch."""
    total = sum(sizes)
    rows = {str(number): Numbered(number, size) for number, size in enumerate(sizes)}
    batches = Batches(rows, 2, seed=3)
    whole = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    seen = Batches(rows, 2 * total, seed=3).batch(0)["row"]
    epochs = [list(map(tuple, part.tolist())) for part in (seen[:total], seen[total:])]
    assert [sorted(epoch) for epoch in epochs] == [whole, whole] and epochs[0] != epochs[1]
    assert [batches.batch(step)["row"].tolist() for step in range(5)] == seen[:10].reshape(5, 2, 2).tolist()
    assert [entry["epochs"] for entry in batches.epochs(total).values()] == pytest.approx([2] * len(sizes))
    assert [entry["share"] for entry in batches.epochs(9).values()] == pytest.approx([n / total for n in sizes])
    few = np.concatenate([batch["row"] for batch in batches.fixed(100)])
    assert set(few[:, 0]) == set(range(len(sizes))), "evaluation looks at every source"


def test_one_source_alone_is_the_permutation():
    """What runs of one text have read ever since, with weights or without."""
    rows = {"text": Numbered(0, 1000)}
    expected = shuffled(np.arange(5 * 16), 1000, 9).tolist()
    for weights in (None, {"text": 1.0}):
        batches = Batches(rows, 16, seed=9, weights=weights)
        assert [row for step in range(5) for row in batches.batch(step)["row"][:, 1].tolist()] == expected


def test_the_order_of_a_mixture_is_that_of_earlier_versions():
    batches = Batches({"a": Numbered(0, 30), "b": Numbered(1, 50)}, 10, seed=4, weights={"a": 0.7, "b": 0.3})
    assert batches.batch(3)["row"].tolist() == [
        [0, 29],
        [1, 28],
        [0, 10],
        [0, 16],
        [0, 20],
        [1, 19],
        [0, 3],
        [0, 21],
        [1, 42],
        [0, 7],
    ]


def test_evaluation_of_a_mixture_has_its_shares():
    batches = Batches(sources(100, 100), 8, weights={"source0": 0.75, "source1": 0.25}).fixed(40)
    weights = np.concatenate([batch["loss_weights"].sum(axis=1) for batch in batches])
    assert (weights[:40] == 16).all() and len(weights) == 40
