"""Event files in RUN/tensorboard; the only file that knows tensorboardX."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from espalier.errors import MachineError
from espalier.exits import INTACT
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
        if self._ended():
            raise MachineError(
                f"{self._writer.logdir} could not be written for a while, and its writer has ended; make room on the "
                f"disk; {INTACT}"
            )
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, how: str) -> None:
        if not self._ended():
            self._writer.close()

    def _ended(self) -> bool:
        """Whether its thread met an error of the disk: then nobody takes what is logged, and the next would wait for
        ever."""
        worker = getattr(getattr(self._writer.file_writer, "event_writer", None), "_worker", None)
        return worker is not None and not worker.is_alive()
