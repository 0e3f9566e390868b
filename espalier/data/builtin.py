"""Text that every Python installation contains: its language reference and the docstrings of its libraries.

Also a labelled task made of it, for the demo: is a sentence in order, or were its words shuffled?

Source files are parsed with `ast`; nothing is imported or executed. Files that cannot be read or parsed, and test
folders, are left out.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from espalier.data.documents import Document
from espalier.errors import UserError
from espalier.files import cache_key, make_folder, replacing, sha256_of_text

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
TOPICS_FILE = "pydoc_data/topics.py"
SEPARATOR = "::"
"""Between file and the name inside it in `Document.name`."""

SENTENCE = re.compile(r"[A-Z][A-Za-z-]*( [A-Za-z][A-Za-z-]*)+\.")
"""Words alone: a comma or a quotation mark that shuffling moves would give a sentence away."""
SENTENCE_WORDS = range(8, 21)
VALIDATION_SENTENCES = 600
VALIDATION_FILE_LIMIT = 60
"""Files with more sentences than this stay in training: one file should not decide the score."""


class DemoTask(NamedTuple):
    """Rows are {"text": …, "label": "in order" or "shuffled"}, as many of each.

    No validation row is from a file that training or pretraining reads, nor does their text hold its sentence.
    """

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    validation_files: frozenset[str]


class BuiltinSource:
    """The text of `documents` as a source (data.sources.Source).

    cache: folder where what was parsed is kept, which takes three seconds for "pydoc"; None = nowhere.
    """

    def __init__(self, name: str, exclude: frozenset[str] = frozenset(), cache: pathlib.Path | None = None):
        self.name, self.exclude, self.cache = name, exclude, cache

    def __iter__(self) -> Iterator[Document]:
        # The packages may be more than fits the memory at once.
        if self.cache is None or self.name != "pydoc":
            return documents(self.name, self.exclude)
        return iter(self._kept)

    @functools.cached_property
    def _kept(self) -> list[Document]:
        """All documents, parsed once for each state of the files and version of Python."""
        assert self.cache is not None
        path = self.cache / f"builtin-{cache_key(self.fingerprint(), sys.version)}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            checksum, _, text = path.read_text("utf-8").partition("\n")
            if checksum == sha256_of_text(text):
                return [Document(*pair) for pair in json.loads(text)]
        found = list(documents(self.name, self.exclude))
        text = json.dumps(found, ensure_ascii=False)
        with contextlib.suppress(OSError):
            make_folder(path.parent)
            with replacing(path) as file:
                file.write(f"{sha256_of_text(text)}\n{text}")
        return found

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


def sentences() -> dict[str, str]:
    """Sentence → its file, for the plain sentences in the standard library's docstrings, in a fixed order.

    A sentence that stands in several files is left out, so that none is on both sides of a split by files.
    """
    found: dict[str, str] = {}
    repeated = set()
    root = standard_library()
    for file in source_files(root):
        for _, text in docstrings(root / file):
            for paragraph in re.split(r"\n\s*\n", text):
                for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                    plain = SENTENCE.fullmatch(sentence) and len(sentence.split()) in SENTENCE_WORDS
                    if plain and found.setdefault(sentence, file) != file:
                        repeated.add(sentence)
    return {sentence: file for sentence, file in found.items() if sentence not in repeated}


def demo_task(seed: int, train_count: int) -> DemoTask:
    """Are the words of a sentence in order, or shuffled? train_count sentences to learn from, drawn by seed.

    After the probing tasks for word order of Conneau et al. 2018, made coarser: half of the sentences are shuffled as
    a whole. Both classes use the same words, so only word order tells them apart. The validation part depends on the
    Python version alone, so that one pretraining serves every seed.
    """
    file_of = sentences()
    counts = Counter(file_of.values())
    files: set[str] = set()
    for file in sorted(counts, key=_hash):
        if counts[file] <= VALIDATION_FILE_LIMIT and sum(counts[name] for name in files) < VALIDATION_SENTENCES:
            files.add(file)
    learnt = [sentence for sentence, file in file_of.items() if file not in files]
    judged = [sentence for sentence, file in file_of.items() if file in files]
    # A sentence may also stand inside another one, or in the language reference.
    elsewhere = "\n".join(" ".join(document.text.split()) for document in documents("pydoc", frozenset(files)))
    judged = [sentence for sentence in judged if sentence not in elsewhere]
    if len(judged) < VALIDATION_SENTENCES // 2:
        raise UserError(f"{standard_library()} holds too few docstrings for the demo; use a Python with its sources")
    if train_count > len(learnt):
        raise UserError(f"{train_count} labelled sentences are too many; there are {len(learnt)}")
    return DemoTask(
        _half_shuffled(learnt, train_count, f"train {seed}"),
        _half_shuffled(judged, len(judged), "validation"),
        frozenset(files),
    )


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


def _half_shuffled(sentences: list[str], count: int, salt: str) -> list[dict[str, str]]:
    """`count` of the sentences in a random order, every second one shuffled. Hashes decide, because they are the same
    in every version of Python."""
    drawn = sorted(sentences, key=lambda sentence: _hash(f"{salt} {sentence}"))[:count]
    return [
        {"text": _shuffled(text), "label": "shuffled"} if number % 2 else {"text": text, "label": "in order"}
        for number, text in enumerate(drawn)
    ]


def _shuffled(sentence: str) -> str:
    """The words in another order, again with a capital at the start and a full stop at the end."""
    words = sentence.removesuffix(".").split()
    if words[0][1:] == words[0][1:].lower():
        words[0] = words[0].lower()
    mixed = words
    salt = 0
    while mixed == words:
        mixed = [word for _, word in sorted((_hash(f"{salt} {i} {sentence}"), word) for i, word in enumerate(words))]
        salt += 1
    return f"{mixed[0][0].upper()}{mixed[0][1:]} {' '.join(mixed[1:])}."


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
