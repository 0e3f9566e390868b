"""Weights & Biases, the only file that knows its package (`pip install "espalier[wandb]"`).

The run has the name of its folder and is in the project of WANDB_PROJECT, else "espalier". A resumed run goes on with
the same W&B run. Offline (WANDB_MODE=offline), what would be sent lies in RUN/wandb, where `wandb sync` finds it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from espalier.errors import UserError
from espalier.trackers.contract import PATIENCE, Session

OPENING = 30.0
"""Seconds that the service may take to know the run."""


class WeightsAndBiases:
    background = True

    def __init__(self, session: Session):
        wandb = _package()
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
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_git=True,
                    disable_code=True,
                    # A process ends only when its package has ended what it waits for.
                    init_timeout=OPENING,
                    finish_timeout=PATIENCE,
                ),
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
        wandb = _package()
        if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
            return
        known = True
        # A service that does not answer now must not keep a run from going on.
        with contextlib.suppress(Exception):
            # Its own word for not asking the service now; the connection is checked as ever.
            known = wandb.login(prompt=False, verify=False)
        if not known:
            raise UserError(
                "trackers=wandb finds no account; run `wandb login` first, set WANDB_API_KEY, or WANDB_MODE=offline"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, how: str) -> None:
        self._run.finish(exit_code=int(how == "failed"))


def _package() -> Any:
    """The package. When it is imported, it takes over how the standard streams write, for good: not ours.

    To be called by the main thread first (`check`), for meanwhile nobody can print.
    """
    if "wandb" in sys.modules:
        return sys.modules["wandb"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module("wandb")
