"""See inside a model: `./launch.sh look MODEL --text "…"`, and what needs more than one text: `look KIND …`."""

from __future__ import annotations

import importlib
import sys

from espalier import cli

KINDS = {
    "text": "espalier.commands.look.text:LookConfig",
}
"""KIND → module and configuration of its `main`; a text is what is looked at where no kind is named."""

if __name__ == "__main__":
    named = sys.argv[1:2] and sys.argv[1] in KINDS
    kind = sys.argv[1] if named else "text"
    module, _, configuration = KINDS[kind].partition(":")
    found = importlib.import_module(module)
    prog = f"look {kind}" if named else "look"
    cli.run_config(found.main, getattr(found, configuration), prog=prog, argv=sys.argv[2:] if named else sys.argv[1:])
