"""What a stranger might put where a user brings a file, and whether it was run."""

import contextlib
import io
import os
import pathlib
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Iterator

import numpy as np

_heard: list[str] | None = None


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickles(marker: pathlib.Path) -> dict[str, bytes]:
    """The ways in which a pickle comes: bare in several protocols, in the zip of torch.save, an object array."""
    bare, zipped, archive = pickle.dumps(Payload(marker)), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", bare)
        file.writestr("archive/version", "3\n")
    with tarfile.open(fileobj=archive, mode="w") as file:
        info = tarfile.TarInfo("pickle")
        info.size = len(bare)
        file.addfile(info, io.BytesIO(bare))
    objects = np.array([Payload(marker)], dtype=object)
    array, arrays = io.BytesIO(), io.BytesIO()
    np.save(array, objects, allow_pickle=True)
    np.savez(arrays, allow_pickle=True, objects=objects)
    return {
        "pickle": bare,
        "old pickle": pickle.dumps(Payload(marker), 0),
        "torch": zipped.getvalue(),
        "tar": archive.getvalue(),
        "npy": array.getvalue(),
        "npz": arrays.getvalue(),
    }


@contextlib.contextmanager
def nothing_unpickled() -> Iterator[list[str]]:
    """Fails if any pickle finds a class within the block, whoever opens it (the audit event of Python's unpicklers)."""
    global _heard
    if not getattr(sys, "_espalier_listens", False):
        sys._espalier_listens = True  # type: ignore[attr-defined]
        sys.addaudithook(_listen)
    _heard = heard = []
    try:
        yield heard
    finally:
        _heard = None
    assert not heard, f"a pickle was opened: {heard}"


def _listen(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class" and _heard is not None:
        _heard.append(".".join(map(str, arguments)))
