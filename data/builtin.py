"""Text that every Python installation holds: its language reference and the docstrings of its libraries.

Also a labelled task made of it, for the demo: which topic is a docstring about?

Source files are parsed with `ast`; nothing is imported or executed. Files that cannot be read or parsed, and test
folders, are left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import pathlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cli import UserError

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
TOPICS_FILE = "pydoc_data/topics.py"
SEPARATOR = "::"
"""Between file and the name inside it in `Document.name`."""

TOPICS = {
    "asyncio": ("asyncio",),
    "gui": ("tkinter", "turtle", "turtledemo", "idlelib"),
    "mail": ("email", "mailbox", "imaplib", "poplib", "smtplib", "nntplib"),
    "files": (
        *("pathlib", "shutil", "tarfile", "zipfile", "tempfile", "glob", "gzip", "bz2", "lzma", "fileinput", "filecmp"),
        *("fnmatch", "os", "_pyio", "posixpath", "ntpath", "genericpath"),
    ),
    "numbers": (
        *("decimal", "_pydecimal", "fractions", "statistics", "random", "numbers", "datetime", "_pydatetime"),
        "calendar",
    ),
    "testing": ("unittest", "doctest", "pdb", "bdb", "trace", "timeit", "cProfile", "profile", "pstats"),
    "imports": ("importlib", "pkgutil", "zipimport", "runpy", "modulefinder", "zipapp"),
    "xml": ("xml",),
    "web": ("http", "urllib", "wsgiref", "xmlrpc", "socketserver", "ftplib", "html", "cgi", "webbrowser", "ssl"),
}
"""Topic → top-level modules. The task takes the first TOPIC_COUNT with enough text: some systems lack tkinter."""
TOPIC_COUNT = 6
MIN_CHARACTERS = 40
VALIDATION_PER_TOPIC = 80
VALIDATION_FILE_LIMIT = 60
"""Files with more docstrings than this stay in training: one file should not decide a topic's score."""


class Document(NamedTuple):
    """A text that is a whole by itself, and where it is from (`file`, `file:line` or `file::name`)."""

    text: str
    name: str


class LabelledDocstring(NamedTuple):
    """A docstring, the topic of its module, and its file in the standard library."""

    text: str
    label: str
    file: str


class DemoTask(NamedTuple):
    """Rows are {"text": …, "label": …}; no validation row is from a file that training or pretraining reads."""

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    validation_files: frozenset[str]


class BuiltinSource:
    """The text of `documents` as a source (data.sources.Source)."""

    def __init__(self, name: str, exclude: frozenset[str] = frozenset()):
        self.name, self.exclude = name, exclude

    def __iter__(self) -> Iterator[Document]:
        return documents(self.name, self.exclude)

    def fingerprint(self) -> str:
        """Over the source files themselves: hashing is ten times faster than parsing."""
        digest = hashlib.sha256(f"builtin 1 {self.name}".encode())
        for prefix, root in _roots(self.name):
            for relative in source_files(root):
                name = prefix + relative
                if name not in self.exclude:
                    digest.update(name.encode())
                    digest.update(hashlib.sha256(_read(root / relative)).digest())
        return digest.hexdigest()

    def size(self) -> int | None:
        return None


def documents(name: str, exclude: frozenset[str] = frozenset()) -> Iterator[Document]:
    """Documents of the built-in text `name`, in a fixed order.

    "pydoc": each topic of Python's language reference, then each file of the standard library: its docstrings, joined
    by blank lines. "packages": the same of the installed packages, too.
    exclude: files (paths relative to the library's root, e.g. "email/message.py") to leave out.
    """
    for prefix, root in _roots(name):
        if not prefix and TOPICS_FILE not in exclude:
            yield from _topics(root / TOPICS_FILE)
        for relative in source_files(root):
            if prefix + relative not in exclude:
                text = "\n\n".join(text for _, text in docstrings(root / relative))
                if text.strip():
                    yield Document(text, prefix + relative)


