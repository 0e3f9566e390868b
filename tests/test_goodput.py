"""Where the time of a run went: hand arithmetic on made-up records, and what real sessions write."""

import json

import pytest
from soak import figure

from espalier.goodput import Session, counted, goodput, lost_steps, read_sessions, words
from espalier.report.render import write_report
from espalier.report.run_files import read_run
from espalier.report.sessions import session_sections
from espalier.training.sessions import SessionLog


def session(began, first, step, end="ended", /, **seconds):
    return Session(began, first, step, seconds, end)


# Killed at step 121 after a save at 100; the second goes on from there and ends. Nothing runs for 30 s between them.
KILLED = [
    session(1000.0, 0, 121, "", start=5.0, compile=20.0, data=1.0, save=2.0, evaluation=12.0, training=60.0),
    session(1130.0, 100, 200, start=6.0, compile=20.0, data=1.0, save=2.0, evaluation=11.0, training=49.5),
]


def test_a_killed_session_by_hand():
    """60 s for the 120 steps after the first: 0.5 s each, 21 of them were done again."""
    found = goodput(KILLED)
    assert found is not None and lost_steps(KILLED) == [21, 0]
    assert found.seconds == {
        "training": 60 - 10.5 + 49.5,
        "lost": 10.5,
        "compile": 40,
        "save": 4,
        "data": 2,
        "evaluation": 23,
        "start": 11,
    }
    assert (found.total, found.between, found.starts, found.killed) == (100 + 89.5, 30, 2, 1)
    assert found.fraction == pytest.approx(99 / 189.5)
    assert words(found) == (
        "52.2 % of 3:10: training 1:39, compile 40.0 s, save 4.0 s, data 2.0 s, evaluation 23.0 s, start 11.0 s, "
        "21 steps done again 10.5 s; 2 starts, 30.0 s between them"
    )


def test_a_rollback_by_hand():
    """One process: at step 50 back to 40, whose window is skipped; at 45 back to 30. Of the first session 20 of 50
    steps were done again, 1 s each; of the second its 5, all of it."""
    sessions = [
        session(0.0, 0, 50, "failed", start=1.0, compile=10.0, training=49.0),
        session(60.0, 40, 45, "failed", compile=1.0, training=4.0),
        session(65.0, 30, 60, compile=1.0, training=29.0),
    ]
    assert lost_steps(sessions) == [20, 5, 0]
    found = goodput(sessions)
    assert found is not None and (found.lost_steps, found.between, found.killed) == (25, 0, 0)
    assert found.seconds["lost"] == 20 + 4 and found.seconds["training"] == 29 + 29
    assert [round(sum(shares.values())) for shares in counted(sessions)] == [60, 5, 30]


def test_sessions_without_a_step_and_of_an_older_run():
    """A session that was killed while it compiled; one with a single step, all of it lost; one of a run that had 500
    steps before anything was written down."""
    sessions = [
        session(0.0, 500, 500, "", start=3.0, compile=7.0),
        session(10.0, 500, 501, "", start=3.0, compile=7.0),
        session(20.0, 500, 500, start=2.0),
    ]
    found = goodput(sessions)
    assert found is not None and found.lost_steps == 1 and found.unrecorded == 500
    assert found.fraction == 0 and found.total == 22 and found.killed == 2
    assert words(found).endswith("without the first 500 steps, of which no times are known")
    assert goodput([]) is None


def test_clocks_that_disagree_make_no_negative_time():
    found = goodput([session(100.0, 0, 10, training=50.0), session(120.0, 10, 20, training=50.0)])
    assert found is not None and found.between == 0 and found.fraction == 1


class Clock:
    now = 1000.0

    def time(self):
        return self.now

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("espalier.training.sessions.time", clock)
    return clock


