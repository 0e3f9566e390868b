"""Folders that hold a collection of texts beside queries and judgements, in two layouts.

BEIR (Thakur et al. 2021)
    corpus.jsonl        {"_id", "title", "text"}
    queries.jsonl       {"_id", "text"}
    qrels/train.tsv     query-id, corpus-id, score, with these names; also dev.tsv, test.tsv

MS MARCO
    collection.tsv      id, text
    queries.train.tsv   id, text; also .dev, .dev.small, .eval, or queries.tsv alone
    qrels.train.tsv     query, 0, text, relevance; likewise
    top1000.dev.tsv     query, text, what the query says, what the text says; likewise, may be missing

A folder is given, or its file of judgements: FOLDER/qrels/test.tsv. Files may be packed (.gz, .zst).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from espalier.data.storage import open_file
from espalier.data.tables import readable
from espalier.errors import UserError
from espalier.files import sha256_of_file
from finetune.tasks.rank.judged import Judged, Query, grade

SEARCHED = 2**21
"""Texts that BM25 searches at most; of more, --data.run or a top1000 file must say what is ranked."""
PACKINGS = ("", ".gz", ".zst")


def collection_of(path: str) -> tuple[str, Path] | None:
    """("BEIR" or "MS MARCO", the folder) that a folder or a file of judgements belongs to; None where there is none."""
    given = Path(path)
    folders = (given,) if given.is_dir() else (given.parent, given.parent.parent) if _is_qrels(given) else ()
    for folder in folders:
        for name, layout in (("corpus.jsonl", "BEIR"), ("collection.tsv", "MS MARCO")):
            if _packed(folder, name):
                return layout, folder
    if given.is_dir():
        raise UserError(
            f"{path} holds neither corpus.jsonl (BEIR's layout) nor collection.tsv (MS MARCO's); it has "
            f"{', '.join(sorted(os.listdir(given))[:8]) or 'no files'}"
        )
    return None


def read_collection(path: str, part: str, run: str | None) -> Judged:
    """part: "train" or "validation", by which files are chosen. run: what is ranked, as a file."""
    found = collection_of(path)
    assert found
    layout, folder = found
    given = None if Path(path).is_dir() else Path(path)
    beir = layout == "BEIR"
    files = [given or (_beir_qrels(folder, part) if beir else _marco(folder, "qrels", part))]
    judgements = dict(_judgements(files[0]))
    if beir:
        files += [_needed(folder, "queries.jsonl"), _needed(folder, "corpus.jsonl")]
        queries = {name: text for name, text in _objects(files[1]) if name in judgements}
    else:
        files += [_marco(folder, "queries", part, files[0]), _needed(folder, "collection.tsv")]
        queries = {name: text for name, text in _lines(files[1], 2) if name in judgements}
    if missing := sorted(judgements.keys() - queries.keys()):
        raise UserError(f"{files[1]}: the query {missing[0]!r} is not there, which {files[0]} judges texts for")
    candidates = None
    top = Path(run).expanduser() if run else None if beir else _marco_top(folder, part, files[0])
    if top:
        files.append(top)
        candidates = _candidates(top, judgements.keys())
    wanted = None
    if candidates is not None:
        wanted = {name for names in candidates.values() for name in names}
        wanted |= {name for known in judgements.values() for name in known}
    texts = {}
    for name, text in _objects(files[2]) if beir else _lines(files[2], 2):
        if wanted is None or name in wanted:
            texts[name] = text
        if wanted is None and len(texts) > SEARCHED:
            raise UserError(
                f"{files[2]} holds more than {SEARCHED:,} texts, too many for the search here; name a file of what "
                "each query ranks (--data.run, or top1000.*.tsv in the folder), found by another search"
            )
    for place, names in ((files[0], judgements), *(((top, candidates),) if top and candidates else ())):
        if lost := next((name for known in names.values() for name in known if name not in texts), None):
            raise UserError(f"{files[2]}: the text {lost!r} is not there, which {place} names")
    return Judged(
        path=path,
        queries=[
            Query(name, queries[name], known, None if candidates is None else candidates.get(name, []))
            for name, known in judgements.items()
        ],
        texts=texts,
        paired=False,
        facts=(
            f"{path}: {layout}'s layout, judgements of {files[0].name}"
            + (f", texts to rank of {top.name}" if top else "; BM25 finds what a query ranks"),
        ),
        fingerprint=hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest(),
    )


def _is_qrels(path: Path) -> bool:
    return path.is_file() and (path.parent.name == "qrels" or path.name.startswith("qrels"))


def _packed(folder: Path, name: str) -> Path | None:
    return next((path for packing in PACKINGS if (path := folder / (name + packing)).is_file()), None)


def _needed(folder: Path, name: str) -> Path:
    if (found := _packed(folder, name)) is None:
        raise UserError(f"{folder} has no {name}; it has {', '.join(sorted(os.listdir(folder))[:8])}")
    return found


def _beir_qrels(folder: Path, part: str) -> Path:
    for name in ("train",) if part == "train" else ("dev", "validation", "test"):
        if found := _packed(folder / "qrels", f"{name}.tsv"):
            return found
    there = sorted(os.listdir(folder / "qrels")) if (folder / "qrels").is_dir() else []
    raise UserError(
        f"{folder} has no judgements for --data.{part}; qrels/ has {', '.join(there) or 'no files'}: name one of them"
    )


def _marco(folder: Path, kind: str, part: str, beside: Path | None = None) -> Path:
    """The file of a kind for a part. beside: the file of judgements, whose ending another kind shares if it can."""
    there = sorted(path for path in folder.iterdir() if re.match(rf"{kind}\b", path.name) and path.is_file())
    if beside is not None:
        ending = beside.name.removeprefix("qrels")
        if (twin := folder / (kind + ending)) in there:
            return twin
    words = "train" if part == "train" else "dev|val|eval|test"
    fitting = [path for path in there if re.search(words, path.name)]
    fitting = sorted(fitting, key=lambda path: ("small" not in path.name, path.name)) or [
        path for path in there if re.fullmatch(rf"{kind}(\.tsv)?(\.gz|\.zst)?", path.name)
    ]
    if not fitting:
        names = ", ".join(path.name for path in there) or "none"
        raise UserError(f"{folder} has no {kind} for --data.{part}; of {kind} it has {names}")
    return fitting[0]


def _marco_top(folder: Path, part: str, qrels: Path) -> Path | None:
    if not any(path.name.startswith("top1000") for path in folder.iterdir()):
        return None
    try:
        return _marco(folder, "top1000", part, qrels)
    except UserError:
        return None


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, line) of each line that is not empty."""
    with readable(str(path)), open_file(str(path)) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: byte {line[error.start]:#04x} is not valid UTF-8; folders of BEIR and MS MARCO "
                    "are UTF-8"
                ) from error
            if text.strip():
                yield f"{path}:{number}", text.removeprefix("\ufeff") if number == 1 else text


