"""What parts of the library hand to each other without importing each other. Imports nothing of the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class BatchStream(Protocol):
    """An iterator over batches, this process's rows as NumPy arrays; a generator is one."""

    def __next__(self) -> dict[str, Any]: ...
    def close(self) -> object: ...


class Origin(Protocol):
    """What a run goes on from: a run's checkpoint, or a Hugging Face model (models.hub.Pretrained)."""

    @property
    def name(self) -> str:
        """In words."""
        ...

    @property
    def revision(self) -> str:
        """In words, with a commit or a sum by which the files can be told from others of this name."""
        ...

    @property
    def config(self) -> dict:
        """JSON values beside the weights: at least `model` and `task`."""
        ...

    @property
    def tokenizer_folder(self) -> Path: ...

    @property
    def resumed(self) -> bool:
        """Whether it is the run itself."""
        ...

    @property
    def done(self) -> int:
        """Steps of the run itself; 0 where it is another."""
        ...

    def restore_params(self, abstract: Any) -> Any:
        """The parameters as `abstract` says, which may leave out the head."""
        ...