def test_a_session_writes_where_its_seconds_go(tmp_path, clock):
    path = tmp_path / "sessions.jsonl"
    log = SessionLog(path, 0, began=990.0)
    clock.now += 5
    with log.within("data"):
        clock.now += 1
    log.now("compile")
    clock.now += 20
    log.now("training")
    log.alive(1)
    for step in range(2, 12):
        clock.now += 0.5
        log.alive(step)
    with log.within("evaluation"):
        clock.now += 3
        with log.within("save"):
            clock.now += 2
    (killed,) = read_sessions(path)
    assert (killed.began, killed.start, killed.step, killed.end) == (990, 0, 11, "")
    # Ten steps of half a second; a line for every second.
    assert killed.seconds == {
        "training": 5, "lost": 0, "compile": 20, "save": 0, "data": 1, "evaluation": 0, "start": 15
    }  # fmt: skip
    assert len(path.read_text().splitlines()) == 1 + 1 + 5
    log.end("ended")
    (ended,) = read_sessions(path)
    assert ended.end == "ended" and (ended.seconds["evaluation"], ended.seconds["save"]) == (3, 2)
    assert ended.ended == clock.now
    # A kill in the middle of a line; the next session, of the same process, begins where the last one ended.
    with path.open("a") as file:
        file.write('{"session": "torn", "be')
    clock.now += 1
    SessionLog(path, 10, began=990.0).end("failed")
    first, second = read_sessions(path)
    assert first == ended and (second.began, second.start, second.seconds["start"]) == (ended.ended, 10, 1)
    assert len(path.read_text().splitlines()) == 3


def test_the_file_stays_short_and_a_full_disk_ends_no_run(tmp_path, clock):
    path = tmp_path / "sessions.jsonl"
    log = SessionLog(path, 0)
    log.now("training")
    for step in range(1, 2500):
        clock.now += 1
        log.alive(step)
    assert len(path.read_text().splitlines()) <= 1001
    (only,) = read_sessions(path)
    assert only.step == 2499 and only.seconds["training"] == 2499
    lost = SessionLog(tmp_path / "gone" / "sessions.jsonl", 0)
    lost.alive(1)
    lost.end("ended")
    assert read_sessions(tmp_path / "gone" / "sessions.jsonl") == []


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "1",
        "{}",
        '{"session": 1}',
        "null",
        '{"session": "a", "began": 1e999, "start": 0, "step": 1, "seconds": {}}',
    ]
    + ['{"session": "a", "began": 1, "start": 0, "step": 1e999, "seconds": {}}', '{"seconds": []}']
    + [json.dumps({"session": "a", "began": 1, "start": 0, "step": 1, "seconds": {"training": "x"}})],
)
def test_a_damaged_line_is_no_session(tmp_path, line):
    path = tmp_path / "sessions.jsonl"
    path.write_text(line + "\n")
    assert read_sessions(path) == []


def test_the_report_shows_the_sessions(tmp_path):
    """By hand: the second session takes 89.5 of the 100 s of the first, and of its bar 49.5 parts are training."""
    (tmp_path / "config.json").write_text("{}")
    lines = [one._asdict() | {"session": f"</script>{number}"} for number, one in enumerate(KILLED)]
    (tmp_path / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (section,) = session_sections(read_run(tmp_path))
    assert section.note.startswith(
        "52.2\u202f% of 3:10 became training that counts (goodput), over 2 starts, with 30.0 s"
    )
    assert section.note.endswith("; 21 steps had to be done again.")
    assert 'width:49.50%" title="training 49.5 s"' in section.body and "script" not in section.body
    assert "start 1: steps 0 to 121<small>1:40, killed or running" in section.body
    assert section.body.count("<tr>") == 7
    page = write_report(tmp_path).read_text()
    assert "Where the time went" in page and ".went li" in page
    (tmp_path / "sessions.jsonl").unlink()
    assert session_sections(read_run(tmp_path)) == []


def test_the_figure_of_the_soak_by_hand():
    """Of 189.5 s and 30 s between the sessions, 51 s are start and compilation: 99 of 168.5 s count."""
    assert figure(KILLED) == pytest.approx(99 / (189.5 + 30 - 51))
