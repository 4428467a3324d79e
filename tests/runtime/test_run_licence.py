"""A run keeps the licence with which it began, whatever weights a resume finds."""

from __future__ import annotations

from pathlib import Path

from hv_batch.job.licences import TENCENT
from hv_batch.job.storage.store import Store
from hv_batch.runtime.preflight import _licence
from tests.support.rendered_roots import open_root


class DeclaringEngine:
    def licence(self) -> str:
        return "apache-2.0"


def test_a_new_run_has_the_licence_of_its_weights(tmp_path: Path):
    assert _licence(Store(str(tmp_path)), DeclaringEngine()) == "apache-2.0"


def test_a_resume_of_a_run_without_declared_licence_does_not_mix_two(tmp_path: Path):
    """P3: the table of a shard must not depend on which command rendered a sample."""
    store = Store(str(tmp_path))
    open_root(store, 4)
    assert _licence(store, DeclaringEngine()) == TENCENT
