"""W&B and MLflow as they are, offline: what a run that fails, is rolled back and goes on leaves there.

    python -m venv V && V/bin/pip install wandb mlflow-skinny && V/bin/python tests/real_trackers.py NEW_FOLDER

Their packages are large, so the suite has stand-ins (test_trackers.py); this needs neither JAX nor the network.
"""

import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SESSIONS = """
import pathlib, sys, threading, time
from espalier import library_log, progress
library_log.begin()
from espalier.trackers.contract import Boards, Session, check

name, folder, patience = sys.argv[1], pathlib.Path(sys.argv[2]), float(sys.argv[3])
folder.mkdir(parents=True)
check([name])
config = {"seed": 1, "model": {"layers": 2}, "command": "./launch.sh mlm debug"}
# Fails after step 6, is rolled back to 4 in the same process, pauses at 8, goes on from there.
for start, last, how in ((0, 6, "failed"), (4, 8, "ended"), (8, 10, "ended")):
    boards = Boards([name], Session(folder, config, start), progress.say)
    progress.say(f"a line of ours at {start}")
    for step in range(start + 1, last + 1):
        boards.log(step, {"loss": 10.0 - step, "gradient_norm": float("nan")})
    boards.log(last, {"eval/ndcg@10": 0.5})
    began = time.monotonic()
    boards.close(how, patience)
    if how == "failed" and patience < 30:
        break
"""
OURS = "".join(f"a line of ours at {start}\n" for start in (0, 4, 8))


def run(name: str, folder: pathlib.Path, patience: float, **environment: str) -> tuple[str, float]:
    """What it printed, and the seconds that it took."""
    # As on a machine without accounts and without settings.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "MLFLOW_"))}
    clean |= {"PYTHONPATH": str(ROOT), "ESPALIER_CACHE": f"{folder}.cache", "HOME": str(folder.parent)} | environment
    began = time.monotonic()
    command = [sys.executable, "-P", "-c", SESSIONS, name, str(folder), str(patience)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, time.monotonic() - began


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True)

    said, _ = run("wandb", folder / "by-wandb", 60, WANDB_MODE="offline")
    assert said == OURS, said
    logs = sorted((folder / "by-wandb" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == 3 and len({path.name for path in logs}) == 1, logs
    assert all(b"eval/ndcg@10" in path.read_bytes() for path in logs)
    print(f"wandb, offline: three sessions of one run, {logs[0].name}; on the terminal only our lines")

    said, seconds = run("wandb", folder / "unreachable", 2, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    ours, _, said = said.partition("\n")
    assert ours == OURS.split("\n")[0] and said.startswith("warning: wandb: ") and said.count("\n") == 1, said
    print(f"wandb, a server that cannot be reached: ended after {seconds:.0f} s with one line: {said.strip()}")

    said, _ = run("mlflow", folder / "by-mlflow", 60)
    assert said == OURS, said
    from mlflow.tracking import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    database = folder / "by-mlflow" / "mlflow.db"
    client = MlflowClient(f"sqlite:///{database}" if database.exists() else (folder / "by-mlflow" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("espalier")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("by-mlflow", "FINISHED")
    assert found.data.params == {"seed": "1", "model.layers": "2", "command": "./launch.sh mlm debug"}
    history = [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, "loss")]
    assert history == [(step, 10.0 - step) for step in (*range(1, 7), *range(5, 11))], history
    assert found.data.metrics["eval/ndcg_10"] == 0.5
    store = "a database" if database.exists() else "a folder"
    print(f"mlflow, {store} in the run directory: three sessions of one run, {len(history)} values of the loss")


if __name__ == "__main__":
    main()
