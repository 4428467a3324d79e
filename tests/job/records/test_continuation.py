"""Roots that continue with a grown manifest or an allowed change (P2)."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.dataset.seal import read_rows, read_table
from hv_batch.job.inspection.diff import compare
from hv_batch.job.inspection.identity_counts import count_identities
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.manifest.index import Index
from hv_batch.job.records import commits
from hv_batch.job.records.continuation import equal_earlier
from hv_batch.job.records.run_document import RunState, fingerprint, inspect_run, read_run
from hv_batch.job.records.run_identity import is_same_but_manifest
from hv_batch.job.records.unfinished_card import UNFINISHED_CARD
from hv_batch.job.report.update import update_report
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.continued_runs import Command, rows_of, verified
from tests.support.crash_points import fresh_url
from tests.support.repository import ROOT


@pytest.fixture
def store() -> Store:
    return Store(fresh_url())


@pytest.fixture
def command(tmp_path) -> Command:
    """Six rows in shards of four."""
    return Command(tmp_path / "m.jsonl", rows_of(6))


def changed(command: Command, **changes) -> Command:
    return dataclasses.replace(command, **changes)


def grown(command: Command, count: int = 9, **columns) -> Command:
    return changed(command, rows=[*command.rows, *rows_of(count, **columns)[len(command.rows) :]])


def records(store: Store) -> dict[str, dict]:
    names = [name for shard in range(3) for name in store.list(layout.commit_dir(shard))]
    return {layout.sample_key(name): json.loads(store.get(name)) for name in names}


def objects(store: Store) -> dict[str, bytes]:
    folders = ("commits", "data", "lineage", "plan", "quarantine", "report")
    names = [layout.RUN, layout.SUMMARY, layout.SUCCESS, *(name for folder in folders for name in store.list(folder))]
    return {name: store.get(name) for name in names}


def test_a_manifest_that_has_grown_continues_the_same_root(store, command):
    """P2: old samples keep their records and videos, the last shard is sealed again, and the root verifies."""
    command.run(store)
    before, first = records(store), store.get(layout.metadata_key(0))
    denoised: Counter[str] = Counter()
    grown(command).run(store, denoised)
    after = records(store)
    assert {key: after[key] for key in before} == before
    assert dict(denoised) == {"s007": 1, "s008": 1, "s009": 1}
    assert store.get(layout.metadata_key(0)) == first, "a full shard is not sealed again"
    assert [row["key"] for row in read_rows(store, 1)] == ["s005", "s006", "s007", "s008"]
    found = verified(store)
    assert (found.findings, found.checked, found.pending, found.compared) == ([], 9, 0, True)
    assert store.exists(layout.SUCCESS)
    run = read_run(store)
    assert run["manifest"]["samples"] == 9
    assert [each["changed"] for each in run["earlier"]] == [["manifest"]]
    assert aggregate(store)["committed"] == 9


def test_the_same_commands_then_behave_as_on_any_root(store, command):
    """P2: the grown command finds nothing to do, and the command of before is refused."""
    command.run(store)
    grown(command).run(store)
    run = store.get(layout.RUN)
    assert grown(command).check(store)[2] == (RunState.FINISHED, None)
    with pytest.raises(UserError, match="it has 6 rows, and it had 9"):
        command.run(store)
    assert store.get(layout.RUN) == run


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            [{"id": "s001", "prompt": "another"}, *rows_of(8)[1:]],
            'the prompt of row 1 is "another", and it was "take 1"',
        ),
        ([*rows_of(1), *rows_of(8)[2:]], 'the prompt of row 2 is "take 3", and it was "take 2"'),
        ([*rows_of(5), {"id": "x", "prompt": "take 6"}, *rows_of(8)[6:]], 'the id of row 6 is "x", and it was "s006"'),
        ([*rows_of(5), {**rows_of(6)[5], "tag": 1}, *rows_of(8)[6:]], "the tag of row 6 is 1, and it was null"),
        (rows_of(5), "it has 5 rows, and it had 6"),
    ],
)
def test_a_manifest_with_other_old_rows_is_refused_with_the_first_of_them(store, command, rows, problem):
    """P2: order, ids, prompts and further columns of the old rows must be unchanged; nothing is written."""
    command.run(store)
    before = objects(store)
    with pytest.raises(UserError) as caught:
        changed(command, rows=rows).run(store)
    assert f"The manifest has not only grown: {problem}. Choose another output root" in str(caught.value)
    assert objects(store) == before


def test_the_answers_of_a_prompt_hook_may_grow_with_the_manifest_only(store, command):
    """P2, P4: the rows are compared as the hook leaves them, so the digest of its answers follows them."""
    command = changed(command, hook_results="a")
    command.run(store)
    with pytest.raises(UserError, match=r"can change .*not hooks\.prompt\.results"):
        changed(command, hook_results="b").run(store)
    changed(grown(command), hook_results="b").run(store)
    run = read_run(store)
    assert run["earlier"][0]["changed"] == ["hooks.prompt.results", "manifest"]
    assert equal_earlier(run) == (run["earlier"][0]["fingerprint"],)
    assert verified(store).findings == []


def test_growth_is_refused_if_the_copy_of_the_old_manifest_is_damaged(store, command):
    """P2: rows that cannot be compared are not assumed to be equal."""
    command.run(store)
    store.delete(layout.INDEX)
    with pytest.raises(UserError, match="holds no complete copy of the manifest of before"):
        grown(command).run(store)


@pytest.mark.parametrize("count", [6, 9, 11])
def test_a_manifest_may_change_again_after_a_kill_before_its_index(store, command, monkeypatch, count):
    """P2: run.json names a manifest whose copy is not there, and whose file has changed since: the root is not lost."""
    command.run(store)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "publish", lambda self, store: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            grown(command).run(store)
    assert read_run(store)["manifest"]["rows"] == 9
    assert store.get(layout.CARD) == UNFINISHED_CARD, "dataset loaders refuse the root until it is finished again"
    grown(command, count).run(store)
    assert len(records(store)) == count
    assert verified(store).findings == []


def test_a_new_column_seals_all_shards_again(store, command):
    """P2: all tables of a dataset have one schema, so a column of the new rows is null in the old ones."""
    command.run(store)
    grown(command, take=7).run(store)
    assert [row["take"] for shard in range(3) for row in read_table(store, shard).to_pylist()] == [None] * 6 + [7] * 3
    assert verified(store).findings == []


def test_latents_that_were_stored_before_the_growth_are_decoded(store, command, monkeypatch):
    """P4: a run that was killed before a decode does not repeat the denoise because new rows have come."""
    with monkeypatch.context() as patch:
        patch.setattr(commits, "commit", lambda store, record: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command.run(store)
    denoised: Counter[str] = Counter()
    grown(command).run(store, denoised)
    assert sorted(denoised) == [f"s00{number}" for number in range(2, 10)]


def test_latents_of_other_values_are_not_decoded(store, command, monkeypatch):
    """P3: after an allowed change, a pending sample is rendered with the new values from the beginning."""
    with monkeypatch.context() as patch:
        patch.setattr(commits, "commit", lambda store, record: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command.run(store)
    denoised: Counter[str] = Counter()
    changed(command, model="b", allowed=["model"]).run(store, denoised)
    assert len(denoised) == 6


def interrupted(store: Store, command: Command, monkeypatch, after: int) -> None:
    """A run that is killed after `after` commits."""
    done, commit = [], commits.commit

    def commit_some(store, record):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(record["key"])
        return commit(store, record)

    with monkeypatch.context() as patch:
        patch.setattr(commits, "commit", commit_some)
        with pytest.raises(KeyboardInterrupt):
            command.run(store)


FLOW_SHIFT = {"defaults": {"flow_shift": 5.0}}


def test_an_allowed_change_continues_with_the_change_recorded_per_sample(store, command, monkeypatch):
    """P2: committed samples keep their videos, pending ones get the new value, and each names its identity."""
    interrupted(store, command, monkeypatch, 2)
    before, old = records(store), read_run(store)["fingerprint"]
    changed(command, sections=FLOW_SHIFT, allowed=["defaults.flow_shift"]).run(store)
    run, after = read_run(store), records(store)
    assert {key: after[key] for key in before} == before
    values = [(record["params"]["flow_shift"], record["fingerprint"]) for record in after.values()]
    assert values == [(7.0, old)] * 2 + [(5.0, run["fingerprint"])] * 4
    assert run["config"]["defaults"]["flow_shift"] == 5.0, "a resume goes on with the new value"
    assert [each["changed"] for each in run["earlier"]] == [["defaults.flow_shift"]]
    found = verified(store)
    assert found.findings == []
    assert [(each.fingerprint, each.committed) for each in found.identities] == [(old, 2), (run["fingerprint"], 4)]


def test_a_shard_of_several_identities_says_so(store, command, monkeypatch):
    """Lineage: the table's metadata holds the identity of each fingerprint; a shard of one identity has only that."""
    interrupted(store, command, monkeypatch, 2)
    changed(command, sections=FLOW_SHIFT, allowed=["defaults"]).run(store)
    run = read_run(store)
    metadata = [pq.read_schema(io.BytesIO(store.get(layout.metadata_key(shard)))).metadata for shard in range(2)]
    both = json.loads(metadata[0][b"hv_batch.identities"])
    assert both == {
        run["earlier"][0]["fingerprint"]: run["earlier"][0]["identity"],
        run["fingerprint"]: run["identity"],
    }
    assert set(both) == {row["fingerprint"] for row in read_rows(store, 0)}
    assert [json.loads(each[b"hv_batch.identity"]) for each in metadata] == [run["identity"]] * 2
    assert b"hv_batch.identities" not in metadata[1]


