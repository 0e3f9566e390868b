"""What config.json remembers of code of the user's own: enough to tell it from other code, and no more."""

import functools
import hashlib
import importlib.util
import json
import os

import numpy as np
import pytest

from espalier import user_code
from espalier.data.config import DataConfig
from espalier.data.records import Record
from espalier.data.tables import _of_records
from espalier.errors import UserError
from espalier.pretraining.objective import perplexity
from espalier.pretraining.text import own_code
from espalier.training import run as runs
from espalier.training.run import RunDirectory
from espalier.training.tracker import Tracker
from mlm.presets import debug
from mlm.record import MASKED_LM

MINE = """
import functools

STEPS, SCALE = 2000, 2.0
TABLE = object()

def helper(value):
    return value * SCALE

def wrapped(function):
    @functools.wraps(function)
    def around(*given):
        return function(*given)
    return around

def plain(setup, weight=1.0):
    def loss(params):
        return helper(params.STEPS) * weight
    return loss

@wrapped
def decorated(setup):
    return plain(setup)

def made(weight):
    def objective(setup):
        return weight * plain(setup)
    return objective

if __name__ == "__main__":
    print(plain, STEPS)
"""


def module(path, source):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    "change, same",
    [
        (("print(plain, STEPS)", "print(made)"), True),  # the script around it
        (("STEPS, SCALE = 2000", "STEPS, SCALE = 4000"), True),  # an attribute's name is no variable
        (("SCALE = 2000, 2.0", "SCALE = 2000, 3.0"), False),  # a value that a helper reads, in a function inside
        (("return value * SCALE", "return value + SCALE"), False),
        (("weight=1.0", "weight=0.5"), False),
        (("return function(*given)", "return 2 * function(*given)"), False),  # what wraps it
    ],
)
def test_a_function_is_known_by_what_it_does_not_by_its_file(tmp_path, change, same):
    before, after = module(tmp_path / "one.py", MINE), module(tmp_path / "two.py", MINE.replace(*change))
    found = [user_code.recorded(which.decorated) for which in (before, after)]
    assert found[0]["name"] == found[1]["name"] == "decorated" and found[0]["file"] == str(tmp_path / "one.py")
    assert (found[0]["sha256"] == found[1]["sha256"]) == same


def test_arguments_and_values_around_a_function_count(tmp_path):
    mine = module(tmp_path / "mine.py", MINE)
    partial = functools.partial(mine.plain, weight=1e-4)
    assert user_code.recorded(partial)["name"] == "plain(weight=0.0001)"
    sums = [user_code.recorded(one)["sha256"] for one in (partial, functools.partial(mine.plain, weight=1e-3))]
    sums += [user_code.recorded(mine.made(weight))["sha256"] for weight in (1e-4, 1e-3)]
    assert len(set(sums)) == 4 and user_code.recorded(mine.made(1e-3))["sha256"] == sums[-1]
    for what in (functools.partial(mine.plain, np.zeros(2)), mine.made(object()), functools.partial, max):
        with pytest.raises(UserError, match="could not tell whether it is the same") as error:
            user_code.recorded(what)
        assert "\n" not in str(error.value)


def test_an_edited_file_is_run_anew_and_its_sum_is_of_what_was_run(tmp_path):
    """Within one process, as in a notebook; also where size and time stamp stay."""
    path, given = tmp_path / "own.py", f"{tmp_path}/own.py:scale"
    sums = []
    for value in (1, 2):
        path.write_text(f"def scale(x):\n    return {value} * x\n")
        os.utime(path, (1e9, 1e9))
        assert user_code.load(given) is user_code.load(given)
        assert user_code.function(given, "scale(x)")(10) == 10 * value
        sums.append(user_code.recorded(given)["sha256"])
        assert sums[-1] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sums[0] != sums[1]


def test_two_texts_of_one_name_are_both_remembered(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(f"def texts():\n    return ['{name}']\n")
    config = debug()
    given = tuple(f"{name}=python:{tmp_path / name}.py:texts" for name in "ab")
    found = own_code(MASKED_LM, type(config)(data=DataConfig(files=(), sources=given)))
    assert [(what, code["file"][-4:]) for what, code in found.items()] == [
        ("text texts", "a.py"),
        ("text texts (2)", "b.py"),
    ]


def test_processes_may_have_the_code_in_different_places(monkeypatch):
    def start(first, here):
        monkeypatch.setattr(runs, "from_first", lambda what, value, wait: first_of(first))
        monkeypatch.setattr(runs, "gather", lambda what, value, wait: [[], value])
        runs._check_same_everywhere(here)

    def first_of(config):
        return runs.without(config, runs.HOST_FIELDS, runs.USER_CODE_FIELDS | {"user_code.objective.file"})

    def host(place, sha):
        code = {"objective": {"file": f"{place}/my.py", "name": "z", "sha256": sha}}
        return {"objective": f"{place}/my.py:z", "user_code": code}

    start(host("/a", "1"), host("/b", "1"))
    with pytest.raises(UserError, match="user_code.objective.sha256"):
        start(host("/a", "1"), host("/b", "2"))


def test_an_evaluation_without_a_loss_is_known_on_resume(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text(json.dumps({"step": 4, "eval/f1": 0.5}) + "\n")
    tracker = Tracker(run, total_steps=8, start_step=4, last_step=8)
    assert tracker.has_evaluation(4) and perplexity({"f1": 0.5}) == {"f1": 0.5}
    tracker.close()


@pytest.mark.parametrize("text, problem", [("caf\udce9", "bytes that are not UTF-8"), ("\ud83d!", "surrogate pair")])
def test_a_broken_cell_is_called_what_it_is(text, problem):
    with pytest.raises(UserError, match=problem):
        _of_records("tfds:x", [Record("tfds:x:1", ["text"], [text])], ())
