"""The files of cluster/ are valid for the tools that read them: unknown fields and doubtful shell code fail."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import jsonschema
import pytest
import yaml
from docker.utils.build import exclude_paths
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.support.kubernetes_schema import KINDS, URI
from tests.support.repository import DATA, ROOT

CLUSTER = ROOT / "cluster"


def checked_by(tool, *arguments):
    """Run a program that is installed beside Python, as those of the `test` extra."""
    program = Path(sys.executable).with_name(tool)
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# Kubernetes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kubernetes_types():
    """The types of Kubernetes, in which unknown fields are refused."""
    types = Resource.from_contents(json.loads((DATA / "crds" / "kubernetes.json").read_text()), DRAFT202012)
    return Registry().with_resource(URI, types)


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def faults(document, kubernetes_types):
    kind = document["kind"]
    if kind in KINDS:
        schema = {"$ref": f"{URI}#/$defs/{KINDS[kind]}"}
    else:
        schema = json.loads((DATA / "crds" / f"{kind}.json").read_text())
    validator = jsonschema.Draft202012Validator(schema, registry=kubernetes_types)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(document)]


CUSTOM_RESOURCES = ["kuberay-nightly.yaml", "kuberay-pod-monitor.yaml", "kuberay-rayjob.yaml"]


@pytest.mark.parametrize("name", CUSTOM_RESOURCES)
def test_the_crd_has_every_field_of_a_custom_resource(name, kubernetes_types):
    """The CRDs are those of the oldest version that the file names: an API server drops or refuses unknown fields."""
    (document,) = documents(name)
    assert not faults(document, kubernetes_types)


@pytest.mark.parametrize(
    "path",
    [
        ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0],
        ["spec", "rayClusterSpec", "workerGroupSpecs", 0],
        ["spec", "submitterPodTemplate", "spec", "securityContext"],
        ["spec"],
    ],
)
def test_a_field_that_the_crd_does_not_have_is_found(path, kubernetes_types):
    (document,) = documents("kuberay-rayjob.yaml")
    place = document
    for step in path:
        place = place[step]
    place["timeZone"] = "Etc/UTC"  # of another kind
    assert faults(document, kubernetes_types)


@pytest.mark.parametrize("name", ["kuberay-network-policy.yaml", "kuberay-weights.yaml"])
def test_kubernetes_knows_every_field_of_its_own_kinds(name, kubernetes_types):
    for document in documents(name):
        assert not faults(document, kubernetes_types)
        assert faults({**document, "spec": {**document["spec"], "timeZone": "Etc/UTC"}}, kubernetes_types)


# Ray's cluster launcher -----------------------------------------------------------------------------------------------


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """An AWS account with the stack of aws-roles.yaml for the bucket `bucket`."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes an SSH key
    with mock_aws():
        boto3.client("cloudformation").create_stack(
            StackName="hv-batch",
            TemplateBody=(CLUSTER / "aws-roles.yaml").read_text(),
            Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "bucket"}],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        yield


@pytest.mark.parametrize("name", ["ray-up-aws.yaml", "ray-up-gcp.yaml"])
def test_ray_up_accepts_its_file(name):
    validate_config(prepare_config(yaml.safe_load((CLUSTER / name).read_text())))


def test_every_aws_machine_can_write_to_the_bucket_and_holds_the_weights(aws):
    """Ray's own code starts a machine of each type. By default it gives an instance profile to the head only."""
    cluster = bootstrap_aws(prepare_config(yaml.safe_load((CLUSTER / "ray-up-aws.yaml").read_text())))
    provider = AWSNodeProvider(cluster["provider"], cluster["cluster_name"])
    ec2 = boto3.client("ec2")
    for kind, settings in cluster["available_node_types"].items():
        (machine,) = provider.create_node(settings["node_config"], {"ray-user-node-type": kind}, 1).values()
        (found,) = ec2.describe_instances(InstanceIds=[machine.id])["Reservations"][0]["Instances"]
        profile = found["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        may_write = {"arn:aws:s3:::bucket/*"} & {
            right["Resource"] for right in rights(profile) if "s3:PutObject" in right["Action"]
        }
        assert may_write, kind
        disk = found["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
        assert ec2.describe_volumes(VolumeIds=[disk])["Volumes"][0]["Size"] >= 200, kind  # 45 GB are weights
        assert "deeplearning" in settings["node_config"]["ImageId"], kind  # Ray's default has an old driver

    assert {"Effect": "Allow", "Action": "iam:PassRole", "Resource": role_of("hv-batch-node")["Arn"]} in rights(
        "hv-batch-head"
    )  # without it, the head cannot start a machine that has a profile


def role_of(profile):
    (role,) = boto3.client("iam").get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
    return role


def rights(profile):
    """The statements of the policies of a profile; moto does not attach those that AWS defines."""
    role = boto3.resource("iam").Role(role_of(profile)["RoleName"])
    documents = [policy.policy_document for policy in role.policies.all()]
    documents += [policy.default_version.document for policy in role.attached_policies.all()]
    # moto gives some documents as the text of a Python value.
    parsed = [ast.literal_eval(text) if isinstance(text, str) else text for text in documents]
    return [statement for document in parsed for statement in document["Statement"]]


def test_every_gcp_machine_has_an_account():
    """Ray gives an account to the head only, so without these lines no worker could write to the bucket."""
    cluster = yaml.safe_load((CLUSTER / "ray-up-gcp.yaml").read_text())
    for kind, settings in cluster["available_node_types"].items():
        (account,) = settings["node_config"]["serviceAccounts"]
        assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"], kind


@pytest.mark.slow
def test_the_template_of_the_aws_roles_is_valid():
    if shutil.which("cfn-lint") is None:
        pytest.skip("cfn-lint is not installed: pip install cfn-lint")
    checked_by("cfn-lint", CLUSTER / "aws-roles.yaml")


# Docker, systemd, shell -----------------------------------------------------------------------------------------------


def test_hadolint_accepts_the_dockerfile():
    checked_by("hadolint", CLUSTER / "Dockerfile")


def test_the_build_context_is_what_the_dockerfile_copies():
    """No weights, output roots or caches are sent to Docker, and nothing that is copied is left out."""
    patterns = [
        line for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    sent = {Path(path) for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file()}
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [Path(word) for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all(any(path == source or source in path.parents for path in sent) for source in copied)
    assert all(any(path == source or source in path.parents for source in copied) for path in sent)
    assert not [path for path in sent if "__pycache__" in path.parts]


def test_docker_compose_knows_every_field():
    checked_by("check-jsonschema", "--builtin-schema", "vendor.compose-spec", CLUSTER / "compose.yaml")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_knows_every_line_of_the_units(tmp_path):
    for path in CLUSTER.glob("hv-batch-nightly.*"):
        text = path.read_text().replace("/opt/hv_batch/bin/hv-batch", "/bin/true")  # which must exist
        (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *tmp_path.iterdir()], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", [".ci/run", "cluster/slurm.sbatch"])
def test_shellcheck_accepts_the_script(script):
    checked_by("shellcheck", ROOT / script)
