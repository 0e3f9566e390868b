"""docs/python.md and the docstrings of `import espalier` run, from another folder, beside files with our names."""

import os
import pathlib
import re
import subprocess
import sys

from quick import xla_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = "data models cli training commands task sharding finetune mlm clm".split()
DOCTESTS = """
import builtins, doctest, sys
import espalier.front, espalier.loading, espalier.look.looked, espalier.report.inline
say, builtins.print = print, lambda *words, **how: None  # what training says is no result
modules = espalier.front, espalier.loading, espalier.look.looked, espalier.report.inline
results = [doctest.testmod(module, extraglobs={"run": "runs/tiny"}, optionflags=doctest.ELLIPSIS) for module in modules]
assert not any(result.failed for result in results) and all(result.attempted for result in results), results
say("all of the page")
"""


def test_every_block_of_the_page_and_every_docstring_run(tmp_path, shared_data):
    """In one program, for the page reads from top to bottom; the user's own files end it where they are imported."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == page.count("```python") == page.count("```") // 2
    for name in OURS:
        (tmp_path / f"{name}.py").write_text(f'raise SystemExit("{name}.py of the user")\n')
    (tmp_path / "text").mkdir()
    scenes = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:60_000].split("\n\n")
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text("\n\n".join(scenes[number::4]))
    (tmp_path / "script.py").write_text("\n".join([*blocks, DOCTESTS]))
    settings = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": xla_flags(1)}
    command = [sys.executable, "script.py"]
    how = dict(cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=280)
    result = subprocess.run(command, **how)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert result.stdout.splitlines()[-1] == "all of the page"
    assert (tmp_path / "loss.png").stat().st_size > 5000
