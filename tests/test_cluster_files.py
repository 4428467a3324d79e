"""The files of cluster/: their commands parse, their nodes suffice, and their README quotes the code's messages."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from hv_batch.cli.main import app
from hv_batch.job.config.run_config import load_config
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.runtime.nodes.resources import can_place, minimum_resources
from tests.support.repository import ROOT

CLUSTER = ROOT / "cluster"


def job_of(name):
    document = yaml.safe_load((CLUSTER / name).read_text())
    return document["spec"].get("jobTemplate", document["spec"])


def pods(job):
    """The resources of each worker pod, as Ray counts them, repeated for every possible replica."""
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        requests = container["resources"]["requests"]
        yield from [{"CPU": float(requests["cpu"]), "GPU": float(requests["nvidia.com/gpu"])}] * group["maxReplicas"]


def ordered(command):
    """The config that a `hv-batch run|nightly` command names, with its overrides; the command line must parse."""
    words = shlex.split(command)
    name, *arguments = words[words.index("hv-batch") + 1 :]
    assert name in {"run", "nightly"}
    given = click_command(name).make_context(name, list(arguments)).params
    assert given["manifest"]
    return load_config(str(ROOT / "configs" / Path(given["config"]).name), given["overrides"] or [])


def click_command(name):
    from typer.main import get_command

    return get_command(app).commands[name]


def hv_batch_command(entrypoint):
    (script,) = re.findall(r"bash -c '(.*)'", entrypoint)
    return re.split(r"\|\||;", script)[0]


def as_many_as_asked(config):
    group, *pools = minimum_resources(resolve_run(config))
    return [group] * config.groups.count + pools


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-nightly.yaml"])
def test_the_pods_of_a_job_hold_every_group_that_its_command_asks_for(name):
    """P6: the example requests no group that its nodes cannot hold, which would wait forever."""
    job = job_of(name)
    config = ordered(hv_batch_command(job["entrypoint"]))
    assert can_place(as_many_as_asked(config), list(pods(job)))
    assert not can_place([*as_many_as_asked(config), minimum_resources(resolve_run(config))[0]], list(pods(job)))


@pytest.mark.parametrize("code", [0, 1, 3, 4, 143])
@pytest.mark.parametrize(("name", "failures"), [("rayjob", {1, 4, 143}), ("nightly", {1})])
def test_only_what_a_new_cluster_can_fix_fails_the_job(tmp_path, name, failures, code):
    """Exit codes: quarantined samples and the deadline of a night do not create a second cluster."""
    pretend(tmp_path, "hv-batch", f"exit {code}")
    entrypoint = job_of(f"kuberay-{name}.yaml")["entrypoint"]
    done = subprocess.run(entrypoint, shell=True, env=seeing(tmp_path))
    assert (done.returncode != 0) == (code in failures)


def test_the_nightly_job_differs_from_the_other_in_its_command_alone():
    nightly, once = job_of("kuberay-nightly.yaml"), job_of("kuberay-rayjob.yaml")
    assert {**nightly, "entrypoint": ""} == {**once, "entrypoint": ""}


def test_ray_up_accepts_its_file():
    cluster = yaml.safe_load((CLUSTER / "ray-up-aws.yaml").read_text())
    validate_config(prepare_config(cluster))
    nodes = [
        kind["resources"]
        for kind in cluster["available_node_types"].values()
        for _ in range(kind["max_workers"])
    ]  # fmt: skip
    assert len(nodes) == cluster["max_workers"]
    command = " ".join(re.findall(r"^# +(.*)$", (CLUSTER / "ray-up-aws.yaml").read_text(), re.MULTILINE))
    command = re.search(r"hv-batch run .*groups\.count=\d+", command.replace("\\", ""))[0]
    assert can_place(as_many_as_asked(ordered(command)), nodes)


def test_the_image_is_built_from_what_there_is():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extras,) = (line.partition("=")[2].split(",") for line in lines if line.startswith("ARG EXTRAS"))
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"], project["project"]["readme"]} <= set(copied)


# Slurm ----------------------------------------------------------------------------------------------------------------


def pretend(folder, name, script):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def seeing(folder, **more):
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **more}


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for the commands of Slurm and Ray that record their calls; returns how to start the script."""
    note = f'echo "$(basename "$0") $*" >> {tmp_path}/calls'
    pretend(tmp_path, "srun", f'{note}; while [[ $1 == --* ]]; do shift; done; exec "$@"')
    pretend(tmp_path, "scontrol", f"[[ $1 == show ]] && printf 'localhost\\nother\\n' || {note}")
    pretend(tmp_path, "ray", f"{note}; [[ $1 == health-check ]] || exec sleep 60")

    def start(driver):
        pretend(tmp_path, "hv-batch", f"{note}; {driver}")
        environment = seeing(tmp_path, SLURM_JOB_ID="77", SLURM_JOB_NODELIST="any")
        command = [CLUSTER / "slurm.sbatch", "--config", "C"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    start.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return start


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_slurm_job_ends_as_its_driver_does(slurm, code):
    """The driver gets the arguments, every node except the first gets a worker, and no process is left."""
    both_nodes_started = "until grep -q exclude= $(dirname $0)/calls; do sleep 0.02; done"
    assert slurm(f"{both_nodes_started}; exit {code}").wait(timeout=30) == code
    calls = slurm.calls()
    assert "hv-batch run --address 127.0.0.1:20077 --config C" in calls
    assert any(call.startswith("srun --nodes=1 --ntasks=1 --exclude=localhost ray start --block") for call in calls)
    assert not any("requeue" in call for call in calls)


def test_slurms_notice_reaches_the_driver_and_the_job_is_queued_again(slurm):
    """P4: at the time limit the driver drains and the job is queued again."""
    driver = "trap 'sleep 0.3; exit 143' TERM; echo driving; while :; do sleep 0.05; done"
    job = slurm(driver)
    while "driving" not in job.stdout.readline():
        pass
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 143
    assert "scontrol requeue 77" in slurm.calls()


def test_the_quoted_messages_are_those_of_the_code():
    """An operator who searches the troubleshooting table for a message must find it."""
    readme = (ROOT / "cluster" / "README.md").read_text()
    table = readme.partition("## Troubleshooting")[2]
    quotes = [re.sub("<[^>]+>", "<>", quote) for quote in re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)]
    messages = [
        text for path in (ROOT / "hv_batch").rglob("*.py") for text in string_texts(ast.parse(path.read_text()))
    ]
    assert len(quotes) > 15
    assert not [quote for quote in quotes if not any(quote in message for message in messages)]


def string_texts(tree: ast.Module) -> Iterator[str]:
    """The strings of a module; `<>` stands for the values in an f-string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
