"""Plans: every token once, nothing overlaps, and best fit is what a piece-by-piece best fit gives."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from espalier.data.packing import BEGINS, ENDS, fill, pack_best_fit, pack_split

lengths = st.lists(st.integers(0, 40) | st.integers(1, 6), max_size=120)
row_sizes = st.integers(8, 60)


def offsets_of(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def best_fit_rows(sizes, capacity) -> list[int]:
    """Free places of each row, by the definition: largest piece first, into the fullest row that holds it."""
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row, room in enumerate(free) if room >= size]
        if fitting:
            free[min(fitting, key=lambda row: free[row])] -= size
        else:
            free.append(capacity - size)
    return sorted(free)


def check(plan, sequence_length):
    assert plan.row_offsets[0] == 0 and plan.row_offsets[-1] == len(plan.starts)
    used = [plan.slots[a:b].sum() for a, b in zip(plan.row_offsets, plan.row_offsets[1:], strict=False)]
    assert all(0 < places <= sequence_length for places in used)
    assert fill(plan, sequence_length) == sum(used) / max(len(used) * sequence_length, 1)
    assert [array.dtype.name for array in plan] == ["int64", "int32", "int32", "uint8", "int64"]
    return used


@given(lengths, row_sizes)
def test_best_fit_takes_every_token_once(lengths, T):
    offsets = offsets_of(lengths)
    plan = pack_best_fit(offsets, T)
    check(plan, T)
    taken = [np.arange(start, start + length) for start, length in zip(plan.starts, plan.lengths, strict=True)]
    assert sorted(np.concatenate([[], *taken])) == list(range(offsets[-1]))
    for start, length in zip(plan.starts, plan.lengths, strict=True):
        assert np.searchsorted(offsets, start, "right") == np.searchsorted(offsets, start + length - 1, "right")
    assert (plan.flags == BEGINS | ENDS).all() and (plan.slots == plan.lengths + 2).all()


@given(lengths, row_sizes)
@example([38, 38, 2, 2, 1], 60)  # two rows alike, more room in each than there are small pieces
def test_best_fit_is_best_fit(lengths, T):
    plan = pack_best_fit(offsets_of(lengths), T)
    assert sorted(T - places for places in check(plan, T)) == best_fit_rows(plan.slots.tolist(), T)


@given(lengths, row_sizes)
def test_best_fit_keeps_the_order_of_the_text(lengths, T):
    plan = pack_best_fit(offsets_of(lengths), T)
    rows = [plan.starts[a:b] for a, b in zip(plan.row_offsets, plan.row_offsets[1:], strict=False)]
    assert all((np.diff(row) > 0).all() for row in rows)
    assert (np.diff([row[0] for row in rows]) > 0).all()


def test_best_fit_of_many_documents():
    """A hundred thousand documents, in far less than the second that one step a piece would take."""
    rng = np.random.default_rng(0)
    offsets = offsets_of(np.minimum(rng.lognormal(5, 1, 100_000).astype(int) + 1, 5000))
    plan = pack_best_fit(offsets, 512)
    check(plan, 512)
    assert plan.lengths.sum() == offsets[-1] and fill(plan, 512) > 0.999


@given(lengths, row_sizes)
def test_split_is_one_stream(lengths, T):
    offsets = offsets_of(lengths)
    stream = [(d, place) for d, n in enumerate(lengths) if n for place in range(n + 1)]
    plan = pack_split(offsets, T)
    used = check(plan, T)
    assert all(places == T for places in used[:-1])
    found = []
    for start, length, slots, flags in zip(plan.starts, plan.lengths, plan.slots, plan.flags, strict=True):
        begins = bool(flags & BEGINS)
        assert slots == length + begins
        document = int(np.searchsorted(offsets, start, "right")) - 1
        # The place of a bos is 0, that of token t is t + 1.
        places = [(document, int(start - offsets[document]) + number + (not begins)) for number in range(slots)]
        assert begins == (places[0][1] == 0) and bool(flags & ENDS) == (places[-1][1] == lengths[document])
        found += places
    assert found == stream
