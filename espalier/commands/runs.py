"""All runs of a folder: `./launch.sh runs [FOLDER]`, a table; `--html` a page that compares them, `--serve` the same,
live."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier import cli, progress
from espalier.errors import UserError
from espalier.runs.folder import Folder

DEFAULT = "runs"


@dataclass(frozen=True)
class RunsConfig:
    """The runs of a folder and of its subfolders as a table, or compared on a page: `runs [FOLDER]` (default: runs)."""

    folder: str
    """Holds runs, or lies above them."""
    html: bool = False
    """Write a page that compares them: curves, settings that differ."""
    output: str | None = None
    """File of the page; unset = runs.html in the folder."""
    serve: bool = False
    """Serve the page and keep it up to date, until Ctrl-C (needs starlette and uvicorn)."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = of all networks of this machine. There is no password."""
    port: int = 8001
    """0 = any that is free."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if not 0 <= self.port < 2**16:
            raise UserError(f"port={self.port} must lie between 0 and {2**16 - 1}")
        if self.html and self.serve:
            raise UserError("--html writes a page and --serve serves it; give one of them")
        if self.output is not None and not self.html:
            raise UserError("--output is where --html writes to; give both")


def main(config: RunsConfig) -> dict[str, Any]:
    """Print the table, write the page or serve it; returns the `--json` object."""
    folder = Folder(config.folder)
    if config.serve:
        from espalier.runs.app import serve

        serve(folder, config.host, config.port)
        return {"folder": str(folder.path), "runs": folder.rows()}
    with progress.waiting(f"reading {config.folder}"):
        folder.look()
    rows = folder.rows()
    found: dict[str, Any] = {"folder": str(folder.path), "runs": rows, "problems": folder.problems}
    for line in folder.problems:
        print(f"warning: {line}", file=sys.stderr)
    if config.html:
        from espalier.runs.page import write

        path = Path(config.output).expanduser() if config.output else folder.path / "runs.html"
        print(write(folder, path))
        return found | {"page": str(path)}
    if not config.json:
        from espalier.runs.table import table

        print(table(rows) if rows else f"no runs in {config.folder}; each training makes one, for instance runs/demo")
    return found


def command(argv: Sequence[str] | None = None) -> None:
    """The folder may be left out."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = any(argument.partition("=")[0] == "--folder" for argument in arguments)
    if not named and (not arguments or arguments[0].startswith("-")):
        arguments = [DEFAULT, *arguments]
    cli.run_config(main, RunsConfig, prog="runs", argv=arguments)


if __name__ == "__main__":
    from espalier import library_log

    library_log.begin()
    command()
