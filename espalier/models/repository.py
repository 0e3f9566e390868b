"""The local folder of a Hugging Face model: the folder given, or the snapshot of a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from espalier.errors import UserError
from espalier.files import sha256_of_file, sha256_of_lines

PREFIX = "hf:"
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
UNWANTED = ("[!1-9]*/*", "consolidated*")
"""Files of a repository on the Hub that are fetched, and duplicates among them that are not; never its pickles. Folders
that begin with a number are modules of sentence-transformers (1_Pooling)."""


def revision_of(folder: Path) -> str:
    """Which files a model is of: the commit of a snapshot in the Hub's cache, else the SHA-256 of what sha256sum says
    of the files, which are read for it."""
    if folder.parent.name == "snapshots":
        return folder.name
    files = sorted({path for pattern in WANTED for path in folder.glob(pattern) if path.is_file()})
    return f"SHA-256 {sha256_of_lines(f'{sha256_of_file(path)}  {path.name}' for path in files)}"


def local_folder(path_or_id: str | os.PathLike, revision: str | None) -> Path:
    """The folder itself, or the snapshot of a repository on the Hub, downloaded unless it is in the cache."""
    given = str(path_or_id).removeprefix(PREFIX)
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{given} is a file; give the folder with config.json and model.safetensors")
    if ".." in given or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given):
        raise UserError(f"there is no folder {given}, and a repository on the Hub is called NAME or ORGANISATION/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    wanted = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
    try:
        return Path(snapshot_download(given, revision=revision, **wanted))
    except GatedRepoError:
        raise UserError(
            f"{given} is gated: accept its licence on its page of the Hub, then run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{given} on the Hub has no revision {revision!r}; leave it out for the newest") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no folder {given} and no such repository on the Hub; check the name (for a private one: "
            "hf auth login)"
        ) from None
    except Exception as error:  # no connection, an interrupted download, a name that the Hub does not allow
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"there is no folder {given}, and the Hub could not be reached for it ({said}); "
            "check the path, or fetch it where there is a connection: hf download NAME --local-dir FOLDER"
        ) from None
