"""`mlm`, `clm`, `finetune` and `sharding` are those beside this folder, whatever files of the user are called.

These packages have names of their own beside `espalier`. A file `sharding.py` beside the user's script would hide ours,
since Python looks there first; they are therefore taken by their place, before anything imports them by their name.
"""

from __future__ import annotations

import importlib.util
import os
import sys

HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES = ("clm", "finetune", "mlm", "sharding")


def take() -> None:
    """Import the four from beside `espalier`; ImportError where one of another place was imported already."""
    for name in NAMES:
        folder = os.path.join(HOUSE, name)
        path = os.path.join(folder, "__init__.py")
        there = sys.modules.get(name)
        if there is None:
            spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[folder])
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        elif not _is(there, path):
            where = getattr(there, "__file__", None) or getattr(there, "__path__", ["another place"])[0]
            raise ImportError(
                f"espalier has a package {name!r}, and {where} was imported under that name; rename that file, or "
                "import espalier first where you do not need it"
            )


def _is(module: object, path: str) -> bool:
    there = getattr(module, "__file__", None)
    return there is not None and os.path.realpath(there) == os.path.realpath(path)
