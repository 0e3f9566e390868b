"""Which checkpoints stay: by rules that are tried on every small case, and in runs."""

import itertools
from typing import Any

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from toy import quick_compilation  # noqa: F401

from espalier.errors import UserError
from espalier.training import checkpoint
from espalier.training.config import CheckpointConfig
from espalier.training.manifest import complete_steps
from espalier.training.retention import bytes_of, removal


def by_the_words(sizes: dict, config: CheckpointConfig, best) -> tuple[set, bool]:
    """(what stays, whether the budget holds), as the help of the settings says it: every set that may stay is tried."""
    budget = bytes_of(config.budget) if config.budget else float("inf")
    newest = max(sizes)
    ruled = {
        step
        for step in sizes
        if sum(other > step for other in sizes) < config.keep
        or config.keep_every
        and step % config.keep_every == 0
        or step in best
    }
    never = {newest, *best} & sizes.keys()
    may_go = sorted(ruled - never)
    for count in range(len(may_go) + 1):
        stay = ruled - set(may_go[:count])
        if sum(sizes[step] for step in stay) + sizes[newest] <= budget:
            return stay, True
    return never, False


def test_what_stays_is_what_the_settings_say_in_every_small_case():
    cases = 0
    for count, first in itertools.product(range(1, 6), (1, 4)):
        steps = range(first, first + count)
        for keep, every, budget in itertools.product((1, 2, 9), (None, 2, 3), (None, "1B", "25B", "48B")):
            config = CheckpointConfig(keep=keep, keep_every=every, budget=budget)
            sizes = {step: 5 + step % 4 for step in steps}
            for best in ((), *itertools.combinations((*steps, 77), 1), *itertools.combinations(steps, 2)):
                gone = removal(sizes, config, best)
                stay, holds = by_the_words(sizes, config, best)
                assert (sizes.keys() - set(gone.steps), gone.over == 0) == (stay, holds), (sizes, config, best)
                assert gone.steps == sorted(gone.steps) and max(steps) in stay
                cases += 1
    assert cases > 1000


@given(
    steps=st.sets(st.integers(1, 500), min_size=1, max_size=40),
    size=st.integers(1, 100),
    room=st.integers(1, 30),
    keep=st.integers(1, 5),
    every=st.none() | st.integers(1, 50),
    number=st.integers(0, 3),
    data=st.data(),
)
def test_the_newest_and_the_best_stay_through_a_whole_run(steps, size, room, keep, every, number, data):
    """Checkpoints appear one by one; what a deletion leaves is what the next save finds."""
    config = CheckpointConfig(keep=keep, keep_every=every, budget=f"{room * size}B")
    there: set[int] = set()
    for step in sorted(steps):
        # What is being written while the others are there: the budget that held still holds.
        fitted = not there or len(there) + 1 <= room
        there.add(step)
        best = set(data.draw(st.permutations(sorted(there)))[:number])
        before = set(there)
        gone = removal({other: size for other in there}, config, best)
        there -= set(gone.steps)
        assert step in there and best <= there
        assert (len(there) + 1 <= room) == (gone.over == 0)
        assert fitted or len(before) - 1 + 1 > room
        if gone.over:
            assert there == best | {step}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("20GB", 20 * 10**9),
        ("1.5 TiB", 3 * 2**39),
        ("800", 800),
        (".5k", 500),
        ("7MiB", 7 * 2**20),
        ("3 t", 3 * 10**12),
    ],
)
def test_amounts_of_bytes_are_read_as_people_write_them(text, number):
    assert bytes_of(text) == number


@pytest.mark.parametrize("text", ["", "much", "20 GBs", "-3GB", "0", "0.1B", "1e9", "20,5GB", "GB"])
def test_what_is_no_amount_is_refused_in_a_line(text):
    with pytest.raises(UserError, match="give one as 20GB") as error:
        CheckpointConfig(budget=text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["keep", "keep_every", "keep_best", "every"])
def test_at_least_one_stays(name):
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(UserError, match=rf"checkpoint\.{name}=0 must be at least 1"):
        CheckpointConfig(**settings)


def test_a_run_keeps_what_it_is_told_and_may_be_told_otherwise_when_it_goes_on(tmp_path, monkeypatch, capsys):
    # What is written of so small a model differs by a half from step to step.
    monkeypatch.setattr(checkpoint, "bytes_in", lambda folder: 1000)

    def kept(stop_at: int, **settings: Any) -> list[int]:
        config = CheckpointConfig(every=1, keep=2, **settings)
        toy.run(toy.config(tmp_path, steps=10, stop_at=stop_at, checkpoint=config), eval_batches=[toy.batch(9)])
        return complete_steps(tmp_path / "checkpoints")

    assert kept(5, keep_every=2) == [2, 4, 5]
    assert kept(6) == [5, 6]
    # Two, and room for the one that is written.
    assert kept(7, keep_every=1, budget="3500B") == [6, 7]
    assert "more than" not in capsys.readouterr().out
    assert kept(9, budget="1kB") == [9]
    said = [line for line in capsys.readouterr().out.splitlines() if "more than" in line]
    assert len(said) == 1 and said[0].endswith("1.00 kB more than checkpoint.budget=1kB")


def test_the_best_few_stay_by_any_metric_and_are_known_when_the_run_goes_on(tmp_path):
    scores = {1: 0.3, 2: 0.5, 3: 0.9, 4: 0.5, 5: 0.2, 6: 0.6, 7: float("nan"), 8: 0.1}

    def kept(first: int, stop_at: int | None, count: int = 2) -> list[int]:
        values = iter([scores[step] for step in scores if step >= first])
        config = toy.config(
            tmp_path,
            steps=8,
            stop_at=stop_at,
            eval_every=1,
            keep_best="score",
            checkpoint=CheckpointConfig(every=100, keep=1, keep_best=count),
        )
        toy.run(config, finalize_eval=lambda found: found | {"score": next(values)}, eval_batches=[toy.batch(9)])
        return complete_steps(tmp_path / "checkpoints")

    # Of equals the earlier stays. An evaluation ends after its save: what it says counts when the next save clears.
    assert kept(1, 5) == [2, 3, 5]
    assert kept(6, 7) == [3, 6, 7]
    assert kept(8, None, count=1) == [3, 8]
