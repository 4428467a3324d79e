"""run.json: the identity of an output root."""

from __future__ import annotations

import copy
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.licences import licence_notice
from hv_batch.job.records.identity_differences import differences
from hv_batch.job.records.run_document import (
    MAX_DIFFERENCES,
    RunState,
    fingerprint,
    finish_run,
    open_run,
    read_run,
)
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

DOCUMENT = {
    "identity": {
        "seed": 0,
        "engine": "hv_batch.engine.hunyuan:HunyuanVideo",
        "defaults": {"height": 720, "negative_prompt": "Aerial view, " * 20 + "distortion", "guidance_scale": 6.0},
        "parallel": {"device": "cuda", "ulysses_degree": 8, "ring_degree": 1},
        "model": {"weights": "sha256:ab", "tile": [256, 64]},
        "manifest": "cd" * 32,
    },
    "config": {"groups": {"count": 1}, "output": {"shard_size": 4}},
    "manifest": {"rows": 3, "samples": 4, "url": "prompts.jsonl"},
    "versions": {"torch": "2.13.0"},
}


def changed(**leaves) -> dict:
    """DOCUMENT with other values in its identity, by dotted path with double underscores for dots."""
    document = copy.deepcopy(DOCUMENT)
    for path, value in leaves.items():
        *parents, last = path.split("__")
        place = document["identity"]
        for name in parents:
            place = place[name]
        place[last] = value
    return document


def test_the_states_of_a_run(any_store):
    """P2: the first command claims the root, the same command resumes it, and a finished run is recognised."""
    assert open_run(any_store, DOCUMENT) is RunState.NEW
    first = any_store.get(layout.RUN)
    assert open_run(any_store, DOCUMENT) is RunState.RESUMED
    open_shard, sealed = {"shards": 1, "shards_sealed": 0}, {"shards": 1, "shards_sealed": 1}
    finish_run(any_store, {"committed": 3, "pending": 1, **open_shard})
    assert open_run(any_store, DOCUMENT) is RunState.RESUMED, "a run with pending samples is not finished"
    finish_run(any_store, {"committed": 4, "pending": 0, **open_shard})
    assert open_run(any_store, DOCUMENT) is RunState.RESUMED, "nor is one with an open shard"
    finish_run(any_store, {"committed": 4, "pending": 0, **sealed})
    assert open_run(any_store, DOCUMENT) is RunState.FINISHED
    assert any_store.get(layout.RUN) == first, "a resume does not change run.json"
    assert b'"committed": 4' in any_store.get(layout.SUMMARY)


def test_run_json_is_complete(any_store):
    """P2: resolved config, fingerprint, manifest digest, versions and the licence notice."""
    open_run(any_store, DOCUMENT)
    run = read_run(any_store)
    assert {name: run[name] for name in DOCUMENT} == DOCUMENT
    assert run["schema"] == "hv_batch/run/1"
    assert run["fingerprint"] == fingerprint(DOCUMENT["identity"])
    assert run["licence"] == licence_notice()


def test_values_outside_the_identity_may_change(any_store):
    """P2: a resume may have more groups, other retries, another manifest path and newer packages."""
    open_run(any_store, DOCUMENT)
    again = copy.deepcopy(DOCUMENT)
    again["config"]["groups"]["count"] = 8
    again["versions"]["torch"] = "2.14.0"
    again["manifest"]["url"] = "s3://bucket/prompts.jsonl"
    again["identity"] = dict(reversed(again["identity"].items()))
    assert open_run(any_store, again) is RunState.RESUMED


