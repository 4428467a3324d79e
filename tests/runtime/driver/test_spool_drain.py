"""The driver's account of videos on the disks of nodes, and how it handles each result of a node (P1, P2, P5)."""

from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
from ray.exceptions import NodeDiedError, RayTaskError

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import OutputConfig
from hv_batch.job.records import commits, run_document
from hv_batch.job.records.spool import DrainResult, Spool
from hv_batch.job.scheduling.limits import OUTAGE_PAUSE_S
from hv_batch.job.scheduling.messages import Published, SpoolLost
from hv_batch.job.stages import Stage
from hv_batch.job.storage.errors import StorageRefusedError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.driver import spool_drain
from hv_batch.runtime.driver.outage import Outage
from tests.support.rendered_roots import FINGERPRINT, make_commit, make_sample
from tests.support.small_runs import run_small, some_samples

FIRST, SECOND = make_sample(1), make_sample(2)
A, B = "a" * 56, "b" * 56  # as Ray names nodes


class Nodes:
    """Stands in for Ray: which nodes have a task, and the result of each."""

    def __init__(self, monkeypatch, store, **output):
        self.asked = {}
        self.submitted = []
        monkeypatch.setattr(spool_drain, "empty_spool", SimpleNamespace(options=self._options))
        monkeypatch.setattr(spool_drain.ray, "get", self._get)
        config = RunConfig.model_validate({"output": output})
        context = SimpleNamespace(config=config, store=store, fingerprint=FINGERPRINT, lease_token="")
        self.outage = Outage()
        self.spool_drain = spool_drain.SpoolDrain(
            context, self._watch, self.outage, lambda act, then: self.submitted.append((act, then))
        )

    def _options(self, scheduling_strategy):
        assert scheduling_strategy.soft is False, "another node has other videos"
        return SimpleNamespace(remote=lambda *_: scheduling_strategy.node_id)

    def _watch(self, node, then):
        assert node not in self.asked, "two tasks of one node"
        self.asked[node] = then

    def _get(self, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def answer(self, node, answer):
        return self.asked.pop(node)(answer)

    def run_submitted(self):
        events = []
        while self.submitted:
            act, then = self.submitted.pop(0)
            events += then(act())
        return events


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def nodes(monkeypatch, store):
    return Nodes(monkeypatch, store)


def test_what_a_node_has_committed_is_published(nodes):
    """P1: once for each sample; then there is nothing left to do or to report."""
    nodes.spool_drain.add(A, FIRST)
    nodes.spool_drain.add(B, SECOND)
    nodes.spool_drain.poll(0.0)
    nodes.spool_drain.poll(0.0)
    assert set(nodes.asked) == {A, B}
    assert "2 finished videos on the disks of 2 nodes" in nodes.spool_drain.describe()
    assert nodes.answer(A, DrainResult(("s001",))) == [Published("s001")]
    assert nodes.answer(B, DrainResult(("s002",))) == [Published("s002")]
    nodes.spool_drain.poll(0.0)
    assert not nodes.asked
    assert nodes.spool_drain.describe() == ""


def test_an_outage_is_waited_for(nodes, logged):
    """P5: tasks are repeated after a pause; what was committed before the outage is published."""
    nodes.spool_drain.add(A, FIRST)
    nodes.spool_drain.add(A, SECOND)
    nodes.spool_drain.poll(0.0)
    assert nodes.answer(A, DrainResult(("s001",), "503")) == [Published("s001")]
    assert "does not answer" in logged[0]
    nodes.spool_drain.poll(nodes.outage._try_at - 0.1)
    assert not nodes.asked
    nodes.spool_drain.poll(nodes.outage._try_at + OUTAGE_PAUSE_S)
    assert nodes.answer(A, DrainResult(("s002",))) == [Published("s002")]
    assert "answers again" in logged[1]


@pytest.mark.parametrize("answer", [NodeDiedError("gone"), DrainResult(())])
def test_a_lost_video_is_looked_for_in_the_output_root(nodes, store, answer):
    """P4, P5: it was committed all the same, or its sample goes on from its latents, or it is rendered again."""
    samples = [FIRST, SECOND, make_sample(3)]
    commits.commit(store, make_commit(FIRST))
    store.put(layout.latent_key(SECOND.shard, SECOND.key), b"latents")
    for sample in samples:
        nodes.spool_drain.add(A, sample)
    nodes.spool_drain.poll(0.0)
    assert nodes.answer(A, answer) == []
    assert nodes.run_submitted() == [
        Published("s001"),
        SpoolLost("s002", Stage.DECODE),
        SpoolLost("s003", Stage.ENCODE),
    ]
    assert nodes.spool_drain.describe() == ""


def test_a_video_that_came_after_the_task_is_not_lost(nodes):
    """P4: a task does not see a video that was spooled after it had started."""
    nodes.spool_drain.add(A, FIRST)
    nodes.spool_drain.poll(0.0)
    nodes.spool_drain.add(A, SECOND)
    assert nodes.answer(A, DrainResult(("s001",))) == [Published("s001")]
    assert not nodes.submitted
    nodes.spool_drain.poll(0.0)
    assert nodes.answer(A, DrainResult(("s002",))) == [Published("s002")]


def test_a_resume_first_commits_spooled_videos(nodes, logged):
    """P2: no sample is admitted before the task of every node has ended, an outage notwithstanding."""
    nodes.spool_drain.scan_nodes([A, B])
    nodes.spool_drain.poll(0.0)
    assert nodes.answer(A, DrainResult(("s001", "s002"))) == [], "the scan of the shard will find them committed"
    assert "committed 2 videos that an earlier outage had left" in logged[0]
    assert nodes.spool_drain.is_scanning
    assert nodes.answer(B, DrainResult((), "503")) == []
    assert nodes.spool_drain.is_scanning
    nodes.spool_drain.poll(nodes.outage._try_at)
    assert nodes.answer(B, NodeDiedError("gone")) == []
    assert not nodes.spool_drain.is_scanning


def test_without_a_spool_no_node_is_asked(monkeypatch, store):
    """output.spool_gib: 0 turns the spool off."""
    nodes = Nodes(monkeypatch, store, spool_gib=0)
    nodes.spool_drain.scan_nodes([A])
    assert not nodes.spool_drain.is_scanning


def test_a_root_that_refuses_ends_the_run(nodes):
    """Design section 6: the user must fix credentials and full stores; the videos stay where they are."""
    nodes.spool_drain.add(A, FIRST)
    nodes.spool_drain.poll(0.0)
    cause = StorageRefusedError(errno.EACCES, "s3://bucket: denied")
    refused = RayTaskError("empty_spool", "Traceback ...", cause, proctitle="x", pid=1, ip="127.0.0.1")
    with pytest.raises(UserError, match=r"denied; grant access to it"):
        nodes.answer(A, refused.as_instanceof_cause())
    assert "1 finished video on the disks" in nodes.spool_drain.describe()


def spooled_by_an_earlier_run(tmp_path, store: Store, folder) -> None:
    """The video of s001 waits in the spool folder that run.json names."""
    run_small(store, some_samples(2))
    run = json.loads(store.get(layout.RUN))
    record = commits.read_commit(store, 0, "s001")
    store.get_file(record["file"], tmp_path / "video")
    output = OutputConfig(spool_folder=str(folder))
    assert Spool(output, store, run["fingerprint"]).add(record, {record["file"]: tmp_path / "video"})
    run["config"]["output"]["spool_folder"] = str(folder)
    store.put(layout.RUN, json.dumps(run).encode())
    for key in (layout.SUCCESS, layout.metadata_key(0), layout.commit_key(0, "s001"), record["file"]):
        store.delete(key)


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_recorded_spool_folder_is_read_if_it_is_ours_and_never_created(tmp_path, monkeypatch, is_ours):
    """P2: a resume commits what an earlier run left there, although run.json cannot choose where this run writes."""
    store, folder = Store(str(tmp_path / "root")), tmp_path / "elsewhere"
    spooled_by_an_earlier_run(tmp_path, store, folder)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "own"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "own").mkdir()
    if not is_ours:
        shutil.rmtree(folder)
    fingerprint = run_document.read_run(store)["fingerprint"]
    result = spool_drain.empty_spool._function(OutputConfig(), store, fingerprint, "")
    assert result == DrainResult(("s001",) if is_ours else ())
    assert store.exists(layout.commit_key(0, "s001")) == is_ours
    assert folder.exists() == is_ours, "a folder that run.json names is not created"