def test_a_seal_that_is_written_again_has_the_bytes_of_before(store, command):
    """P3: the table of a shard names the identity that rendered it, not that of a later change."""
    command.run(store)
    first = store.get(layout.metadata_key(0))
    changed(grown(command), sections=FLOW_SHIFT, allowed=["defaults"]).run(store)
    for key in (layout.SUCCESS, layout.metadata_key(0)):
        store.delete(key)
    changed(grown(command), sections=FLOW_SHIFT).run(store)
    assert store.get(layout.metadata_key(0)) == first


def test_what_is_not_allowed_is_refused_with_the_flag_that_allows_it(store, command):
    """P2: the refusal names the paths, and the flags with which the run continues."""
    command.run(store)
    other = changed(command, sections={"defaults": {"flow_shift": 5.0, "fps": 30}}, allowed=["defaults.fps"])
    with pytest.raises(UserError) as caught:
        other.run(store)
    assert "  defaults.flow_shift: 7.0 -> 5.0\n" in str(caught.value)
    assert "add --allow-change defaults.fps --allow-change defaults.flow_shift: committed" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"seed": 5}, "seed"),
        ({"sections": {"output": {"shard_size": 2}}}, "shard_size"),
        ({"sections": {"output": {"webdataset": True}}}, "webdataset"),
        ({"sections": {"defaults": {"num_videos": 2}}}, "defaults.num_videos"),
    ],
)
def test_what_decides_the_samples_cannot_be_allowed(store, command, changes, path):
    """P2, P3: neither by its name, nor by that of its section."""
    command.run(store)
    section = path.partition(".")[0]
    with pytest.raises(UserError, match=f"--allow-change {path}: this cannot change"):
        changed(command, **changes, allowed=[path]).run(store)
    allowed = ["defaults"] if section == "defaults" else []
    with pytest.raises(UserError, match=rf"(?s)What differs.*  {path}: .*can change .*not {path}"):
        changed(command, **changes, allowed=allowed).run(store)