def test_another_config_is_refused_with_the_difference(any_store):
    """P2: every dotted path that differs with both values, nothing that is equal, and the remedy."""
    open_run(any_store, DOCUMENT)
    other = changed(seed=5, parallel__ulysses_degree=4, manifest="ee" * 32, model__tile=[256, 16])
    del other["identity"]["defaults"]["guidance_scale"]
    other["identity"]["extra_option"] = {"a": None}
    with pytest.raises(UserError) as caught:
        open_run(any_store, other)
    text = str(caught.value)
    assert "  seed: 0 -> 5\n" in text
    assert "  parallel.ulysses_degree: 8 -> 4\n" in text
    assert f'  manifest: "{"cd" * 32}" -> "{"ee" * 32}"\n' in text
    assert "  model.tile: [256, 64] -> [256, 16]\n" in text
    assert "  defaults.guidance_scale: 6.0 -> (absent)\n" in text
    assert '  extra_option: (absent) -> {"a": null}\n' in text
    assert len(re.findall(r"^  ", text, re.M)) == 6
    assert any_store.url in text
    assert "Choose another output root" in text
    assert read_run(any_store)["identity"] == DOCUMENT["identity"]


def test_a_difference_deep_in_a_long_text_is_shown(any_store):
    """P2: two long prompts that differ at the end must not look alike in the message."""
    open_run(any_store, DOCUMENT)
    with pytest.raises(UserError) as caught:
        open_run(any_store, changed(defaults__negative_prompt="Aerial view, " * 20 + "deformation"))
    (line,) = [line for line in str(caught.value).split("\n") if line.startswith("  ")]
    assert "distortion" in line
    assert "deformation" in line
    assert len(line) < 240


def test_a_long_difference_is_cut(any_store):
    """P2: the message about an entirely different identity is bounded."""
    open_run(any_store, DOCUMENT)
    with pytest.raises(UserError, match="and 12 more"):
        open_run(any_store, changed(model={f"option_{i:02}": i for i in range(MAX_DIFFERENCES + 10)}))


leaves = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, "", "a", "long" * 40])
identities = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(leaves, lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, min_size=1, max_size=3)),
    max_size=3,
)


@settings(deadline=None)
@given(theirs=identities, ours=identities)
def test_a_refusal_always_has_a_difference_to_show(theirs, ours):
    """P2: fingerprints differ exactly if there is a line to show, also for 1, 1.0 and true."""
    assert (fingerprint(theirs) != fingerprint(ours)) == bool(list(differences(theirs, ours)))


def test_of_many_commands_one_claims_the_root(any_store):
    """P1: of two commands that start together on an empty root, one claims it and the other resumes or is refused."""
    outcomes: list[object] = [None] * 6
    barrier = threading.Barrier(len(outcomes))

    def start(i: int) -> None:
        barrier.wait()
        try:
            outcomes[i] = open_run(any_store, changed(seed=i % 2))
        except UserError:
            outcomes[i] = "refused"

    threads = [threading.Thread(target=start, args=(i,)) for i in range(len(outcomes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owner = outcomes.index(RunState.NEW)
    for i, outcome in enumerate(outcomes):
        expected = RunState.NEW if i == owner else RunState.RESUMED if i % 2 == owner % 2 else "refused"
        assert outcome == expected


def test_records_without_a_run_are_refused(any_store):
    """P2: commits of an unknown config must not be resumed."""
    any_store.put(layout.commit_key(3, "a"), b"{}")
    with pytest.raises(UserError, match=r"holds commit records but no run\.json"):
        open_run(any_store, DOCUMENT)
    assert not any_store.exists(layout.RUN)


@pytest.mark.parametrize(
    "junk", [b"", b"[1]", b'{"a": 1}', b'{"schema": "hv_batch/run/0"}', b"\xff\xfe", b"null", b"3"]
)
def test_a_foreign_run_json_is_refused(any_store, junk):
    """P6: a folder with a file of another program is not written to."""
    any_store.put(layout.RUN, junk)
    with pytest.raises(UserError, match="not written by this version"):
        open_run(any_store, DOCUMENT)
    assert any_store.get(layout.RUN) == junk


def test_a_root_without_a_run_is_named(tmp_path):
    """P6: the message names a mistyped path."""
    with pytest.raises(UserError, match="is not an output root"):
        read_run(Store(str(tmp_path)))


def test_the_licence_notice_is_complete():
    """The territories, and the forbidden use of outputs."""
    for words in ("European Union", "United Kingdom", "South Korea", "must not be used to improve any AI model"):
        assert words in licence_notice()
