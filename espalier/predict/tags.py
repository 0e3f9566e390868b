"""Entities in sequences of tags, as conlleval and strictly. Imports nothing heavy.

A tag is O, or a prefix and a type: B-person. Prefixes are those of IOB1 and IOB2 (Ramshaw & Marcus 1995), IOE2, and
IOBES; BMES and BILOU are IOBES by other letters (M for I, L for E, U and W for S). Without types (B, I, O), the type
is "_". `entities` takes any sequence, well formed or not, as conlleval.pl does (CoNLL-2000), which published tables
are made with; `strict_entities` takes only what follows a scheme. Both agree with seqeval, whose default is the first
(chakki-works/seqeval#57 shows where they differ).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

CANONICAL = {"B": "B", "I": "I", "E": "E", "S": "S", "M": "I", "L": "E", "U": "S", "W": "S"}
"""Prefixes, by those of IOBES."""
TYPED, BARE = re.compile(r"[BIESMLUW]-.+", re.DOTALL), re.compile(r"[BIESMLUW]")
NO_TYPE = "_"


class Entity(NamedTuple):
    type: str
    begin: int
    """Its first tag."""
    end: int
    """Behind its last tag."""


def split(tag: str) -> tuple[str, str]:
    """Prefix (by those of IOBES, or O) and type."""
    return ("O", "") if tag == "O" else (CANONICAL[tag[0]], tag[2:] or NO_TYPE)


def entities(tags: Sequence[str]) -> list[Entity]:
    """What conlleval takes for entities: a change of type begins one, and so does an I or E behind O, E or S."""
    found, begin = [], 0
    before, type_before = "O", ""
    for at, (prefix, kind) in enumerate([*map(split, tags), ("O", "")]):
        changed = kind != type_before
        if before != "O" and (changed or before in "ES" or prefix in "BSO"):
            found.append(Entity(type_before, begin, at))
        if prefix != "O" and (changed or prefix in "BS" or before in "OES"):
            begin = at
        before, type_before = prefix, kind
    return found


def strict_entities(tags: Sequence[str], scheme: str) -> list[Entity]:
    """Only entities that are written as the scheme demands: "IOB2", "IOBES" or "IOB1"."""
    parts = [*map(split, tags), ("O", "")]
    found, at, before = [], 0, ("O", "")
    while at < len(tags):
        if not _begins(scheme, before, parts[at]):
            before, at = parts[at], at + 1
            continue
        begin, at = at, at + 1
        while _goes_on(parts[at - 1], parts[at]):
            at += 1
        if _ends(scheme, parts[at - 1], parts[at]):
            found.append(Entity(parts[begin][1], begin, at))
        before = parts[at - 1]
    return found


def scheme_of(sequences: Iterable[Sequence[str]]) -> str | None:
    """ "IOB2", "IOB1", "IOE2" or "IOBES" by how the tags are used; None where they are no tags of entities."""
    sequences = list(sequences)
    names = {tag for tags in sequences for tag in tags} - {"O"}
    if not names or not (all(map(TYPED.fullmatch, names)) or (all(map(BARE.fullmatch, names)) and "B" in names)):
        return None
    prefixes = {split(name)[0] for name in names}
    if "S" in prefixes or {"B", "E"} <= prefixes:
        return "IOBES"
    if "E" in prefixes:
        return "IOE2"
    # In IOB1, B separates an entity from one of its type before it, and stands nowhere else.
    needless = wanting = 0
    for tags in sequences:
        before = ("O", "")
        for part in map(split, tags):
            separates = before[0] != "O" and before[1] == part[1]
            needless += part[0] == "B" and not separates
            wanting += part[0] == "I" and not separates
            before = part
    return "IOB1" if wanting > needless else "IOB2"


def is_of_entity(tag: str) -> bool:
    """Whether it has a prefix, with a type or without; O has not."""
    return bool(TYPED.fullmatch(tag) or BARE.fullmatch(tag))


def types_of(names: Iterable[str]) -> list[str]:
    """The types of entities that tags have, sorted."""
    return sorted({split(name)[1] for name in names if name != "O"})


def _begins(scheme: str, before: tuple[str, str], here: tuple[str, str]) -> bool:
    if scheme == "IOB1":
        same = before[1] == here[1]
        if here[0] == "B":
            return before[0] in "BI" and same
        return here[0] == "I" and (before[0] in "OB" or not same)
    return here[0] in ("B" if scheme == "IOB2" else "BS")


def _goes_on(before: tuple[str, str], here: tuple[str, str]) -> bool:
    return before[0] in "BI" and here[0] in "IE" and before[1] == here[1]


def _ends(scheme: str, last: tuple[str, str], behind: tuple[str, str]) -> bool:
    if scheme == "IOBES":
        return last[0] in "ES"
    # Behind a B, IOB1 has no B of another type.
    return scheme == "IOB2" or not (last[0] == behind[0] == "B" and last[1] != behind[1])
