"""A page as a cell of a notebook."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import NamedTuple

from espalier.errors import UserError

HEIGHT = "42rem"


class Page(NamedTuple):
    """HTML that shows itself where it is the last value of a notebook's cell, apart from the notebook's own page."""

    html: str

    def _repr_html_(self) -> str:
        return (
            f"<iframe srcdoc='{escape(self.html, quote=True)}' style='width:100%;height:{HEIGHT};border:0' "
            "sandbox=allow-scripts title=Espalier></iframe>"
        )

    def __repr__(self) -> str:
        return f"Page of {len(self.html):,} characters; in a notebook it shows itself"


def page(run: str | os.PathLike[str]) -> Page:
    """The report of a run directory as it is now, to be shown in a notebook. UserError where there is no run.

    >>> page(run)
    Page of ... characters; in a notebook it shows itself
    """
    from espalier.report.render import write_report

    if not (Path(run) / "config.json").is_file():
        raise UserError(f"{run} holds no run; give a run directory")
    return Page(write_report(Path(run)).read_text(encoding="utf-8"))
