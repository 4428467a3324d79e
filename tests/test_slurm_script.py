"""cluster/slurm.sbatch with stand-ins for the commands of Slurm and Ray: exit code, signals, folders, processes."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.support.repository import ROOT
from tests.support.stand_ins import pretend, seeing

SCRIPT = ROOT / "cluster" / "slurm.sbatch"


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for the commands of Slurm and Ray that record their calls; returns how to start the script."""
    note = f'echo "$(basename "$0") $*" >> {tmp_path}/calls'
    pretend(tmp_path, "srun", f'{note}; while [[ $1 == --* ]]; do shift; done; exec "$@"')
    pretend(tmp_path, "scontrol", f"[[ $1 == show ]] && printf 'localhost\\nother\\n' || {note}")
    pretend(tmp_path, "ray", f"{note}; [[ $1 == health-check ]] || exec sleep 60")

    def start(driver, **more):
        pretend(tmp_path, "hv-batch", f"{note}; {driver}")
        environment = seeing(tmp_path, SLURM_JOB_ID="77", SLURM_JOB_NODELIST="any", **more)
        command = [SCRIPT, "--config", "C"]
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
    assert any(
        call.startswith("srun --nodes=1 --ntasks=1 --exclude=localhost --cpu-bind=none ray start --block")
        for call in calls
    )
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


LONG = "/local/scratch/slurm/some-user/job.1234567"


@pytest.mark.parametrize(
    ("folder", "used", "code", "removed"),
    [
        ("/local/job.77", "/local/job.77", 0, False),
        (LONG, "/tmp/hv-77", 0, True),
        (LONG, "/tmp/hv-77", 1, False),  # the logs in it say what happened
    ],
)
def test_a_long_folder_of_a_slurm_job_is_replaced(slurm, folder, used, code, removed):
    """Ray adds up to 68 bytes to its folder, and the path of a socket has at most 107."""
    longest = len(f"{used}/ray/session_2026-11-29_01-45-36_123456_1234567/sockets/plasma_store")
    assert longest <= 107
    job = slurm(f'echo "$RAY_TMPDIR"; exit {code}', RAY_TMPDIR="", TMPDIR=folder)
    assert used in job.communicate(timeout=30)[0].splitlines()
    assert ("srun --ntasks-per-node=1 rm -rf /tmp/hv-77" in slurm.calls()) == removed
