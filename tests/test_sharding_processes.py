"""Which process this is: what each launcher leaves in the environment, as its documentation has it."""

import http.server
import threading

import pytest

from espalier.errors import UserError
from sharding.processes.discovery import DistributedConfig, Place, find_place

SRUN = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc", "TPU_WORKER_ID": "1"}
JAX = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


def place(environment: dict[str, str], **flags) -> Place | None:
    return find_place(DistributedConfig(**flags), environment)


def test_alone_where_nothing_says_otherwise():
    assert place({}) is None
    assert place({"JOB_COMPLETION_INDEX": "3", "JAX_PROCESS_ID": "1"}) is None
    assert place({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    assert place(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}) is None
    assert place(SRUN, processes=1) is None


def test_flags_and_variables():
    assert place({}, coordinator="h:1", processes=2, process_id=1) == Place("h", 1, 2, 1)
    assert place({}, coordinator="[::1]:80", processes=2, process_id=0) == Place("::1", 80, 2, 0)
    assert place(JAX) == Place("host", 1234, 3, 2)
    assert place(JAX | SRUN, process_id=0) == Place("host", 1234, 3, 0), "flags, then variables, then launchers"
    indexed = JAX | {"JOB_COMPLETION_INDEX": "1"}
    assert place(indexed) == Place("host", 1234, 3, 2)
    del indexed["JAX_PROCESS_ID"]
    assert place(indexed) == Place("host", 1234, 3, 1)


@pytest.mark.parametrize(
    "environment, flags, message",
    [
        (
            {},
            {"coordinator": "h:1"},
            "--distributed.coordinator=h:1 without --distributed.processes and --distributed.pr",
        ),
        ({}, {"process_id": 0}, "without --distributed.coordinator and --distributed.processes"),
        ({"JAX_NUM_PROCESSES": "2"}, {}, "JAX_NUM_PROCESSES=2 without"),
        (JAX, {"processes": 2}, "JAX_PROCESS_ID=2 of --distributed.processes=2: they count from 0 to 1"),
        (JAX | {"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES=two is not a whole number"),
        (JAX, {"process_id": -1}, "--distributed.process-id=-1 is not a whole number"),
        (JAX, {"coordinator": "host"}, "--distributed.coordinator=host is not HOST:PORT"),
        (JAX, {"coordinator": "host:70000"}, "is not HOST:PORT"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {}, "has 4 tasks and srun did not start"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, "TPU_WORKER_ID is not set"),
    ],
)
def test_what_does_not_fit_together(environment, flags, message):
    with pytest.raises(UserError) as error:
        place(environment, **flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_numbers_that_cannot_be():
    for changes in ({"processes": 0}, {"timeout": 0}):
        with pytest.raises(UserError, match="distributed"):
            DistributedConfig(**changes)


@pytest.mark.parametrize(
    "nodes, first",
    [("node7", "node7"), ("node7,other9", "node7"), ("node[007-009,12],other3", "node007"), ("n[5,7]", "n5"),
     ("gpu-a-[12-13]", "gpu-a-12")],
)  # fmt: skip
def test_slurm(nodes, first):
    found = place(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert found is not None and (found.host, found.processes, found.process_id) == (first, 4, 2)
    assert found.local_devices is None, "a task that has its node has all of its GPUs"
    assert 61440 <= found.port < 2**16
    beside = place(SRUN | {"SLURM_STEP_ID": "1"})
    assert beside is not None and beside.port != found.port, "two steps of a job side by side"


@pytest.mark.parametrize(
    "tasks, node, local, visible, devices",
    [
        ("8(x4)", 2, 3, "0,1,2,3,4,5,6,7", (3,)),
        ("2(x4)", 2, 1, "0,1,2,3,4,5,6,7", (4, 5, 6, 7)),
        ("8(x4)", 2, 3, "5", None),  # --gpus-per-task: it sees its own alone
        ("1,1,4", 2, 1, "0,1,2,3", (1,)),
        ("1(x2),4", 0, 0, "0,1,2,3", None),
        ("2(x4)", 2, 1, "", None),
    ],
)
def test_the_gpus_of_tasks_that_share_a_node(tasks, node, local, visible, devices):
    more = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    found = place(SRUN | more | {"CUDA_VISIBLE_DEVICES": visible})
    assert found is not None and found.local_devices == devices


def test_tpus_on_gke():
    assert place(GKE) == Place("a-0.svc", 8482, 2, 1)
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080"}
    assert place(GKE | slices) == Place("first.svc", 8482, 6, 5)
    one_host = GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert place(one_host | slices) == Place("first.svc", 8482, 3, 2)


@pytest.fixture
def metadata_server():
    """An imitation of Google Cloud's; returns (its address, the attributes that it knows)."""
    attributes: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rsplit("/", 1)[1])
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((value or "").encode() if known else b"")

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    yield f"127.0.0.1:{server.server_port}", attributes
    server.shutdown()
    server.server_close()


def test_tpu_virtual_machines(metadata_server):
    address, attributes = metadata_server
    environment = {"GCE_METADATA_IP": address}
    assert place(environment) is None
    attributes |= {"worker-network-endpoints": "w:0:10.0.0.5,w:1:10.0.0.6", "agent-worker-number": "1"}
    assert place(environment) == Place("10.0.0.5", 8482, 2, 1)
    attributes["worker-network-endpoints"] = "10.0.0.7,10.0.0.8"
    assert place(environment) == Place("10.0.0.7", 8482, 2, 1)
    attributes["tpu-env"] = "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    attributes["tpu-env"] += "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n"
    assert place(environment) == Place("10.0.0.1", 8482, 4, 3)
    assert place(environment | {"JAX_PLATFORMS": "cpu"}) is None
    attributes["worker-network-endpoints"] = "10.0.0.7"
    attributes["tpu-env"] = ""
    assert place(environment) is None
