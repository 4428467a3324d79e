"""What the first group chooses for the whole run (`attention: auto`), on a real Ray, with a fake kernel."""

from __future__ import annotations

import json

import pytest

from tests.support.runs import command, finish, records, render, start, wait_for, write_config, write_manifest

CHOOSING = "tests.support.doubles:ChoosingEngine"


def config(folder, marks, kernels, *, groups=1, **options):
    return write_config(
        folder,
        marks,
        {"kernels": kernels, **options},
        model={"engine": CHOOSING},
        groups={"count": groups},
        parallel={"ulysses_degree": 1},
    )


def kernels(output):
    return {key: record["places"]["denoise"]["kernel"] for key, record in records(output).items()}


def recorded(output):
    return json.loads((output / "choices.json").read_text())["choices"]["kernel"]


@pytest.mark.slow
def test_two_groups_that_start_at_once_use_one_kernel_and_a_rebuilt_one_keeps_it(ray_head, tmp_path, marks):
    """P3: each group would choose another kernel; one is recorded, before the first denoise, and both use it. So does
    the group that replaces one which was killed.
    """
    output = tmp_path / "out"
    both = config(tmp_path, marks, ["one", "two", "three"], groups=2, together=2)
    code, text = render(both, write_manifest(tmp_path, ["a", "b !kill-denoise-once", "c"]), output, ray_head[0])
    assert code == 0, text
    kernel = recorded(output)
    assert kernels(output) == dict.fromkeys(("s00", "s01", "s02"), kernel)
    assert records(output)["s01"]["attempts"] == 2
    assert f"this run uses kernel {kernel}" in text
    assert len((marks / "choosing").read_text().split()) == 2


@pytest.mark.slow
def test_a_resume_keeps_the_kernel(ray_head, tmp_path, marks):
    """P2, P3: a later command that continues the root uses its kernel, although its group would choose another one."""
    output = tmp_path / "out"
    code, text = render(
        config(tmp_path, marks, ["one", "two"]), write_manifest(tmp_path, ["a", "b"]), output, ray_head[0]
    )
    assert code == 0, text
    assert recorded(output) == "one"
    later = config(tmp_path, marks, ["two", "one"])
    code, text = render(later, write_manifest(tmp_path, ["a", "b", "one more"]), output, ray_head[0])
    assert code == 0, text
    assert set(kernels(output).values()) == {"one"}
    assert len(kernels(output)) == 3
    assert len((marks / "choosing").read_text().split()) == 1


@pytest.mark.slow
def test_a_node_that_cannot_run_the_chosen_kernel_is_excluded_by_name(fleet, tmp_path, marks):
    """P5: the run has chosen on the first node. A second one that cannot run the kernel is excluded, and the warning
    names it and the kernel; the run ends on the first.
    """
    fleet.add_node(gpus=1)
    setup = config(tmp_path, marks, ["fast", "slow"], groups=2, hold_after=[1])
    output = tmp_path / "out"
    driver = start(command(setup, write_manifest(tmp_path, ["one", "two", "three"]), output, fleet.address))
    wait_for(lambda: (marks / "steps").exists(), "a step")
    for number in range(2, 10):  # the next node takes one of these addresses
        (marks / f"kernels-127.0.0.{number}").write_text("slow")
    node = fleet.add_node(gpus=1)
    unable = node.node_ip_address
    lines = []
    while not lines or "is excluded for the rest of this run" not in lines[-1]:
        lines.append(driver.stdout.readline())
        assert lines[-1], "".join(lines)
    (marks / "go-1").touch()
    code, text = finish(driver)
    assert code == 0, text
    assert f"node {unable}" in lines[-1]
    assert "the run has chosen kernel fast, and this node cannot run it" in lines[-1]
    assert set(kernels(output).values()) == {"fast"}
    assert len(records(output)) == 3
