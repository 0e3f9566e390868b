"""The stages of a preparation on many machines, each a callable for one task of it (cluster.prepare lists them)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cluster.config import ClusterConfig
from espalier.errors import UserError
from espalier.files import replacing, write_json

if TYPE_CHECKING:
    from espalier.data.filters import Measure
    from espalier.data.prepare.planning import Plan
    from espalier.data.sources import FileSource, Source
    from espalier.data.store import TokenStore

PARTS = "parts"


def joined_folders(work: Path) -> list[str]:
    """The folders of tokens that the last stage has noted, if they are all there."""
    from espalier.data.store import exists

    try:
        folders = [work.with_name(name) for name in json.loads(_note(work).read_text())]
    except (OSError, ValueError):
        return []
    return [str(folder) for folder in folders] if all(map(exists, folders)) else []


def _note(work: Path) -> Path:
    return work.with_name(f"{work.name}.json")


class Step:
    """A stage: a callable that datatrove runs with the number of its task."""

    title: str
    """What it does, for a line on the terminal."""

    def __init__(self, config: ClusterConfig, work: Path):
        self.config, self.work = config, work

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        raise NotImplementedError


class MeasureFiles(Step):
    """What the filters must know of the documents in this task's files, into a folder of the cache."""

    title = "measuring the documents"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        from espalier.data.documents import documents
        from espalier.data.filters import measure

        for source in _unfiltered(self.config):
            path = _measures(self, source, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = (item.text for item in documents(source.part(rank, world_size)))
            found = [measure(text, self.config.data.filters) for text in texts]
            with replacing(path, "wb") as file:
                _write_measures(file, found)


class Decide(Step):
    """Which documents go, from all measures; and the tokenizer, so that no task trains one."""

    title = "deciding which documents stay, training the tokenizer"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        from espalier.data.filters import Decisions
        from espalier.data.prepare.planning import decisions_path, write_decisions

        if self.config.data.filters.active:
            for source in _unfiltered(self.config):
                path = decisions_path(source, self.config.data)
                if Decisions.load(path) is None:
                    write_decisions(path, self._all(source), self.config.data)
        _plan(self.config)

    def _all(self, source: FileSource) -> Iterator[Measure]:
        for rank in range(self.config.tasks):
            yield from _read_measures(self, source, rank)


class Tokenize(Step):
    """Tokens of this task's files, into stores of their own."""

    title = "tokenizing"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        from espalier.data.prepare.tokens import tokens_folder, write_tokens
        from espalier.data.store import exists

        made = _plan(self.config)
        for side, sources in made.sides.items():
            for name, source in sources.items():
                if exists(tokens_folder(self.config.data, made, side, name)):
                    continue
                part = self._part(source, rank, world_size)
                write_tokens(self.config.data, made, side, name, part, _part_folder(self, made, side, name, rank))

    def _part(self, source: Source, rank: int, ranks: int) -> Source:
        from espalier.data.filters import Decisions
        from espalier.data.sources import FileSource, Filtered, Part

        if isinstance(source, Part):
            return source.of(self._part(source.source, rank, ranks))
        if isinstance(source, Filtered):
            whole = source.source
            assert isinstance(whole, FileSource)
            sizes = [len(_read_measures(self, whole, number)) for number in range(rank + 1)]
            begin, end = sum(sizes[:-1]), sum(sizes)
            chosen = (source.decisions.dropped >= begin) & (source.decisions.dropped < end)
            mine = source.decisions
            decisions = Decisions(mine.dropped[chosen] - begin, mine.reasons[chosen], mine.counts, end - begin)
            return Filtered(whole.part(rank, ranks), decisions, "")
        assert isinstance(source, FileSource)
        return source.part(rank, ranks)


class Join(Step):
    """One store of all parts: their shards move, nothing is copied but the borders of documents."""

    title = "joining the parts"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        from espalier.data.prepare.tokens import check_share, tokens_folder
        from espalier.data.store import REJECTS, TokenStore, exists

        made, joined = _plan(self.config), []
        for side, sources in made.sides.items():
            for name, source in sources.items():
                folder = tokens_folder(self.config.data, made, side, name)
                joined.append(folder.name)
                if exists(folder):
                    continue
                folders = [_part_folder(self, made, side, name, number) for number in range(self.config.tasks)]
                if missing := [part for part in folders if not exists(part)]:
                    raise UserError(
                        f"{missing[0]} is not there; where --data.words segmenter is given, all machines must have the "
                        f"same segmenters (here: {made.words or 'none'})"
                    )
                parts = [TokenStore(part) for part in folders]
                counts = {key: sum(part.manifest[key] for part in parts) for key in ("documents", "tokens", "bytes")}
                counts |= {key: sum(part.manifest[key] for part in parts) for key in ("items", "records")}
                counts |= {
                    key: _added(part.manifest[key] for part in parts) for key in ("rejected", "repaired", "dropped")
                }
                rejects = folder.with_name(f".{folder.name}.joining")
                rejects.mkdir(parents=True, exist_ok=True)
                with (rejects / REJECTS).open("wb") as file:
                    for part in folders:
                        file.write((part / REJECTS).read_bytes())
                check_share(counts, True, self.config.data.max_rejected, f"{side} text of {name}", rejects)
                first = parts[0].manifest
                about = {key: first[key] for key in ("source", "tokenizer", "dtype", "words") if key in first}
                about["filtered"] = getattr(source, "dropped", {})
                _join(rejects, folder, parts, about | counts)
        write_json(_note(self.work), joined)
        shutil.rmtree(self.work / PARTS, ignore_errors=True)


def _join(unfinished: Path, folder: Path, parts: list[TokenStore], manifest: dict) -> None:
    import numpy as np

    from espalier.data.store import OFFSETS, starts_beside, write_manifest

    shards: list[tuple[Path, int]] = []
    with (unfinished / OFFSETS).open("wb") as file:
        file.write(np.int64(0).tobytes())
        begin = 0
        for part in parts:
            file.write((part.offsets[1:] + begin).astype(np.int64).tobytes())
            begin += int(part.offsets[-1])
    for part in parts:
        for shard in part.manifest["shards"]:
            path = unfinished / f"tokens-{len(shards):05}.bin"
            # A hard link, so that a join that is interrupted finds every part whole.
            names = {shard["file"]: path} | ({shard["starts"]: starts_beside(path)} if "starts" in shard else {})
            for file, linked in names.items():
                linked.unlink(missing_ok=True)
                os.link(part.folder / file, linked)
            shards.append((path, shard["tokens"]))
    write_manifest(unfinished, manifest, shards)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, count in one.items():
            total[key] = total.get(key, 0) + count
    return total


def _plan(config: ClusterConfig) -> Plan:
    from espalier.data.prepare.planning import plan

    return plan(config.data, config.vocab_size, for_masked_lm=not config.causal)


def _unfiltered(config: ClusterConfig) -> list[FileSource]:
    """The training sources as they are before filters and split."""
    from espalier.data.prepare.planning import cache_folder
    from espalier.data.sources import Part, open_sources

    train = open_sources(config.data, cache_folder(config.data)).train.values()
    return [source.source if isinstance(source, Part) else source for source in train]  # type: ignore[misc]


def _part_folder(step: Step, made: Plan, side: str, name: str, rank: int) -> Path:
    from espalier.data.prepare.tokens import tokens_folder

    return step.work / PARTS / f"{tokens_folder(step.config.data, made, side, name).name}-{rank:05}"


def _measures(step: Step, source: Source, rank: int) -> Path:
    from espalier.data.prepare.planning import decisions_path

    return step.work / PARTS / decisions_path(source, step.config.data).stem / f"{rank:05}.npz"


def _read_measures(step: Step, source: Source, rank: int) -> list[Measure]:
    """Of the files that a task measured."""
    import numpy as np

    from espalier.data.filters import Measure

    with _measures(step, source, rank).open("rb") as content, np.load(content, allow_pickle=False) as file:
        reasons, exact, near, signatures = (file[name] for name in ("reasons", "exact", "near", "signatures"))
    signed = iter(signatures)
    rows = zip(reasons.tolist(), exact.tolist(), near.tolist(), strict=True)
    return [Measure(reason, text, next(signed) if is_near else None) for reason, text, is_near in rows]


def _write_measures(file: IO[bytes], found: list[Measure]) -> None:
    """reasons uint8 [N], exact uint64 [N], near bool [N]: whether it has a signature; signatures uint32 [those, H]."""
    import numpy as np

    signatures = [one.signature for one in found if one.signature is not None]
    np.savez(
        file,
        reasons=np.array([one.reason for one in found], np.uint8),
        exact=np.array([one.exact for one in found], np.uint64),
        near=np.array([one.signature is not None for one in found], bool),
        signatures=np.stack(signatures) if signatures else np.zeros((0, 0), np.uint32),
    )
