"""Event files in RUN/tensorboard; the only file that knows tensorboardX."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from espalier.trackers.contract import Session


class TensorBoard:
    """What an earlier session wrote after the step that this one goes on from is hidden."""

    background = False

    def __init__(self, session: Session):
        # tensorboardX imports PyTorch where it is installed, which takes seconds, and needs it for tensors alone.
        hidden = "torch" not in sys.modules
        if hidden:
            sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails
        try:
            from tensorboardX import SummaryWriter
        finally:
            if hidden:
                del sys.modules["torch"]
        self._writer = SummaryWriter(str(session.folder / "tensorboard"), purge_step=session.start + 1)

    @classmethod
    def check(cls) -> None:
        """It is always there."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, how: str) -> None:
        self._writer.close()