@pytest.mark.parametrize("changed", ["manifest", "model"])
def test_a_video_from_before_the_manifest_had_grown_is_committed(tmp_path, changed):
    """P4: the identity of the run is another then, and its pixels are the same; after another change they are not."""
    store = Store(str(tmp_path / "root"))
    spooled_by_an_earlier_run(tmp_path, store, tmp_path / "spool")
    run = json.loads(store.get(layout.RUN))
    earlier = {name: run[name] for name in ("identity", "fingerprint", "manifest")}
    earlier |= {"replaced_at": "2026-11-28T20:00:00+00:00", "changed": [changed]}
    identity = {**run["identity"], changed: "new"}
    fingerprint = run_document.fingerprint(identity)
    written = {**run, "identity": identity, "fingerprint": fingerprint, "earlier": [earlier]}
    store.put(layout.RUN, json.dumps(written).encode())
    output = OutputConfig(spool_folder=str(tmp_path / "spool"))
    result = spool_drain.empty_spool._function(output, store, fingerprint, "")
    assert result == DrainResult(("s001",) if changed == "manifest" else ())
    assert store.exists(layout.commit_key(0, "s001")) == (changed == "manifest")


def test_videos_cannot_wait_on_disks_if_spools_are_disabled_or_a_decode_found_no_room(monkeypatch, store):
    assert Nodes(monkeypatch, store, spool_gib=0.0).spool_drain.is_unusable
    drain = Nodes(monkeypatch, store).spool_drain
    assert not drain.is_unusable
    drain.note_decode(has_failed=True)
    assert drain.is_unusable
    drain.note_decode(has_failed=False)
    assert not drain.is_unusable
