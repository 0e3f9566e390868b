"""Weights & Biases, the only file that knows its package (`pip install "espalier[wandb]"`).

The run has the name of its folder and is in the project of WANDB_PROJECT, else "espalier". A resumed run goes on with
the same W&B run. Offline (WANDB_MODE=offline), what would be sent lies in RUN/wandb, where `wandb sync` finds it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from espalier.errors import UserError
from espalier.trackers.contract import Session


class WeightsAndBiases:
    background = True

    def __init__(self, session: Session):
        wandb: Any = importlib.import_module("wandb")

        name = session.known_id("wandb")
        if name is None:
            name = uuid.uuid4().hex[:12]
            session.keep_id("wandb", name)
        hooks = sys.excepthook, sys.exit
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "espalier",
                name=session.folder.name,
                id=name,
                resume="allow",
                dir=str(session.folder),
                config={key: value for key, value in session.config.items() if key != "published"},
                allow_val_change=True,
                # Nothing on the terminal, and nothing of the code that happens to lie in the folder.
                settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
            )
        finally:
            # It prints tracebacks itself, and wants to know how the process ends.
            sys.excepthook, sys.exit = hooks
        # Not its own count of calls, which may not go back: a run that is rolled back does.
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def check(cls) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                'trackers=wandb needs the package wandb; pip install "wandb>=0.31,<1", or leave out --trackers wandb'
            )
        if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
            return
        wandb: Any = importlib.import_module("wandb")

        if not wandb.login(prompt=False):
            raise UserError(
                "trackers=wandb finds no account; run `wandb login` first, set WANDB_API_KEY, or WANDB_MODE=offline"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, how: str) -> None:
        self._run.finish(exit_code=int(how == "failed"))