def _lines(path: Path, cells: int) -> Iterator[tuple[str, str]]:
    """The first two of the cells of each line."""
    for place, line in _rows(path):
        found = line.split("\t")
        if len(found) < cells:
            raise UserError(f"{place}: {len(found)} cells, separated by tabs; expected {cells}")
        yield found[0], found[1]


def _objects(path: Path) -> Iterator[tuple[str, str]]:
    """`_id`, and title and text together."""
    for place, line in _rows(path):
        try:
            value = json.loads(line)
            name, text, title = value["_id"], value["text"], value.get("title") or ""
            if not isinstance(text, str) or not isinstance(title, str):
                raise TypeError("the text or the title is no string")
            whole = f"{title} {text}".strip()
            whole.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: half a surrogate pair (\\ud800 …) is no character; remove it") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{place}: no object with _id and text ({error}), as BEIR's files have") from error
        yield str(name), whole


def _judgements(path: Path) -> dict[str, dict[str, int]]:
    """Query → text → grade, of TREC's four cells or BEIR's three."""
    found: dict[str, dict[str, int]] = {}
    for place, line in _rows(path):
        cells = line.split("\t") if "\t" in line else line.split()
        if cells[0] in ("query-id", "query_id", "qid"):
            continue
        if len(cells) not in (3, 4):
            raise UserError(f"{place}: {len(cells)} cells; judgements have query, text, relevance, or TREC's four")
        found.setdefault(cells[0], {})[cells[-2]] = grade(cells[-1], place)
    return found


def _candidates(path: Path, queries) -> dict[str, list[str]]:
    """Query → texts in the order of the file: of a TREC run (six cells) or of MS MARCO (the first two are the ids)."""
    found: dict[str, dict[str, None]] = {}
    for place, line in _rows(path):
        cells = line.split("\t") if "\t" in line else line.split()
        trec = len(cells) == 6 and cells[1].upper() in ("Q0", "0")
        if len(cells) < 2:
            raise UserError(f"{place}: expected a TREC run (query Q0 text rank score name), or query and text by tabs")
        if cells[0] in queries:
            found.setdefault(cells[0], {})[cells[2 if trec else 1]] = None
    if not found:
        raise UserError(f"{path} has none of the queries that are judged; it belongs to other queries")
    return {query: list(texts) for query, texts in found.items()}
