"""Where the pages of `look` go, with their numbers beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from espalier.errors import UserError


def page_path(output: str) -> Path:
    """Where a page goes; UserError where it cannot."""
    if not output.endswith(".html"):
        raise UserError(f"--output {output} is no .html file; try look.html")
    path = Path(output).expanduser()
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.absolute().parent}; make it first")
    return path


def write(
    output: str,
    title: str,
    subtitle: str,
    sections: Iterable[Any],
    figures: Iterable[tuple[str, str]],
    arrays: Mapping[str, Any],
) -> dict[str, str]:
    """The page and its .npz; returns both paths, as rows for the terminal."""
    import numpy as np

    from espalier.files import replacing
    from espalier.report import page

    path = page.write_page(page_path(output), title, subtitle, sections, page.tiles(figures))
    numbers = path.with_suffix(".npz")
    with replacing(numbers, "wb") as file:
        np.savez_compressed(file, **arrays)
    return {"page": str(path), "numbers": str(numbers)}
