"""Text of the Python installation, and the demo's task made of it."""

import collections
import re

import pytest

import espalier.data.builtin
from espalier.data.builtin import BuiltinSource, demo_task, docstrings, documents, sentences
from espalier.errors import UserError

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
    monkeypatch.setattr(espalier.data.builtin, "standard_library", lambda: tmp_path)
    monkeypatch.setattr(espalier.data.builtin.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    return tmp_path


def test_what_was_parsed_is_kept_until_the_files_change(library, tmp_path, monkeypatch):
    def read() -> list:
        return list(BuiltinSource("pydoc", cache=tmp_path / "cache"))

    first = read()
    assert first == list(documents("pydoc"))
    monkeypatch.setattr(espalier.data.builtin, "documents", lambda *_: pytest.fail("parsed again"))
    assert read() == first
    monkeypatch.undo()
    monkeypatch.setattr(espalier.data.builtin, "standard_library", lambda: library)
    monkeypatch.setattr(espalier.data.builtin.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(kept.read_text().replace("First", "Last"))
    assert read() == first
    (library / "c.py").write_text('"""Third."""')
    assert [text for text, _ in read()] == [text for text, _ in first] + ["Third."]


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
        demo_task(0, 100)


def test_the_real_text_is_large_and_stable():
    found = list(documents("pydoc"))
    assert sum(len(document.text) for document in found) > 1_500_000
    assert len({document.name for document in found}) == len(found) > 300
    assert not any(re.search(r"(^|/)(test|tests|idle_test|site-packages)/", document.name) for document in found)
    assert found == list(documents("pydoc"))


def test_demo_task_is_balanced_and_leaks_nothing():
    task = demo_task(seed=0, train_count=1000)
    assert collections.Counter(row["label"] for row in task.train) == {"in order": 500, "shuffled": 500}
    judged = collections.Counter(row["label"] for row in task.validation)
    assert judged.total() >= 300 and abs(judged["in order"] - judged["shuffled"]) <= 1

    file_of = {words(sentence): file for sentence, file in sentences().items()}
    assert all(file_of[words(row["text"])] in task.validation_files for row in task.validation)
    assert not any(file_of[words(row["text"])] in task.validation_files for row in task.train)
    # Nor does the text that a model is pretrained on hold a judged sentence.
    found = list(documents("pydoc", task.validation_files))
    assert not any(document.name in task.validation_files for document in found)
    whole = " ".join(" ".join(document.text.split()) for document in found)
    assert not any(row["text"] in whole for row in task.validation)


def words(text):
    """What shuffling keeps."""
    return tuple(sorted(text.removesuffix(".").lower().split()))


def test_demo_task_shuffles_words_and_nothing_else():
    task = demo_task(0, 200)
    originals = sentences()
    known = {words(sentence) for sentence in originals}
    for row in task.train + task.validation:
        assert (row["text"] in originals) == (row["label"] == "in order") and words(row["text"]) in known
        assert re.fullmatch(r"[A-Z][A-Za-z -]+\.", row["text"]) and 8 <= len(row["text"].split()) <= 20


def test_demo_task_depends_on_the_seed_in_training_only():
    first, again, other = demo_task(0, 80), demo_task(0, 80), demo_task(1, 80)
    assert first == again
    assert first.validation_files == other.validation_files and first.validation == other.validation
    assert {words(row["text"]) for row in first.train} != {words(row["text"]) for row in other.train}
    # More labels are the same labels and others.
    assert first.train == demo_task(0, 160).train[:80]


def test_demo_task_says_how_many_there_are():
    with pytest.raises(UserError, match=r"100000 labelled sentences are too many; there are \d+"):
        demo_task(0, 100_000)
