"""What a person sees while a command runs, on a terminal and in a log, in English and in Chinese."""

import sys
import threading
import time

import pytest

from espalier import progress


@pytest.fixture
def terminal(monkeypatch):
    """Standard output is a terminal of 40 columns."""
    monkeypatch.setattr(progress, "_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")


@pytest.fixture
def impatient(monkeypatch):
    """Waits are told of after 0.05 s and, in a log, again after 0.1 s, 0.2 s, …"""
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(progress, "AGAIN", 0.1)


def waits_going_on() -> list[str]:
    """Threads that still tell of a wait; other tests of the process may have left threads of libraries."""
    names = {"tokenizing", "reading"}
    return [thread.name for thread in threading.enumerate() if thread.name in names]


def lines_on(screen: str) -> list[str]:
    """What stands on the terminal at the end."""
    return [line.rpartition("\r\033[K")[2] for line in screen.split("\n")]


def test_a_short_wait_is_not_told_of(capsys):
    with progress.waiting("tokenizing"):
        pass
    assert capsys.readouterr().out == "" and not waits_going_on()


def test_a_log_has_a_line_for_a_long_wait_and_few_for_a_longer_one(capsys, impatient):
    with progress.waiting("evaluating") as far:
        far("batch 1 of 3")
        time.sleep(0.1)
        assert capsys.readouterr().out == "evaluating … batch 1 of 3\n"
        far("batch 2 of 3")
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["evaluating … batch 2 of 3, 0 s"] * 2


def test_a_terminal_shows_a_wait_in_one_line_that_goes(capsys, impatient, terminal):
    with progress.waiting("evaluating"):
        time.sleep(0.1)
        shown = capsys.readouterr().out
        assert shown.startswith("evaluating … 0 s") and "\n" not in shown
        progress.say("saved step 3")
    assert lines_on(shown + capsys.readouterr().out) == ["saved step 3", ""]


def test_a_wait_ends_with_what_it_waits_for(capsys, impatient, terminal):
    with pytest.raises(ValueError), progress.waiting("reading"):
        time.sleep(0.1)
        raise ValueError
    assert lines_on(capsys.readouterr().out) == [""] and not waits_going_on()


def test_of_waits_within_each_other_the_inner_one_is_told_of(capsys, impatient):
    with progress.waiting("preparing"), progress.waiting("tokenizing"):
        time.sleep(0.08)
    assert capsys.readouterr().out == "tokenizing …\n"


def test_where_there_is_a_bar_no_line_is_needed(capsys, impatient, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.waiting("tokenizing", bar=True):
        time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_a_line_that_changes_fits_into_the_terminal(capsys, terminal):
    progress.show("step 1/9  " + "文" * 40)
    progress.end()
    (shown, _) = capsys.readouterr().out.split("\n")
    assert 38 <= progress.columns(shown) <= 39


@pytest.mark.parametrize(("text", "width"), [("abc", 3), ("数据/训练.tsv", 13), ("e\u0301", 1), ("ﾊﾟ", 2), ("", 0)])
def test_how_wide_text_is(text, width):
    assert progress.columns(text) == width


def test_values_stand_in_a_column_and_break_at_blanks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    progress.block(
        {"text": "语料/第一部分.txt, 语料/第二部分.txt: 12 documents", "held out": "x" * 50, "run": "runs/a"}
    )
    assert capsys.readouterr().out.splitlines() == [
        "  text      语料/第一部分.txt,",
        "            语料/第二部分.txt: 12",
        "            documents",
        "  held out  " + "x" * 50,
        "  run       runs/a",
    ]


@pytest.mark.parametrize(
    ("number", "written"),
    [(0, "0"), (823, "823"), (999.6, "1.00 k"), (9870, "9.87 k"), (109_482_240, "109 M"), (1.2358e9, "1.24 B")],
)
def test_amounts_have_three_digits(number, written):
    assert progress.amount(number) == written


def test_time_is_written_as_on_a_clock():
    assert [progress.clock(seconds) for seconds in (0.4, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
