"""How many processes a run has and which one this is: from flags, or from the environment that launchers set.

    explicit     --distributed.coordinator HOST:PORT --distributed.processes N --distributed.process-id I, or
                 JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (of an indexed Job on Kubernetes,
                 JOB_COMPLETION_INDEX stands for the last)
    Slurm        what `srun` sets for a step of several tasks
    TPU on GKE   TPU_WORKER_HOSTNAMES and TPU_WORKER_ID; with several slices MEGASCALE_*
    TPU VMs      the metadata server of Google Cloud

JAX can detect the last three itself. This module does it instead because JAX, when something is wrong, waits for
minutes and then aborts with a C++ stack trace, and because under Slurm it gives one GPU to a task that has a whole
node. Imports no JAX: no device is touched before the processes are known.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from espalier.errors import UserError

COORDINATOR_PORT = 8482
"""Where process 0 listens on TPU hosts, as in JAX."""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run on several hosts; unset = as the launcher sets them (Slurm, GKE, TPU), else one."""

    coordinator: str | None = None
    """HOST:PORT where process 0 listens, the same in every process."""
    processes: int | None = None
    """How many there are; 1 = this one alone, whatever the launcher sets."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    timeout: float = 300.0
    """Seconds within which all must have started."""

    def __post_init__(self):
        if self.processes is not None and self.processes < 1:
            raise UserError(f"distributed.processes={self.processes} must be at least 1")
        if self.timeout <= 0:
            raise UserError(f"distributed.timeout={self.timeout:g} must be above 0 seconds")


@dataclass(frozen=True)
class Place:
    """The place of one process among several."""

    host: str
    port: int
    """Of process 0, reachable by all."""
    processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None
    """The GPUs of this process among those of its node; None = all that it sees."""


def find_place(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process; None if it is alone. UserError if settings are incomplete or contradict."""
    if config.processes == 1 and not config.process_id:
        return None
    return _explicit(config, environment) or _slurm(environment) or _gke_tpu(environment) or _tpu_vm(environment)


def _explicit(config: DistributedConfig, environment: Mapping[str, str]) -> Place | None:
    given = {
        "coordinator": (config.coordinator, "JAX_COORDINATOR_ADDRESS"),
        "processes": (config.processes, "JAX_NUM_PROCESSES"),
        "process-id": (config.process_id, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"),
    }
    said, values = {}, {}
    for flag, (value, *variables) in given.items():
        if value is not None:
            said[flag], values[flag] = f"--distributed.{flag}={value}", str(value)
        elif name := next((name for name in variables if environment.get(name)), None):
            said[flag], values[flag] = f"{name}={environment[name]}", environment[name]
    # An indexed Job of Kubernetes may be a single process.
    if not values.keys() & {"coordinator", "processes"} and config.process_id is None:
        return None
    missing = [f"--distributed.{flag}" for flag in given if flag not in values]
    if missing:
        raise UserError(f"{', '.join(said.values())} without {' and '.join(missing)}: several processes need all three")
    for flag in ("processes", "process-id"):
        if not values[flag].isdecimal():
            raise UserError(f"{said[flag]} is not a whole number")
    processes, process_id = int(values["processes"]), int(values["process-id"])
    if process_id >= max(processes, 1):
        raise UserError(f"{said['process-id']} of {said['processes']}: they count from 0 to {max(processes, 1) - 1}")
    host, colon, port = values["coordinator"].rpartition(":")
    host = host.strip("[]")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"{said['coordinator']} is not HOST:PORT; for instance node0:{COORDINATOR_PORT}")
    return Place(host, int(port), processes, process_id) if processes > 1 else None


def _slurm(environment: Mapping[str, str]) -> Place | None:
    if "SLURM_JOB_ID" not in environment:
        return None
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks < 2:
        of_job = int(environment.get("SLURM_NTASKS") or 1)
        if of_job > 1 and tasks == 1:
            raise UserError(
                f"this Slurm job has {of_job} tasks and srun did not start this program in them: write "
                "`srun ./launch.sh …`; or --distributed.processes 1 for this process alone"
            )
        return None
    nodes = environment["SLURM_STEP_NODELIST"]
    # node7 | node7,node9 | node[007-009,12],other3: the first is where task 0 runs.
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if not first:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} is not a list of nodes; start the program with srun")
    # Steps of a job may run side by side.
    port = 61440 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID") or 0)) % 4096
    return Place(first[1] + (first[2] or ""), port, tasks, int(environment["SLURM_PROCID"]), _gpus_of_task(environment))


def _gpus_of_task(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of a Slurm task that shares its node with others; None where it sees no others, or is alone."""
    local = int(environment.get("SLURM_LOCALID") or 0)
    # "8(x3),4": tasks on each node.
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE") or "1")
    per_node = [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]
    node = int(environment.get("SLURM_NODEID") or 0)
    here = per_node[node] if node < len(per_node) else 1
    visible = [gpu for gpu in (environment.get("CUDA_VISIBLE_DEVICES") or "").split(",") if gpu]
    if here == 1 or len(visible) < here:
        return None
    share = len(visible) // here
    return tuple(range(local * share, (local + 1) * share))


def _gke_tpu(environment: Mapping[str, str]) -> Place | None:
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if not hosts:
        return None
    return _tpu(hosts.split(","), environment.get("TPU_WORKER_ID"), environment)


def _tpu_vm(environment: Mapping[str, str]) -> Place | None:
    # Only asked on machines with TPUs: elsewhere it takes seconds until the server's name is not found.
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    asked = environment.get("GCE_METADATA_IP") or chips and importlib.util.find_spec("libtpu")
    if not asked or environment.get("TPU_SKIP_MDS_QUERY") or "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return None
    ask = _metadata(environment.get("GCE_METADATA_IP") or "metadata.google.internal")
    workers, number = ask("worker-network-endpoints"), ask("agent-worker-number")
    if not workers or number is None:
        return None
    lines = (line.partition(":") for line in (ask("tpu-env") or "").splitlines())
    settings = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    # HOST, or in the older format name:number:address.
    hosts = [worker.split(":")[2] if worker.count(":") == 2 else worker for worker in workers.split(",")]
    return _tpu(hosts, number, settings | {k: v for k, v in environment.items() if k.startswith("MEGASCALE_")})


def _tpu(hosts: list[str], worker: str | None, slices: Mapping[str, str]) -> Place | None:
    """hosts: of this slice. Processes are numbered slice by slice, and process 0 is in the first slice."""
    count = int(slices.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * count < 2:
        return None
    if worker is None:
        raise UserError("TPU_WORKER_HOSTNAMES names several hosts and TPU_WORKER_ID is not set; set it to 0, 1, …")
    first = slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    process_id = int(slices.get("MEGASCALE_SLICE_ID") or 0) * len(hosts) + int(worker)
    return Place(first.split(":")[0], COORDINATOR_PORT, len(hosts) * count, process_id)


def _metadata(server: str) -> Callable[[str], str | None]:
    # Without a proxy, which could not reach this link-local server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(name: str) -> str | None:
        url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with opener.open(request, timeout=5) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, OSError):
            return None

    return ask
