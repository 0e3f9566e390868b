"""MLflow, the only file that knows its package (`pip install "espalier[mlflow]"`).

The run has the name of its folder and is in the experiment of MLFLOW_EXPERIMENT_NAME, else "espalier", on the server or
in the store of MLFLOW_TRACKING_URI. Where that is unset all is in the run directory: in RUN/mlflow.db if SQLAlchemy is
installed (it comes with the whole of MLflow), else in the folder RUN/mlflow.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from espalier.errors import UserError
from espalier.trackers.contract import Session

LONGEST = 500
"""Characters of a setting; older servers take no more."""
AT_ONCE = 100
"""Settings in a call."""


class MLflow:
    background = True

    def __init__(self, session: Session):
        mlflow: Any = importlib.import_module("mlflow.tracking")
        self._entities: Any = importlib.import_module("mlflow.entities")
        store = os.environ.get("MLFLOW_TRACKING_URI") or _own_store(session)
        self._client = mlflow.MlflowClient(tracking_uri=store)
        known = session.known_id("mlflow")
        if known is not None:
            self._client.update_run(known, "RUNNING")
            self._id = known
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "espalier"
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        self._id = self._client.create_run(place, run_name=session.folder.name).info.run_id
        session.keep_id("mlflow", self._id)
        settings = [self._entities.Param(name, value) for name, value in _flat(session.config)]
        for at in range(0, len(settings), AT_ONCE):
            self._client.log_batch(self._id, params=settings[at : at + AT_ONCE])

    @classmethod
    def check(cls) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise UserError(
                'trackers=mlflow needs the package mlflow; pip install "mlflow-skinny>=3.17,<4" (or the whole of '
                "mlflow), or leave out --trackers mlflow"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # Its names know no @, as in ndcg@10.
        named = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in metrics.items()}
        self._client.log_batch(
            self._id, metrics=[self._entities.Metric(name, value, now, step) for name, value in named.items()]
        )

    def close(self, how: str) -> None:
        self._client.set_terminated(self._id, "FAILED" if how == "failed" else "FINISHED")


def _own_store(session: Session) -> str:
    """In the run directory: the kind that an earlier session chose, else a database where one can be had."""
    database, folder = session.folder / "mlflow.db", session.folder / "mlflow"
    if not folder.exists() and (database.exists() or importlib.util.find_spec("sqlalchemy")):
        return f"sqlite:///{database}"
    # MLflow wants to be told that a folder is meant, for it improves such stores no further.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return folder.as_uri()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and name != "published":
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "published":
            with contextlib.suppress(TypeError, ValueError):
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                yield prefix + name, text[:LONGEST]
