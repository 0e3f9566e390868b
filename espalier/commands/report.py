"""Render the report of a run again, from the files in its directory: `./launch.sh report RUN`."""

from __future__ import annotations

from dataclasses import dataclass

from espalier import cli, progress


@dataclass(frozen=True)
class ReportConfig:
    """Render report.html of a run again."""

    run_dir: str
    """The run directory."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: ReportConfig) -> dict:
    """Write the report and print its path."""
    with progress.waiting("drawing the report"):
        from espalier.report.render import write_report

        path = write_report(config.run_dir)
    print(path)
    return {"report": str(path), "run_dir": config.run_dir}


if __name__ == "__main__":
    cli.run_config(main, ReportConfig, prog="report")
