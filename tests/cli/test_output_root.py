"""The commands for an output root: what they print, what they change, and their exit codes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.records import commits
from hv_batch.job.records.lease import LeaseHeldError, hold_lease
from hv_batch.job.records.lease_holder import read_lease, this_process
from hv_batch.job.redaction import MASK
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.cli_calls import files, hv_batch
from tests.support.rendered_roots import make_commit, make_sample
from tests.support.small_runs import real_media, run_small, some_samples

SAMPLES = some_samples(6, height=32, width=32, num_frames=5)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """A finished root with four real videos and two quarantined samples."""
    root = tmp_path_factory.mktemp("rendered") / "root"
    run_small(Store(str(root)), SAMPLES, poison={"s003", "s005"}, media=real_media)
    return root


@pytest.fixture
def root(rendered, tmp_path) -> str:
    """A copy that the test may change."""
    return str(shutil.copytree(rendered, tmp_path / "root"))


def test_verify_reports_faults_and_repairs_them(root):
    """Exit codes: 0 no faults, 3 faults, removed or not; without --remove nothing changes."""
    assert hv_batch("verify", root, "--deep")[0] == 0
    (media,) = Path(root).glob("data/*/s002-*")
    media.unlink()
    before = files(root)
    code, text = hv_batch("verify", root)
    assert code == 3
    assert "s002: media missing" in text
    assert files(root) == before
    code, text = hv_batch("verify", root, "--json", "--remove")
    assert code == 3
    assert json.loads(text)["faults"] == {"media missing": 1}
    run_small(Store(root), SAMPLES, poison={"s003", "s005"}, media=real_media)
    assert hv_batch("verify", root, "--deep")[0] == 0


def test_repair_renders_again_what_was_wrong(root, monkeypatch):
    """P2: faulty objects are removed, and those shards are rendered from run.json alone, with no lease held.

    The exit code is that of the run. Without a fault, nothing is rendered.
    """
    calls = []

    def render(config, manifest, output, *, selection, **options):
        calls.append((config.output.shard_size, manifest, output, selection.shards, options["address"]))
        assert read_lease(Store(root)) is None
        run_small(Store(root), SAMPLES, poison={"s003", "s005"}, media=real_media)
        return 3

    monkeypatch.setattr("hv_batch.runtime.render.render", render)
    monkeypatch.setattr("hv_batch.runtime.render.check_resume", lambda output, *, engines, hooks: None)
    assert hv_batch("verify", root, "--repair") == (0, hv_batch("verify", root)[1])
    assert not calls
    before = files(root)
    (media,) = Path(root).glob("data/shard-00001/s006-*")
    media.write_bytes(b"?")
    code, text = hv_batch("verify", root, "--repair", "--address", "10.0.0.1:6379")
    assert code == 3
    assert "s006: media size" in text
    assert calls == [(4, "/nights/<b>prompts</b>.jsonl", root, (range(1, 2),), "10.0.0.1:6379")]
    assert files(root).keys() == before.keys()
    assert media.read_bytes() == before[str(media)]
    Path(root, layout.SUMMARY).unlink()
    assert hv_batch("verify", root, "--repair")[0] == 3
    assert calls[1][3] == (), "the run as a whole"


@pytest.mark.parametrize("flag", ["--remove", "--repair"])
def test_a_damaged_plan_stays_if_the_manifest_is_gone(root, flag):
    """P2: plan/index.json is removed only if the run command can write it again."""
    Path(root, "plan").mkdir(exist_ok=True)
    Path(root, layout.INDEX).write_text("?")
    before = files(root)
    with pytest.raises(UserError, match=r"Nothing was removed .*prompts.*is missing or was changed"):
        hv_batch("verify", root, flag)
    assert files(root) == before


def test_repair_makes_all_checks_of_resume_before_it_removes_anything(root):
    """P2: the weights that run.json names are not here, so nothing could be rendered again."""
    (media,) = Path(root).glob("data/*/s002-*")
    media.write_bytes(b"?")
    before = files(root)
    with pytest.raises(UserError, match=r"model_base|prompts"):
        hv_batch("verify", root, "--repair")
    assert files(root) == before


def test_what_could_not_be_rendered_again_is_not_removed(root):
    """P2: if run.json lacks a secret, the run cannot be resumed, so --repair must remove nothing."""
    run = json.loads(Path(root, layout.RUN).read_text())
    run["config"]["model"]["options"] = {"model_base": MASK}
    Path(root, layout.RUN).write_text(json.dumps(run))
    (media,) = Path(root).glob("data/*/s002-*")
    media.unlink()
    before = files(root)
    with pytest.raises(UserError, match="contained a secret"):
        hv_batch("verify", root, "--repair")
    assert files(root) == before


def test_retry_first_says_what_it_would_do(root):
    """P2: nothing is changed without --yes; with it the samples are pending again."""
    before = files(root)
    code, text = hv_batch("retry", root, "--class", "POISON")
    assert code == 0
    assert "2  POISON" in text
    assert "2 samples would be released" in text
    assert files(root) == before
    assert "no such sample" in hv_batch("retry", root, "--class", "GPU_OOM")[1]
    code, text = hv_batch("retry", root, "--shards", "0", "--yes")
    assert "1 sample pending again" in text
    assert not Path(root, layout.SUCCESS).exists()
    assert "1 quarantined, 1 pending; 1 of 2 shards sealed" in hv_batch("status", root)[1]
    assert read_lease(Store(root)) is None


def test_gc_first_says_what_it_would_do(root):
    """P1: without --yes it only lists; recent objects are kept."""
    orphan = Path(root, "data", "shard-00000", "s001-0a1b2c3d.mp4")
    orphan.write_bytes(b"of the slower of two")
    assert "nothing to remove" in hv_batch("gc", root)[1]
    code, text = hv_batch("gc", root, "--min-age-hours", "0")
    assert code == 0
    assert "media   data/shard-00000/s001-0a1b2c3d.mp4\n1 media would be removed" in text
    assert orphan.exists()
    line, totals = hv_batch("gc", root, "--min-age-hours", "0", "--yes", "--json")[1].splitlines()
    assert json.loads(line)["removed"]
    assert json.loads(totals) == {"schema": "hv_batch/gc/1", "objects": {"media": 1}, "removed": True}
    assert not orphan.exists()


@pytest.mark.parametrize(
    "command", [("retry", "--yes"), ("gc", "--yes"), ("verify", "--remove"), ("verify", "--repair")]
)
def test_what_changes_a_root_waits_for_its_driver(root, command):
    """P1: while a driver holds the lease, changes are refused; reading is always allowed."""
    name, flag = command
    with hold_lease(Store(root), this_process("run", "raysubmit_9")):
        before = files(root)
        with pytest.raises(LeaseHeldError, match="raysubmit_9"):
            hv_batch(name, root, flag)
        assert hv_batch(name, root)[0] == 0
        assert files(root) == before


@pytest.mark.parametrize("command", [("retry", "--yes"), ("gc", "--yes"), ("verify", "--repair"), ("status",)])
def test_a_path_that_is_no_root_stays_as_it_is(tmp_path, command):
    """P6: a mistyped path is reported, and no folder with a lease is created."""
    name, *flags = command
    with pytest.raises(UserError, match="is not an output root"):
        hv_batch(name, str(tmp_path / "nothing"), *flags)
    assert not (tmp_path / "nothing").exists()


def test_diff_tells_by_its_exit_code(root, rendered):
    """Exit codes: 0 when every sample is equal, 3 otherwise."""
    other = str(rendered)
    assert hv_batch("diff", root, other)[0] == 0
    commits.commit(Store(root), make_commit(make_sample(3)))
    code, text = hv_batch("diff", root, other, "--json")
    assert code == 3
    assert json.loads(text)["quarantined_in_b"] == ["s003"]


def test_watching_ends_with_the_run(root, monkeypatch):
    """`status --watch` repeats until the run is finished, which this test does between two readings."""
    Path(root, layout.SUCCESS).unlink()
    monkeypatch.setattr(time, "sleep", lambda _: Path(root, layout.SUCCESS).touch())
    code, text = hv_batch("status", root, "--watch")
    assert code == 0
    assert text.count(": not finished") == 1
    assert text.count(": finished") == 1


def test_status_for_machines(root):
    """`--json` contains the reasons and the requested shards."""
    found = json.loads(hv_batch("status", root, "--shards", "1", "--json")[1])
    assert [shard["shard"] for shard in found["shards"]] == [1]
    assert found["reasons"] == [
        {"class": "POISON", "message": "latents of step # are not finite", "samples": 1, "examples": ["s005"]}
    ]


def test_status_counts_the_videos_that_satisfy_conditions(root):
    code, text = hv_batch("status", root, "--where", "luma_mean>10", "--where", "seed>1001")
    assert code == 0
    committed = json.loads(hv_batch("status", root, "--json")[1])["committed"]
    assert f"of {committed} videos" in text
    shown = json.loads(hv_batch("status", root, "--json", "--where", "luma_mean>10", "--where", "seed>1001")[1])
    assert shown["matching"] == 3
    assert "3 committed samples match --where" in text