def test_an_allowed_change_of_a_finished_root_changes_nothing(store, command):
    """P2: no sample is left that could get the new value, so run.json keeps the identity of all of them."""
    command.run(store)
    before = objects(store)
    other = changed(command, sections=FLOW_SHIFT, allowed=["defaults"])
    assert other.check(store)[2] == (RunState.FINISHED, None)
    other.run(store)
    assert objects(store) == before


def test_a_change_and_growth_at_once_and_back_again(store, command):
    """P2: every identity is kept, in order; a run may go back to the values of before."""
    command.run(store)
    changed(grown(command), sections=FLOW_SHIFT, allowed=["defaults"]).run(store)
    changed(grown(command, 11), allowed=["defaults.flow_shift"]).run(store)
    run, after = read_run(store), records(store)
    assert [each["changed"] for each in run["earlier"]] == [["defaults.flow_shift", "manifest"]] * 2
    assert [record["params"]["flow_shift"] for record in after.values()] == [7.0] * 6 + [5.0] * 3 + [7.0] * 2
    assert equal_earlier(run) == (run["earlier"][0]["fingerprint"],)
    found = verified(store)
    assert found.findings == []
    assert [each.committed for each in found.identities] == [6, 3, 2]


def test_a_continued_root_is_marked(store, command):
    """P2: status, verify and summary name the changes, with the committed samples of each identity."""
    command.run(store)
    status = read_status(store)
    assert count_identities(store, read_run(store), {0: True, 1: True}) == ()
    assert "continued" not in status.render() + verified(store).render()
    assert "identities" not in status.to_dict().keys() | aggregate(store).keys()
    grown(command).run(store)
    run = read_run(store)
    status = dataclasses.replace(status, identities=count_identities(store, run, dict.fromkeys(range(3), True)))
    for text in (status.render(), verified(store).render()):
        assert f"        6  {run['earlier'][0]['fingerprint'][:8]}  until {run['earlier'][0]['replaced_at']}" in text
        assert f"        3  {run['fingerprint'][:8]}  now" in text
    assert [each["committed"] for each in aggregate(store)["identities"]] == [6, 3]
    named = update_report(store).document["run"]["identities"]
    assert [(each["fingerprint"], each["committed"]) for each in named] == [
        (run["earlier"][0]["fingerprint"], 6),
        (run["fingerprint"], 3),
    ]
    assert named[0]["changed"]
    assert any("A continued at" in line for line in compare(store, store).identity)


