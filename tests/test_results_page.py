"""docs/results.md: its commands are understood as they stand, and its script makes the pairs that it speaks of."""

import importlib
import json
import pathlib
import re
import shlex
import subprocess
import sys

from espalier import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
ENTRIES = {"mlm": "mlm.pretrain", "clm": "clm.pretrain", "finetune": "finetune.train"}


def test_every_command_is_understood():
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("./launch.sh")]
    assert len(commands) >= 9
    for name, *arguments in commands:
        seen = []
        module = importlib.import_module(ENTRIES[name])
        cli.run(lambda config, call, seen=seen: seen.append(config), module.PRESETS, name, "", arguments)
        assert len(seen) == 1, arguments


def test_the_script_makes_the_pairs(shared_data, tmp_path):
    script = re.search(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert script
    environment = {"SHARED": str(shared_data), "PATH": ""}
    subprocess.run([sys.executable, "-c", script[1]], cwd=tmp_path, env=environment, check=True)
    for name, count, others in (("rank-train.jsonl", 10_000, 3), ("rank-test.jsonl", 1000, 19)):
        rows = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert len(rows) == count
        assert all(len(row["negatives"]) == others and row["positives"][0] not in row["negatives"] for row in rows)
