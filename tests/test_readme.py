"""The README is true: every command in it is accepted, every path exists, the small ones really run."""

import importlib
import pathlib
import re
import shlex

import pytest

import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
AGENTS = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
MODULES = {
    "mlm": "mlm.pretrain",
    "clm": "clm.pretrain",
    "finetune": "finetune.train",
    "generate": "clm.generate",
    "prepare": "data.prepare",
    "demo": "commands.demo",
    "report": "commands.report",
}
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("./launch.sh")
]


def test_there_are_commands():
    assert [] in COMMANDS, "./launch.sh alone is the first thing that a user runs"
    assert {command[0] for command in COMMANDS if command} >= {"mlm", "clm", "finetune", "generate"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_accepted(command, monkeypatch):
    """The command line is parsed as the user's would be; what it would then do is tested in tests/e2e."""
    name, *arguments = command or ["demo"]
    module = importlib.import_module(MODULES[name])
    seen = []
    if hasattr(module, "PRESETS"):
        cli.run(seen.append, module.PRESETS, prog=name, description="", argv=arguments)
    else:
        config_type = next(
            t
            for key, t in vars(module).items()
            if key.endswith("Config") and t.__module__ == module.__name__ and key.lower().startswith(name[:4])
        )
        cli.run_config(seen.append, config_type, prog=name, argv=arguments)
    assert len(seen) == 1


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z][\w.-]*)", README))))
def test_every_flag_in_the_text_exists(flag, capsys):
    accepted = set()
    for name in ("mlm", "clm", "finetune"):
        module = importlib.import_module(MODULES[name])
        for preset in module.PRESETS.values():
            accepted |= {given for given, _ in cli._flags(type(preset()))}
    assert flag in accepted | {"--help"}


@pytest.mark.parametrize("text", [README, AGENTS], ids=["README", "AGENTS"])
def test_every_path_in_the_text_exists(text):
    for path in re.findall(r"`((?:mlm|clm|finetune|models|data|sharding|training|commands|tests)/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path
