"""The files of cluster/: their commands parse, their nodes suffice, and their README quotes the code's messages."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hv_batch.cli.main import app
from hv_batch.job.config.run_config import load_config
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.runtime.nodes.resources import can_place, minimum_resources
from tests.support.repository import ROOT
from tests.support.stand_ins import pretend, seeing

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
    start = next(number for number, word in enumerate(words) if Path(word).name == "hv-batch")
    name, *arguments = words[start + 1 :]
    assert name in {"run", "nightly"}
    given = click_command(name).make_context(name, list(arguments)).params
    assert given["manifest"]
    return load_config(str(ROOT / "configs" / Path(given["config"]).stem) + ".yaml", given["overrides"] or [])


def click_command(name):
    from typer.main import get_command

    return get_command(app).commands[name]


def hv_batch_command(entrypoint):
    (script,) = re.findall(r"bash -c '(.*)'", entrypoint)
    (command,) = [part for part in re.split(r"\|\||;", script) if "hv-batch " in part]
    return command


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
    pretend(tmp_path, "date", "echo 22")
    entrypoint = job_of(f"kuberay-{name}.yaml")["entrypoint"].replace("/tmp", str(tmp_path))
    words = shlex.split(entrypoint)  # by the shell of KubeRay's submitter; `ray job submit` joins them again
    done = subprocess.run(shlex.join(words), shell=True, env=seeing(tmp_path))
    assert (done.returncode != 0) == (code in failures)


@pytest.mark.parametrize(("hour", "renders"), [("05", True), ("06", False), ("09", False), ("19", False), ("20", True)])
def test_a_night_that_is_repeated_by_day_does_not_render_until_the_next_morning(tmp_path, hour, renders):
    """`--until 06:30` means the next 06:30: after a failure at 06:40, a new cluster would render for a day."""
    pretend(tmp_path, "hv-batch", f"touch {tmp_path}/renders")
    pretend(tmp_path, "date", f"echo {hour}")
    entrypoint = job_of("kuberay-nightly.yaml")["entrypoint"]
    assert not subprocess.run(entrypoint, shell=True, env=seeing(tmp_path)).returncode
    assert (tmp_path / "renders").exists() == renders
    condition = unit_section("Service")["ExecCondition"].replace("%%", "%").replace("$$", "$")
    assert (subprocess.run(condition, shell=True, env=seeing(tmp_path)).returncode == 0) == renders


def test_the_nightly_job_differs_from_the_other_in_command_and_deadline_alone():
    nightly, once = job_of("kuberay-nightly.yaml"), job_of("kuberay-rayjob.yaml")
    own = {"entrypoint": "", "activeDeadlineSeconds": 0}
    assert {**nightly, **own} == {**once, **own}


def test_every_pod_mounts_the_weights_that_the_command_names():
    """P6: the driver identifies the weights before a GPU is taken, so the head pod needs them like the workers."""
    job = job_of("kuberay-rayjob.yaml")
    cluster = job["rayClusterSpec"]
    base = ordered(hv_batch_command(job["entrypoint"])).model.options["model_base"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == base]
        assert [volume for volume in spec["volumes"] if volume["name"] == name]


def test_no_pod_runs_as_root_and_the_image_names_its_user_by_number():
    """`runAsNonRoot` refuses a pod whose image has a user name, which may be root's."""
    job = job_of("kuberay-rayjob.yaml")
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [job["submitterPodTemplate"], *(group["template"] for group in groups)]
    (user,) = re.findall(r"^USER (\d+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    for template in templates:
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == int(user) > 0


# A driver that counts its signals. At the first one it drains for a moment.
DRAINS = """trap 'echo TERM >> {folder}/signals' TERM
touch {folder}/runs
until [ -e {folder}/signals ]; do sleep 0.02; done
for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.05; done
touch {folder}/drained
exit 143"""

# As `ray job stop`: signals the driver and its shells.
STOP_JOB = "kill -TERM $(pgrep -x bash) $(pgrep -x hv-batch); until [ -e signals ]; do sleep 0.02; done; "


@pytest.mark.parametrize(("before", "is_evicted"), [("", True), (STOP_JOB, False)], ids=["eviction", "deletion"])
def test_the_end_of_the_head_pod_waits_for_the_drain(tmp_path, before, is_evicted):
    """P4: a driver gets one signal, because a second one ends the drain, and the pod stays until it has ended.

    The command and the hook run in a namespace of their own, as in a pod, because the hook names processes.
    """
    job = job_of("kuberay-nightly.yaml")
    pod = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain_s = ordered(hv_batch_command(job["entrypoint"])).timeouts.drain_s
    (wait_s,) = [int(each["value"]) for each in container["env"] if each["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert drain_s < wait_s < pod["terminationGracePeriodSeconds"]
    bash, option, hook = container["lifecycle"]["preStop"]["exec"]["command"]
    (tmp_path / "hook").write_text(hook.replace("/tmp", str(tmp_path)))
    (tmp_path / "command").write_text(job["entrypoint"].replace("/tmp", str(tmp_path)))
    pretend(tmp_path, "hv-batch", DRAINS.format(folder=tmp_path))
    pretend(tmp_path, "date", "echo 05")
    script = f"""cd {tmp_path}; (sh ./command; echo $? > code) &
        until [ -e runs ]; do sleep 0.02; done
        {before}{bash} {option} "$(cat hook)"; ls > after; wait"""
    in_namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*in_namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces")
    subprocess.run([*in_namespace, "sh", "-c", script], env=seeing(tmp_path), timeout=30, capture_output=True)
    assert (tmp_path / "signals").read_text() == "TERM\n"
    assert "drained" in (tmp_path / "after").read_text().split()
    # The command also ends with 143 if the night is over, which needs no new cluster. An eviction needs one.
    assert not is_evicted or (tmp_path / "code").read_text() != "0\n"
    assert (tmp_path / "evicted").exists()


@pytest.mark.slow  # the imports of the command take seconds
def test_the_process_of_the_driver_has_the_name_that_the_hook_signals():
    command = [Path(sys.executable).with_name("hv-batch"), "config", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
        driver.stdout.read(1)  # its imports are done
        assert Path(f"/proc/{driver.pid}/comm").read_text() == "hv-batch\n"


@pytest.mark.parametrize("name", ["ray-up-aws.yaml", "ray-up-gcp.yaml"])
def test_the_machines_of_ray_up_hold_every_group_that_the_command_asks_for(name):
    cluster = yaml.safe_load((CLUSTER / name).read_text())
    nodes = [
        kind["resources"]
        for kind in cluster["available_node_types"].values()
        for _ in range(kind["max_workers"])
    ]  # fmt: skip
    assert len(nodes) == cluster["max_workers"]
    command = " ".join(re.findall(r"^# +(.*)$", (CLUSTER / name).read_text(), re.MULTILINE))
    command = re.search(r"hv-batch run .*groups\.count=\d+", command.replace("\\", ""))[0]
    config = ordered(command)
    assert can_place(as_many_as_asked(config), nodes)
    base = config.model.options["model_base"]
    assert f"--volume {base}:{base}:ro" in cluster["docker"]["run_options"]  # on the head, too (P6)


@pytest.mark.parametrize(("gpus", "overrides"), [(8, []), (1, ["parallel.gpus_per_group=1"])])
def test_the_containers_of_compose_fit_on_one_machine(gpus, overrides):
    text = (CLUSTER / "compose.yaml").read_text()
    assert all(override in text for override in overrides)
    service = yaml.safe_load(text)["services"]["render"]
    config = ordered(" ".join([service["command"], *overrides]))
    assert can_place(as_many_as_asked(config), [{"CPU": 64.0, "GPU": float(gpus)}])
    assert not can_place(as_many_as_asked(config), [{"CPU": 64.0, "GPU": gpus - 1.0}])
    (minutes,) = re.findall(r"^(\d+)m$", service["stop_grace_period"])
    assert 60 * int(minutes) > config.timeouts.drain_s
    assert f":{config.model.options['model_base']}:ro" in service["volumes"][0]


def unit_section(name):
    unit = configparser.RawConfigParser(strict=False)
    unit.read_string((CLUSTER / "hv-batch-nightly.service").read_text().replace("\\\n", " "))
    return unit[name]


def test_systemd_lets_the_driver_drain():
    """P4: SIGTERM reaches the driver alone, which needs its workers, and nothing is killed before the drain ends."""
    service = unit_section("Service")
    config = ordered(service["ExecStart"])
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > config.timeouts.drain_s
    assert set(service["SuccessExitStatus"].split()) == {"3", "4", "143"}


def test_the_image_is_built_from_what_there_is():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extras,) = (line.partition("=")[2].split(",") for line in lines if line.startswith("ARG EXTRAS"))
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"], project["project"]["readme"]} <= set(copied)


def test_the_image_has_the_programs_that_ray_and_kuberay_call_in_it():
    """`ray up` runs rsync in the container, and ssh in that of the head; it reads HOME from the image's variables."""
    text = (CLUSTER / "Dockerfile").read_text()
    (packages,) = re.findall(r"apt-get install [^&]*", text)
    assert {"openssh-client", "procps", "rsync", "wget"} <= set(packages.split())
    (home,) = re.findall(r"^ENV HOME=(\S+)$", text, re.MULTILINE)
    for name in ("ray-up-aws.yaml", "ray-up-gcp.yaml"):
        mounts = yaml.safe_load((CLUSTER / name).read_text())["file_mounts"]
        assert mounts == {f"{home}/.ray/auth_token": "~/.ray/auth_token"}


def test_the_commands_of_the_first_steps_parse():
    text = (CLUSTER / "start.md").read_text().replace("\\\n", "")
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "hv-batch " in line]
    parsed = [parse(shlex.split(line, comments=True)) for line in commands if re.search(r"(^|-- ) *hv-batch \w", line)]
    assert {"fetch", "plan", "report", "run", "status"} <= set(parsed)


def parse(words):
    """The name of the command that the words after `hv-batch` give."""
    from typer.main import get_command

    command, words = get_command(app), words[words.index("hv-batch") + 1 :]
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)
    return command.name


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