def test_a_record_is_compared_with_the_identity_that_it_names(store, command):
    """P2: a record with the new value under the name of the old identity is damaged."""
    command.run(store)
    changed(grown(command), sections=FLOW_SHIFT, allowed=["defaults"]).run(store)
    name = layout.commit_key(2, "s009")
    record = json.loads(store.get(name)) | {"fingerprint": read_run(store)["earlier"][0]["fingerprint"]}
    store.put(name, encode(record))
    (finding,) = [each for each in verified(store).findings if each.key == "s009"]
    assert "its params.flow_shift is 5.0; the manifest has 7.0" in finding.details


def test_an_earlier_identity_that_was_altered_is_refused(store, command):
    """P2: records cannot be compared with an identity that does not match its fingerprint."""
    command.run(store)
    grown(command).run(store)
    run = json.loads(store.get(layout.RUN))
    run["earlier"][0]["identity"]["seed"] = 9
    store.put(layout.RUN, encode(run))
    with pytest.raises(UserError, match=r"run\.json in .* was changed after it was written"):
        read_run(store)


def test_a_root_without_earlier_identities_keeps_its_fingerprint():
    """P2: a run.json of 0.2.0 has no `earlier`; it is read as before, and the same command finds the run finished."""
    store = Store(str(ROOT / "tests" / "support" / "data" / "roots" / "revision-2"))
    run = read_run(store)
    assert "earlier" not in run
    assert run["fingerprint"] == fingerprint(run["identity"])
    assert run["fingerprint"] == "cc24861890a754a925a1358c9dfbb78e501a87e9b77a13e2a5d8f66a361a3695"
    assert equal_earlier(run) == ()
    assert inspect_run(store, run) is RunState.FINISHED
    assert count_identities(store, run, {0: True, 1: True}) == ()


plans = st.dictionaries(st.sampled_from(["64x64x1", "64x64x9"]), st.sampled_from([{"ulysses_degree": 2}, {}]))


@settings(deadline=None)
@given(theirs=plans, ours=plans, manifest=st.booleans(), model=st.booleans())
def test_only_the_manifest_and_further_plans_keep_the_pixels(theirs, ours, manifest, model):
    """P3: latents of another identity are used only if every shape of it has the same plan, and all else is equal."""
    one = {"parallel": {"device": "cpu", "plans": theirs}, "manifest": "a", "model": "m"}
    other = {"parallel": {"device": "cpu", "plans": ours}, "manifest": "ab"[manifest], "model": "mn"[model]}
    assert is_same_but_manifest(one, other) == (not model and theirs.items() <= ours.items())