def labelled() -> list[LabelledDocstring]:
    """All docstrings of the topics' modules, in a fixed order, without the short ones.

    The names of these modules are replaced by the word "module" wherever they stand, in texts of every topic: the
    task is to understand what a text is about, not to find the name of its package in it. A text that stands in several
    files is left out, so that none is on both sides of a split by files.
    """
    topic_of = {module: topic for topic, modules in TOPICS.items() for module in modules}
    names = re.compile(rf"(?<![a-z])({'|'.join(sorted(topic_of, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
    root = standard_library()
    found: dict[str, LabelledDocstring] = {}
    repeated = set()
    for file in source_files(root):
        topic = topic_of.get(file.split("/")[0].removesuffix(".py"))
        if topic is None:
            continue
        for _, text in docstrings(root / file):
            if len(text) >= MIN_CHARACTERS:
                masked = names.sub("module", text)
                if found.setdefault(masked, LabelledDocstring(masked, topic, file)).file != file:
                    repeated.add(masked)
    return [row for row in found.values() if row.text not in repeated]


def demo_task(seed: int, train_per_class: int) -> DemoTask:
    """Few labelled docstrings to learn from, drawn by seed, and a few hundred of other files to be judged by.

    The validation part depends on the Python version alone, so that one pretraining serves every seed: each topic gives
    VALIDATION_PER_TOPIC docstrings of files drawn by the hash of their names.
    """
    by_topic: dict[str, list[LabelledDocstring]] = {topic: [] for topic in TOPICS}
    for row in labelled():
        by_topic[row.label].append(row)

    train, validation, files = [], [], set()
    chosen = 0
    for topic, rows in by_topic.items():
        held_out = _validation_files(rows)
        judged = [row for row in rows if row.file in held_out]
        learnt = [row for row in rows if row.file not in held_out]
        if chosen == TOPIC_COUNT or len(judged) < VALIDATION_PER_TOPIC or len(learnt) < VALIDATION_PER_TOPIC:
            continue
        if train_per_class > len(learnt):
            raise UserError(f"{train_per_class} labelled docstrings a class are too many; {topic} has {len(learnt)}")
        chosen += 1
        files |= held_out
        train += _drawn(learnt, train_per_class, f"train {seed}")
        validation += _drawn(judged, VALIDATION_PER_TOPIC, "validation")
    if chosen < 2:
        raise UserError(f"{standard_library()} holds too few docstrings for the demo; use a Python with its sources")
    parts = (
        [{"text": row.text, "label": row.label} for row in _drawn(rows, len(rows), f"order {seed}")]
        for rows in (train, validation)
    )
    return DemoTask(*parts, validation_files=frozenset(files))


def docstrings(path: pathlib.Path) -> list[tuple[str, str]]:
    """(qualified name, docstring) of the module and all classes and functions in it, in the order of the file."""
    return list(_docstrings(str(path)))


def source_files(root: pathlib.Path) -> list[str]:
    """Relative paths of all .py files under root, sorted, without the folders of tests."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        base = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(base, name)) for name in files if name.endswith(".py")]
    return sorted(path.replace(os.sep, "/") for path in found)


def standard_library() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def corpus_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over texts and names, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def _validation_files(rows: list[LabelledDocstring]) -> set[str]:
    """Files in the order of their names' hashes, until they hold enough of these docstrings."""
    counts = Counter(row.file for row in rows)
    chosen: set[str] = set()
    for file in sorted(counts, key=_hash):
        if counts[file] <= VALIDATION_FILE_LIMIT and sum(counts[name] for name in chosen) < VALIDATION_PER_TOPIC:
            chosen.add(file)
    return chosen


def _drawn(rows: list[LabelledDocstring], count: int, salt: str) -> list[LabelledDocstring]:
    """`count` of the rows in a random order; by hashes, which no version of Python draws differently."""
    return sorted(rows, key=lambda row: _hash(f"{salt} {row.text}"))[:count]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _roots(name: str) -> list[tuple[str, pathlib.Path]]:
    assert name in ("pydoc", "packages"), name
    roots = [("", standard_library())]
    if name == "packages":
        roots.append(("site-packages/", pathlib.Path(sysconfig.get_path("purelib"))))
    return roots


def _topics(path: pathlib.Path) -> Iterator[Document]:
    """The language reference: pydoc's dictionary of topics, read as a literal."""
    tree = _parse(path)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield Document(_encodable(text), f"{TOPICS_FILE}{SEPARATOR}{topic}")


# Several passes read the same files (tokenizer, tokens, the demo's task), and parsing is the slow part.
@functools.cache
def _docstrings(path: str) -> tuple[tuple[str, str], ...]:
    tree = _parse(pathlib.Path(path))
    return tuple(_walk(tree, "")) if tree else ()


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, _encodable(text)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _walk(child, name)


def _parse(path: pathlib.Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(_read(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _encodable(text: str) -> str:
    """Docstrings may spell lone surrogates, which no encoding of Unicode holds."""
    return text.encode("utf-8", "replace").decode()
