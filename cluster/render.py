"""Fills in a template: `python3 -m cluster.render cluster/gke/tpu.yaml IMAGE=… -- mlm … | kubectl apply -f -`.

A template names its settings at its top, each with its default; one without `=` must be given:

    # $IMAGE            the image of docker/Dockerfile
    # $HOSTS=8          hosts of a slice

${NAME} stands for the value: a number by itself, text within double quotes. Two are made of what follows `--`, the
arguments of ./launch.sh: ${ARGUMENTS} is a list for Kubernetes, ${COMMAND} a line for a shell. What is between them is
quoted here, once, so that spaces and $ arrive as they are.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from espalier.errors import UserError
from espalier.exits import one_line_errors

SETTING = re.compile(r"^# \$([A-Z_]+)(?:=(\S*))?(?: +(\S.*))?$", re.MULTILINE)


def settings(template: str) -> dict[str, str | None]:
    """The settings of a template, with their defaults; None where there is none."""
    return {name: value for name, value, _ in _settings(template)}


def _settings(template: str) -> list[tuple[str, str | None, str]]:
    return [(found[1], found[2], found[3] or "") for found in SETTING.finditer(template)]


def render(template: str, given: Mapping[str, str], arguments: Sequence[str]) -> str:
    """The template with everything filled in. UserError for a setting that is unknown, missing or not a number."""
    known = settings(template)
    listed = "; ".join(
        f"{name}{'' if value is None else '=' + value} ({meaning})" for name, value, meaning in _settings(template)
    )
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{', '.join(unknown)} is no setting of this template; it takes {listed}")
    values = {name: given.get(name, default) for name, default in known.items()}
    if missing := [name for name, value in values.items() if not value]:
        raise UserError(f"{', '.join(missing)} must be given, as {missing[0]}=VALUE; the settings are {listed}")
    if not arguments:
        raise UserError("nothing after --; there stand the arguments of ./launch.sh")
    # Kubernetes puts variables in place of $(NAME) in arguments; $$( stands for $(.
    words = [word.replace("$(", "$$(") for word in arguments]
    made = {"ARGUMENTS": json.dumps(words, ensure_ascii=False), "COMMAND": json.dumps(shlex.join(arguments))}

    def value(found: re.Match) -> str:
        name, line = found[1], found.string[: found.start()].rpartition("\n")[2]
        if line.lstrip().startswith("#"):
            return found[0]
        if name in made:
            return made[name]
        text = values[name] or ""
        if line.count('"') % 2:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        if not text.isdecimal():
            raise UserError(f"{name}={text} is not a whole number")
        return text

    return re.sub(r"\$\{([A-Z_]+)\}", value, template)


def main(argv: Sequence[str] | None = None) -> None:
    """`cluster.render TEMPLATE NAME=VALUE … -- ARGUMENTS …`: the result on standard output."""
    words = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors(False):
        cut = words.index("--") if "--" in words else len(words)
        if not words[:cut] or "--help" in words[:cut] or "-h" in words[:cut]:
            print(__doc__)
            return
        path, *pairs = words[:cut]
        if bad := [pair for pair in pairs if "=" not in pair]:
            raise UserError(f"{bad[0]!r} is not NAME=VALUE")
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file; templates are cluster/*/*.yaml")
        given = dict(pair.partition("=")[::2] for pair in pairs)
        print(render(Path(path).read_text(encoding="utf-8"), given, words[cut + 1 :]), end="")


if __name__ == "__main__":
    main()
