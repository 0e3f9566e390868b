"""What a model attends to and why it says what it says: `./launch.sh look MODEL --text "…"` (docs/look.md).

Called, `espalier.look(model, text)` is `espalier.look.looked.look`.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Look(types.ModuleType):
    """The package, which can be called: its name is that of the function in `import espalier`."""

    def __call__(self, *args: Any, **asked: Any) -> Any:
        from espalier.look.looked import look

        return look(*args, **asked)


look = sys.modules[__name__]
look.__class__ = _Look
