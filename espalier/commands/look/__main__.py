"""See inside a model: `./launch.sh look MODEL --text "…"`, and what needs more than one text: `look KIND …`."""

from __future__ import annotations

import importlib
import sys

from espalier import cli, library_log

KINDS = {
    "text": "espalier.commands.look.text:LookConfig",
    "features": "espalier.commands.look.features:FeaturesConfig",
    "heads": "espalier.commands.look.heads:HeadsConfig",
    "induction": "espalier.commands.look.induction:InductionConfig",
    "lens": "espalier.commands.look.lens:LensConfig",
    "patch": "espalier.commands.look.patch:PatchConfig",
    "probe": "espalier.commands.look.probe:ProbeConfig",
}
"""KIND → module and configuration of its `main`; a text is what is looked at where no kind is named."""

if __name__ == "__main__":
    named = sys.argv[1:2] and sys.argv[1] in KINDS
    kind, arguments = (sys.argv[1], sys.argv[2:]) if named else ("text", sys.argv[1:])
    module, _, configuration = KINDS[kind].partition(":")
    found = importlib.import_module(module)
    if hasattr(found, "command"):
        library_log.begin()
        found.command(arguments)
    else:
        cli.run_config(
            found.main, getattr(found, configuration), prog=f"look {kind}" if named else "look", argv=arguments
        )
