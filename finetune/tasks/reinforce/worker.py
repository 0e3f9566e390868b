"""The process of a reward function: `python -m finetune.tasks.reinforce.worker FILE.py:NAME` (see processes.py)."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

from espalier import user_code
from espalier.errors import UserError


def main(name: str) -> None:
    """Answer lines on descriptor 0 until it ends; what is printed meanwhile goes to descriptor 2."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        function, broken = user_code.function(name, "reward(prompts, completions, row)"), ""
    except UserError as error:
        function, broken = None, str(error)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if function is None:
                raise UserError(broken)
            answer: dict[str, Any] = {"rewards": [_number(value) for value in function(*asked.values())]}
        except (UserError, TypeError, ValueError) as error:
            answer = {"error": " ".join(str(error).split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    value = float(value)
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main(sys.argv[1])
