"""hv_batch.job.inspection: the choices of the engine are shown, compared and verified."""

from __future__ import annotations

import shutil

import pytest

from hv_batch.job import layout
from hv_batch.job.inspection.diff import compare
from hv_batch.job.inspection.findings import Fault
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.verify import verify
from hv_batch.job.records.choices import record_choices
from hv_batch.job.storage.store import Store
from hv_batch.media.probe import decode_media
from tests.support.repository import ROOT


@pytest.fixture
def stores(tmp_path) -> list[Store]:
    """Two copies of a finished root."""
    source = ROOT / "tests" / "support" / "data" / "roots" / "dataset-2"
    return [Store(str(shutil.copytree(source, tmp_path / name))) for name in ("a", "b")]


def test_a_run_with_another_kernel_is_a_different_run(stores):
    """P3: `diff` names the choices that differ, `status` shows them, and a root without choices is as before."""
    a, b = stores
    assert (compare(a, b).identity, read_status(a).choices) == ([], {})
    record_choices(a, {"attention": "cudnn"}, "denoise-0.0", "node-1")
    assert compare(a, b).identity == ['choices.attention: "cudnn" -> (absent)']
    record_choices(b, {"attention": "sdpa"}, "denoise-0.0", "node-1")
    assert compare(a, b).identity == ['choices.attention: "cudnn" -> "sdpa"']
    assert read_status(a).to_dict()["choices"] == {"attention": "cudnn"}
    assert "attention: cudnn (chosen by the first group)" in read_status(a).render()
    assert verify(a, decode_media, decodes=0).findings == []


def test_a_damaged_choice_is_found(stores):
    """A run cannot continue without its choices, so `verify` reports them, and removes nothing."""
    store, _ = stores
    store.put(layout.CHOICES, b"{")
    assert read_status(store).choices == {}
    (finding,) = verify(store, decode_media, decodes=0).findings
    assert (finding.fault, finding.removes) == (Fault.CHOICES, ())
