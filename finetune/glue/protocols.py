"""How published tables fine-tune on GLUE: batch size, rates, epochs and seeds of each task. Imports nothing heavy.

mosaicbert   `finetuning_jobs.py` and the yaml beside it in mosaicml/examples (Portes et al. 2023). Its AdamW multiplies
             the weight decay by the share of the peak rate alone, so that the figures there (5e-6 at a rate of 5e-5)
             are 0.1 in ours, which multiplies by the rate, and 1.0 for RTE.
electra      `configure_finetuning.py` in google-research/electra (Clark et al. 2020, appendix B): rate of the base
             model. MRPC and STS-B are not trained in both orders of their texts here.
modernbert   Warner et al. 2024, appendix: the grid that it searches; batch size 64 (ModernBERT #196).
bert         Devlin et al. 2019, section 4.1: three epochs of batches of 32, the best of four rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Point:
    """The grid of one task."""

    learning_rates: tuple[float, ...]
    epochs: tuple[float, ...]
    batch_size: int = 32
    weight_decay: float = 0.01
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Protocol:
    """A published way through the tasks."""

    points: Mapping[str, Point]
    """By the key of the task."""
    rest: Point
    """Of tasks that are not named."""
    optimizer: Mapping[str, float] = field(default_factory=dict)
    """Settings of the optimizer that hold for all."""
    max_length: int = 128
    from_mnli: bool = False
    """RTE, MRPC and STS-B go on from the MNLI checkpoint."""

    def of(self, key: str) -> Point:
        return self.points.get(key, self.rest)


FIVE = (19, 8364, 717, 10536, 90166)

PROTOCOLS = {
    "bert": Protocol({}, Point((5e-5, 4e-5, 3e-5, 2e-5), (3,)), {"warmup": 0.1, "b2": 0.999}),
    "electra": Protocol(
        {key: Point((1e-4,), (10,)) for key in ("rte", "stsb")},
        Point((1e-4,), (3,)),
        {"warmup": 0.1, "b2": 0.999},
    ),
    "mosaicbert": Protocol(
        {
            "mnli": Point((5e-5,), (3,), 48, 0.1, (19,)),
            "qqp": Point((3e-5,), (5,), 16, 0.1, (19,)),
            "qnli": Point((1e-5,), (10,), 16, 0.1, (19,)),
            "sst2": Point((3e-5,), (3,), 16, 0.1, FIVE[:3]),
            "cola": Point((5e-5,), (10,), 32, 0.1, FIVE[:4]),
            "mrpc": Point((8e-5,), (10,), 32, 0.1, FIVE),
            "stsb": Point((3e-5,), (10,), 32, 0.1, FIVE),
            "rte": Point((1e-5,), (3,), 16, 1.0, FIVE),
        },
        Point((1e-5,), (3,), 16, 1.0, FIVE),
        {"warmup": 0.06, "b2": 0.98, "eps": 1e-6},
        max_length=256,
        from_mnli=True,
    ),
    "modernbert": Protocol(
        {key: Point((1e-5, 3e-5, 5e-5, 8e-5), (1, 2, 3), 64) for key in ("sst2", "mnli", "rte")},
        Point((1e-5, 3e-5, 5e-5, 8e-5), (2, 5, 10), 64),
        {"warmup": 0.06, "b2": 0.98, "eps": 1e-6},
        max_length=512,
        from_mnli=True,
    ),
}
