"""safetensors files, read as views on the memory-mapped file and written in shards; nothing else is ever opened.

A file from outside is data, not code: a pickle is recognised by its content, whatever its name, and refused.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from espalier.errors import MachineError, UserError
from espalier.files import inside

DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a folder's safetensors files by name, as read-only views; only what is read is loaded.

    Raises UserError where the files are missing, pickles, or inconsistent.
    """

    def __init__(self, folder: Path):
        self._views: dict[str, np.ndarray] = {}
        for path in _files(folder):
            views = open_file(path)
            twice = sorted(views.keys() & self._views.keys())
            if twice:
                raise UserError(f"{path} holds tensors that another file has too: {', '.join(twice)}; keep one of them")
            self._views |= views
        index = folder / INDEX
        if index.is_file() and not (folder / SINGLE).is_file():
            listed = _index(index)
            absent = sorted(name for name in listed if name not in self._views)
            if absent:
                raise UserError(
                    f"{index} lists tensors that no file holds: {', '.join(absent[:8])}; copy the files again"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self):
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: str, shard_bytes: int) -> None:
    """Write model.safetensors, or several files with an index; each tensor cast to dtype.

    shard_bytes: tensors of a file together, unless it is a single one. UserError for a value that dtype cannot hold.
    """
    cast = DTYPES[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]]
    shards: list[list[str]] = []
    shard: dict[str, Any] = {}
    total = size = 0

    def flush() -> None:
        write_file(folder / f"{len(shards)}.unfinished", shard)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        with np.errstate(over="ignore"):
            array = tensor.astype(cast, copy=False)
        if not np.isfinite(array).all() and np.isfinite(tensor).all():
            raise UserError(f"{name} has values up to {np.abs(tensor).max():.3g}, too large for {dtype}; take bfloat16")
        if shard and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.unfinished").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.unfinished").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one file."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, above all
        raise MachineError(f"the weights could not be written to {path.parent.parent}: {error}") from error


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = sorted(set(_index(folder / INDEX).values()))
        for name in names:
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                raise UserError(f"{folder / INDEX} names the file {name!r}; only .safetensors files beside it are read")
            if not inside(folder, name, folder / INDEX).is_file():
                raise UserError(f"{folder / INDEX} names {name}, which is not there; copy the folder as a whole")
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.iterdir() if path.is_file() and _is_pickle(path))
    if pickles:
        raise UserError(
            f"{folder} has its weights as a pickle ({pickles[0]}), which can run arbitrary code when it is opened; "
            "if you trust them, convert them: AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise UserError(
        f"{folder} has no {SINGLE} and no {INDEX}; a repository that holds only pickles (.bin, .pt) must be converted, "
        "if you trust it: AutoModel.from_pretrained(NAME).save_pretrained(FOLDER)"
    )


def _index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert listed and all(isinstance(file, str) for file in listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise UserError(f"{path} is not a tensor index ({error}); copy the folder again") from None
    return listed


def _is_pickle(path: Path) -> bool:
    """By content: PyTorch's zip files of pickles, bare pickles, and old tar files."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
        return False  # safetensors, whose header may have any length
    zipped = start.startswith(b"PK\x03\x04") and path.suffix not in (".zip", ".docx", ".xlsx", ".npz")
    return zipped or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05") or start[257:262] == b"ustar"


def open_file(path: Path) -> dict[str, np.ndarray]:
    """Views of a file's tensors; UserError where the file is not what it should be."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    if _is_pickle(path):
        raise UserError(f"{path} is a pickle, whatever its name; only safetensors are read")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is truncated: its header should have {length:,} bytes and the file has {size:,}")
        header = file.read(length)
        try:
            # The library checks that the header is valid and covers the file exactly.
            with safe_open(path, "np"):
                entries = json.loads(header)
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path} is not a valid safetensors file: {error}; copy it again") from None
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[8 + length :]
    entries.pop("__metadata__", None)
    views = {}
    for name, entry in entries.items():
        if ".." in name or "/" in name or "\\" in name:
            raise UserError(f"{path} holds a tensor called {name!r}; names have no '..' and no slashes")
        start, end = entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            # Buffers of old files (position ids, masks); that nothing needs one is checked by name.
            views[name] = _Unread(entry["shape"], entry["dtype"])
        else:
            assert end - start == math.prod(entry["shape"]) * dtype.itemsize
            views[name] = data[start:end].view(dtype).reshape(entry["shape"])
    return views


class _Unread:
    """A tensor of a type that no parameter has."""

    def __init__(self, shape: list[int], dtype: str):
        self.shape, self.dtype = tuple(shape), dtype
