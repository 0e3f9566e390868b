"""The pages of docs/ as a site with search: `./launch.sh docs`.

The pages are plain markdown that GitHub shows too. They are copied with one more, written from docstrings (api.py), and
rendered by Zensical. Warnings are errors: a link to what is not there, and what the two renderers read differently.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from api import api_page

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent
ROOT = DOCS.parent

SECTIONS = {
    "Start": ("index.md", "start.md"),
    "Cookbook": ("cookbook/*.md",),
    "Tasks": ("tasks/index.md", "tasks/*.md"),
    "Pretrain": (
        "data.md",
        "hybrid.md",
        "encoder-decoders.md",
        "electra.md",
        "diffusion.md",
        "own-objective.md",
        "interpretable-objectives.md",
        "results.md",
        "experiments.md",
    ),
    "Rely on it": ("reliability.md", "security.md"),
    "Speed": ("performance.md", "attention.md"),
    "Plan and run": ("plan.md", "plan-budget.md", "many-hosts.md", "runs.md", "cluster*.md"),
    "Use and look inside": ("predict.md", "look*.md", "features.md", "python.md", "api.md"),
    "Work on it": ("adding-a-family.md", "testing.md"),
    "More": ("**/*.md",),
}
"""Section → its pages, in order. A page belongs to the first pattern that it fits; a new one needs no entry."""

ELSEWHERE = re.compile(r"<script[^>]*\bsrc=\"?https?://[^>]*></script>")
"""A script that the renderer would load from elsewhere, for search in pages that are opened from the disk; without it
search wants a server."""
LINK = re.compile(r"(?<!!)\[([^\]\n]+(?:\n[^\]\n]+)?)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="./launch.sh docs", description="Build the pages of docs/ as a site.")
    parser.add_argument("--output", type=Path, default=ROOT / "site", help="folder of the site (it is replaced)")
    output = parser.parse_args().output
    if output.exists() and any(output.iterdir()) and not (output / "search.js").exists():
        print(f"error: --output {output} holds something else than a site; name another folder", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wrong = stage(folder)
        if wrong:
            print(*wrong, sep="\n", file=sys.stderr)
            return 1
        # In color it marks places letter by letter, which no log shows well.
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "zensical.toml"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        said = re.sub(r"\x1b\[[\d;]*m", "", result.stdout + result.stderr)
        if result.returncode:
            print(said.split("Traceback (most recent")[0], file=sys.stderr)
            return 1
        for page in (folder / "site").rglob("*.html"):
            text = page.read_text(encoding="utf-8")
            page.write_text(ELSEWHERE.sub("", text), encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(folder / "site", output)
    pages = sum(1 for _ in output.rglob("*.html"))
    print(f"{pages} pages: {output / 'index.html'}; for search, python -m http.server -d {output}")
    return 0


def stage(folder: Path) -> list[str]:
    """Put settings and pages as the renderer wants them into a folder; returns what is wrong with them."""
    pages = folder / "pages"
    wrong = []
    for path in sources():
        name = path.relative_to(DOCS)
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            wrong += [f"docs/{name}:{line}: {why}" for line, why in read_differently(text)]
            (pages / name).write_text(within(path, text), encoding="utf-8")
        else:
            shutil.copyfile(path, pages / name)
    (pages / "api.md").write_text(api_page(), encoding="utf-8")
    shutil.copyfile(HERE / "espalier.css", pages / "espalier.css")
    settings = (HERE / "zensical.toml").read_text(encoding="utf-8")
    head = "[project]\n"
    (folder / "zensical.toml").write_text(settings.replace(head, f"{head}nav = {navigation(pages)}\n", 1))
    tomllib.loads((folder / "zensical.toml").read_text())
    return wrong


def sources() -> list[Path]:
    """Pages and pictures of docs/."""
    found = (path for path in DOCS.rglob("*") if path.suffix in (".md", ".png", ".svg", ".webp"))
    return sorted(path for path in found if HERE not in path.parents)


def navigation(pages: Path) -> str:
    """Every page in its section, in TOML."""
    left = {str(path.relative_to(pages)) for path in pages.rglob("*.md")}
    sections = []
    for title, patterns in SECTIONS.items():
        names: list[str] = []
        for pattern in patterns:
            # Of a group the overview stands first, the rest by name.
            fitting = sorted({str(path.relative_to(pages)) for path in pages.glob(pattern)} & left)
            names += fitting
            left -= set(fitting)
        if names:
            sections.append(f'{{ "{title}" = {names!r} }}')
    assert not left, left
    return f"[{', '.join(sections)}]"


def within(path: Path, text: str) -> str:
    """Links that lead out of docs/ become the path of what they name, for the site does not hold it.

    What is not in the repository stays a link, which the renderer refuses.
    """

    def named(link: re.Match) -> str:
        target = (path.parent / link[2].split("#")[0]).resolve()
        if target.is_relative_to(DOCS) and HERE not in target.parents or not target.exists():
            return link[0]
        name = str(target.relative_to(ROOT))
        return f"`{name}`" if link[1].strip("`") == name else f"{link[1]} (`{name}`)"

    return LINK.sub(named, text)


def read_differently(text: str) -> Iterator[tuple[int, str]]:
    """Lines that GitHub shows as meant and the site would not, with the reason."""
    before, fenced = "", False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            if "mermaid" in line:
                yield number, "the site has no Mermaid, which it would load from elsewhere; use a picture"
            elif fenced and before.strip() and not before.startswith((" ", "-")):
                yield number, "an empty line belongs before a block of code"
        elif not fenced:
            listed = re.match(r"([-*+]|\d+\.) ", line)
            if listed and before.strip() and not re.match(r"([-*+]|\d+\.) |\s", before):
                yield number, "an empty line belongs before a list"
            if line.startswith("|") and before.strip() and not before.startswith("|") and not before.endswith("-->"):
                yield number, "an empty line belongs before a table"
            if re.search(r"(?<![\w`$\\])\$[^$`\s][^$`]*\$(?![\w$])", re.sub(r"`[^`]*`", "", line)):
                yield number, "the site shows no formulas of TeX; write it with letters, or as code"
        before = line


if __name__ == "__main__":
    sys.exit(main())
