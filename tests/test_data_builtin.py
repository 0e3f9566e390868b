"""Text of the Python installation, and the demo's task made of it."""

import collections
import re

import pytest

import data.builtin
from cli import UserError
from data.builtin import TOPICS, BuiltinSource, corpus_hash, demo_task, docstrings, documents, labelled

MODULE = '''"""About the module."""
raise SystemExit("this file was executed")

class A:
    """About A."""
    def method(self):
        """About the method.

            Indented."""
        def inner():
            """About inner."""
    if True:
        async def other(self): "About other."

def bare(): pass
try:
    def tried(): """About \\ud800 tried."""
except Exception:
    def excepted(): """About excepted."""
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library."""
    files = {
        "b.py": MODULE,
        "a/__init__.py": '"""First."""',
        "a/empty.py": "x = 1",
        "a/broken.py": "def (",
        "a/nul.py": "\0",
        "test/t.py": '"""A test."""',
        "a/tests/t.py": '"""A test."""',
        "idlelib/idle_test/t.py": '"""A test."""',
        "site-packages/p.py": '"""A package."""',
        "pydoc_data/topics.py": "topics = {'assert': 'The statement', 'if': r'''Another \\d'''}\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(data.builtin, "standard_library", lambda: tmp_path)
    monkeypatch.setattr(data.builtin.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    return tmp_path


def test_docstrings_in_order_without_running_anything(library):
    assert docstrings(library / "b.py") == [
        ("", "About the module."),
        ("A", "About A."),
        ("A.method", "About the method.\n\nIndented."),
        ("A.method.inner", "About inner."),
        ("A.other", "About other."),
        ("tried", "About ? tried."),
        ("excepted", "About excepted."),
    ]


def test_documents(library):
    found = list(documents("pydoc"))
    assert [document.name for document in found] == [
        "pydoc_data/topics.py::assert",
        "pydoc_data/topics.py::if",
        "a/__init__.py",
        "b.py",
    ]
    assert found[1].text == "Another \\d"
    assert found[3].text.startswith("About the module.\n\nAbout A.\n\n")
    assert [document.name for document in documents("packages")][4:] == ["site-packages/p.py"]
    assert [document.name for document in documents("pydoc", frozenset({"b.py", "pydoc_data/topics.py"}))] == [
        "a/__init__.py"
    ]


def test_fingerprint_follows_the_files_that_are_read(library):
    everything, some = BuiltinSource("pydoc"), BuiltinSource("pydoc", frozenset({"b.py"}))
    before = everything.fingerprint(), some.fingerprint()
    assert before[0] != before[1]
    (library / "test" / "t.py").write_text('"""Another test."""')
    assert (everything.fingerprint(), some.fingerprint()) == before
    (library / "b.py").write_text('"""Changed."""')
    assert everything.fingerprint() != before[0] and some.fingerprint() == before[1]


def test_a_library_without_sources(library):
    with pytest.raises(UserError, match="too few docstrings"):
        demo_task(0, 16)


def test_the_real_text_is_large_and_stable():
    found = list(documents("pydoc"))
    assert sum(len(document.text) for document in found) > 1_500_000
    assert len({document.name for document in found}) == len(found) > 300
    assert not any(re.search(r"(^|/)(test|tests|idle_test|site-packages)/", document.name) for document in found)
    assert corpus_hash(found) == corpus_hash(documents("pydoc")) != corpus_hash(found[1:])


def test_demo_task_is_balanced_and_leaks_nothing():
    task = demo_task(seed=0, train_per_class=16)
    counts = collections.Counter(row["label"] for row in task.train)
    assert set(counts.values()) == {16} and len(counts) == 6
    judged = collections.Counter(row["label"] for row in task.validation)
    assert judged.keys() == counts.keys() and set(judged.values()) == {80}

    file_of = {row.text: row.file for row in labelled()}
    assert all(file_of[row["text"]] in task.validation_files for row in task.validation)
    assert not any(file_of[row["text"]] in task.validation_files for row in task.train)
    # Nor does the text that a model is pretrained on hold a judged docstring.
    whole = "\n".join(document.text for document in documents("pydoc", task.validation_files))
    assert not any(row["text"] in whole for row in task.validation if len(row["text"]) > 120)
    assert not any(document.name in task.validation_files for document in documents("pydoc", task.validation_files))


def test_demo_task_names_no_package_and_nothing_short():
    names = re.compile(rf"(?<![a-z])({'|'.join(name for names in TOPICS.values() for name in names)})(?![a-z])", re.I)
    assert not [row.text for row in labelled() if names.search(row.text) or len(row.text) < 34]


def test_demo_task_depends_on_the_seed_in_training_only():
    first, again, other = demo_task(0, 8), demo_task(0, 8), demo_task(1, 8)
    assert first == again
    assert first.validation_files == other.validation_files
    by_text = [sorted(row["text"] for row in task.validation) for task in (first, other)]
    assert by_text[0] == by_text[1]
    assert {row["text"] for row in first.train} != {row["text"] for row in other.train}
    # More labels are the same labels and others.
    assert {row["text"] for row in first.train} < {row["text"] for row in demo_task(0, 16).train}


def test_demo_task_says_how_many_there_are():
    with pytest.raises(UserError, match=r"100000 labelled docstrings a class are too many; asyncio has \d+"):
        demo_task(0, 100_000)
