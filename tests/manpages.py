"""Real Chinese and Japanese text: Debian's translated manual pages, fetched once into `.manpages/` of the checkout."""

import fcntl
import gzip
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / ".manpages"
KEPT = re.compile(r"[.'] *(B|I|BR|BI|RB|RI|IR|IB|SM|SH|SS|Sh|Ss|Nm|Nd|Fl|Ar|Pa|Xr) +")
ROFF = re.compile(r"\\f(\(..|\[.*?\]|.)|\\s[+-]?\d+|\\\(([a-z]{2}|\*\*)|\\[&/|,^cde%=+.]|\\\*(\(..|\[.*?\]|.)")


def man_texts(language: str, pages: int = 400) -> list[str]:
    """The first `pages` pages (in order of their names) of manpages-zh or manpages-ja, a text each, without markup.

    language: zh, zh_TW (traditional characters) or ja.
    """
    folder = _package(f"manpages-{language[:2]}")
    country = {"zh": "zh_CN"}.get(language, language)
    texts = [_plain(gzip.decompress(path.read_bytes()).decode()) for path in _pages(folder, country)[:pages]]
    return [text for text in texts if len(text) > 200]


def _pages(folder: Path, country: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"usr/share/man/{country}/man*/*.gz") if not path.is_symlink())


def _plain(page: str) -> str:
    """The running text, headings and words in bold or italics with it; other requests and comments are left out."""
    lines = [KEPT.sub("", line).replace('"', "") if KEPT.match(line) else line for line in page.split("\n")]
    text = "\n".join(line for line in lines if not line.startswith((".", "'", '\\"')))
    text = ROFF.sub("", text).replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _package(name: str) -> Path:
    """The files of a Debian package; neither root nor an installation is needed."""
    folder = FOLDER / name
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            error = ""
            for commands in ([["apt-get", "download", name]], [["apt-get", "update"], ["apt-get", "download", name]]):
                results = [subprocess.run(c, cwd=FOLDER, capture_output=True, text=True) for c in commands]
                error = results[-1].stderr.strip()
                if results[-1].returncode == 0:
                    break
            archives = sorted(FOLDER.glob(f"{name}_*.deb"))
            if not archives:
                pytest.fail(f"this test reads Debian's {name}, and `apt-get download {name}` failed: {error}")
            unfinished = FOLDER / f".{name}"
            subprocess.run(["dpkg-deb", "-x", archives[-1], unfinished], check=True)
            unfinished.rename(folder)
    return folder
