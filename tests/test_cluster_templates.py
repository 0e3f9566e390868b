"""Templates of cluster/ and the image: filled in they are valid, and start the processes that they promise."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.render import main, render, settings
from espalier.errors import UserError
from sharding.processes.discovery import DistributedConfig, Place, find_place

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEMPLATES = sorted(ROOT.glob("cluster/*/*.yaml"))
ARGUMENTS = ("clm", "gpt2", "--data.files", "/shared/te xt/*.gz", "--run-dir", '/shared/$HOME/$(A) it\'s "一"')
GIVEN = {"IMAGE": "registry.lab/espalier:1", "BUCKET": "gs://bucket"}
SCHEMAS = ROOT / "tests" / "schemas"
"""Of JobSet's resource definition (without the Jobs within, which are held to Kubernetes' own) and of SkyPilot's tasks,
as their repositories have them (Apache 2.0), without descriptions."""
KUBERNETES = "1.37"


def filled(path, **more):
    template = path.read_text()
    given = {name: value for name, value in (GIVEN | more).items() if name in settings(template)}
    return list(yaml.safe_load_all(render(template, given, ARGUMENTS)))


def jobs(parts):
    """The Jobs that a file makes, as Kubernetes knows them."""
    for part in parts:
        if part["kind"] == "Job":
            yield part
        elif part["kind"] == "JobSet":
            for each in part["spec"]["replicatedJobs"]:
                yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": each["name"]}} | each["template"]


def container(parts):
    (job,) = jobs(parts)
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return job, only


def test_there_is_a_page_for_each_place_and_nothing_else():
    folders = {path.name for path in (ROOT / "cluster").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"tpu", "gke", "kubernetes", "slurm", "skypilot"}
    for folder in folders:
        page = (ROOT / "cluster" / folder / "README.md").read_text()
        assert "## What was really run" in page and "**Not run:**" in page
    for path in (ROOT / "cluster").glob("**/README.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_nothing_is_left_to_fill_in_and_every_setting_is_used(path):
    template = path.read_text()
    lines = [line for line in template.splitlines() if not line.lstrip().startswith("#")]
    used = set(re.findall(r"\$\{([A-Z_]+)\}", "\n".join(lines)))
    assert used - {"ARGUMENTS", "COMMAND"} == set(settings(template))
    assert not re.search(r"\$\{[A-Z]", json.dumps(filled(path)))
    required = [name for name, value in settings(template).items() if value is None]
    with pytest.raises(UserError, match=f"{required[0]} must be given"):
        render(template, {}, ARGUMENTS)


@pytest.mark.parametrize("path", [path for path in TEMPLATES if path.parent.name != "skypilot"], ids=str)
def test_kubernetes_takes_it(path):
    parts = filled(path)
    for part in parts:
        if part["kind"] == "JobSet":
            jsonschema.validate(part, json.loads((SCHEMAS / "jobset-v1alpha2.json").read_text()))
        else:
            kubernetes_validate.validate(part, KUBERNETES, strict=True)
    for job in jobs(parts):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
    job, only = container(parts)
    # Kubernetes makes $(A) of $$(A), and leaves the rest alone.
    assert tuple(word.replace("$$(", "$(") for word in only["args"]) == ARGUMENTS
    mounts = {mount["name"] for mount in only["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}


def test_the_schemas_notice_a_slip():
    (part,) = filled(ROOT / "cluster" / "gke" / "tpu.yaml")
    part["spec"]["failurePolicy"]["maxRestart"] = part["spec"]["failurePolicy"].pop("maxRestarts")
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(part, json.loads((SCHEMAS / "jobset-v1alpha2.json").read_text()))
    job, only = container(filled(ROOT / "cluster" / "kubernetes" / "gpu.yaml"))
    only["ressources"] = only.pop("resources")
    with pytest.raises(kubernetes_validate.ValidationError, match="ressources"):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


@pytest.mark.parametrize("name, host", [("kubernetes", "a-0.a"), ("gke", "a-run-0-0.a")])
def test_each_pod_with_gpus_finds_its_place(name, host):
    job, only = container(filled(ROOT / "cluster" / name / "gpu.yaml", HOSTS="3", NAME="a"))
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3 and job["spec"]["completionMode"] == "Indexed"
    environment = {each["name"]: each["value"] for each in only["env"]}
    for index in range(3):
        place = find_place(DistributedConfig(), environment | {"JOB_COMPLETION_INDEX": str(index)})
        assert place == Place(host, only["ports"][0]["containerPort"], 3, index)


def test_a_pod_of_a_tpu_slice_is_not_told_another_place_than_gke_tells():
    job, only = container(filled(ROOT / "cluster" / "gke" / "tpu.yaml", HOSTS="2"))
    set_by_gke = {"TPU_WORKER_HOSTNAMES": "h0,h1", "TPU_WORKER_ID": "1", "JOB_COMPLETION_INDEX": "1"}
    environment = {each["name"]: each["value"] for each in only["env"]} | set_by_gke
    assert find_place(DistributedConfig(), environment) == Place("h0", only["ports"][0]["containerPort"], 2, 1)
    assert job["spec"]["completions"] == 2


def stand_in(folder):
    """A launch.sh that writes its arguments and where it is, and ends with $CODE."""
    lines = ["#!/usr/bin/env bash", "[[ $1 != setup ]] || exit 0", 'printf "%s\\0" "$@" >said', "env >environment"]
    (folder / "launch.sh").write_text("\n".join([*lines, "exit ${CODE:-0}\n"]))
    (folder / "launch.sh").chmod(0o755)


def said(folder):
    return tuple((folder / "said").read_bytes().decode().split("\0")[:-1])


@pytest.mark.parametrize("hosts", [1, 2])
def test_skypilot_takes_it_and_it_starts_the_run(hosts, tmp_path):
    (task,) = filled(ROOT / "cluster" / "skypilot" / "gpu.yaml", HOSTS=str(hosts))
    schemas = json.loads((SCHEMAS / "skypilot-0.14.1.json").read_text())
    jsonschema.validate(task, schemas["task"])
    jsonschema.validate(task["resources"], schemas["resources"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task | {"node_count": 2}, schemas["task"])
    stand_in(tmp_path)
    ips = "\n".join(f"10.0.0.{number}" for number in range(hosts))
    set_by_sky = {"SKYPILOT_NODE_IPS": ips, "SKYPILOT_NUM_NODES": str(hosts), "SKYPILOT_NODE_RANK": str(hosts - 1)}
    environment = {"PATH": os.environ["PATH"]} | set_by_sky | task["envs"]
    subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=environment, check=True)
    assert said(tmp_path) == ARGUMENTS
    found = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    place = find_place(DistributedConfig(), found)
    assert place == (Place("10.0.0.0", 8482, 2, 1) if hosts == 2 else None)


@pytest.mark.parametrize("code, requeued", [(0, False), (143, True), (2, False)])
def test_slurm_hands_the_arguments_on_and_takes_up_what_was_saved(code, requeued, tmp_path):
    stand_in(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, script in {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": 'echo "$@" >requeued',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "CODE": str(code)}
    environment = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = [str(ROOT / "cluster" / "slurm" / "run.sh"), *ARGUMENTS]
    assert subprocess.run(script, cwd="/", env=environment).returncode == code
    assert said(tmp_path) == ARGUMENTS and (tmp_path / "requeued").exists() == requeued


@pytest.mark.parametrize(
    "words, message",
    [
        (["cluster/none.yaml", "--", "mlm"], "is not a file"),
        (["cluster/gke/tpu.yaml", "IMAGE", "--", "mlm"], "'IMAGE' is not NAME=VALUE"),
        (["cluster/gke/tpu.yaml", "IMAGE=a"], "nothing after --"),
        (
            ["cluster/gke/tpu.yaml", "IMAGE=a", "GPUS=8", "--", "mlm"],
            "GPUS is no setting of this template; it takes IMAGE",
        ),
        (["cluster/gke/tpu.yaml", "IMAGE=a", "HOSTS=two", "--", "mlm"], "HOSTS=two is not a whole number"),
    ],
)
def test_a_wrong_setting_is_named(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    assert end.value.code == 2 and message in captured.err and not captured.out


def test_commands_of_the_pages_render():
    """Those that call the renderer, word for word, with nothing but Python's own library."""
    found = 0
    for path in (ROOT / "cluster").glob("*/README.md"):
        for block in re.findall(r"^```\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("python3 -m cluster.render"):
                    words = shlex.split(re.split(r" \| | >", line)[0])
                    done = subprocess.run(
                        [sys.executable, "-S", "-P", *words[1:]],
                        cwd=ROOT,
                        env={"PYTHONPATH": str(ROOT)},
                        capture_output=True,
                    )
                    assert done.returncode == 0, done.stderr
                    assert list(yaml.safe_load_all(done.stdout))
                    found += 1
    assert found == 3


def test_the_image_is_what_the_package_needs():
    hadolint = pathlib.Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, "docker/Dockerfile"], cwd=ROOT, check=True)
    text = (ROOT / "docker" / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (listed,) = re.findall(r"# Empty for the CPU; (.*)\.", text)
    for name in listed.split(", "):
        assert extras[name] == [f"jax[{name}]"]
    assert 'ENTRYPOINT ["python", "-P", "-m", "espalier"]' in text
    assert 'exec "$python" -P -m espalier "$@"' in (ROOT / "launch.sh").read_text()
