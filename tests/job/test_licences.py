"""The licence of rendered files: that of the weights, named once in run.json and repeated in every record."""

from __future__ import annotations

from pathlib import Path

import pytest

from hv_batch.job.dataset.seal import read_table, seal_shard
from hv_batch.job.licences import TENCENT, engine_licence, hub_licence, licence_notice, records_licence, run_licence
from hv_batch.job.records import commits
from hv_batch.job.storage.store import Store
from tests.support.rendered_roots import make_commit, make_sample


class Declaring:
    def __init__(self, licence: object) -> None:
        self._licence = licence

    def licence(self) -> object:
        return self._licence


@pytest.mark.parametrize("declared", [None, "", "MIT Licence", "x\ny: z", 7, "a" * 65])
def test_weights_without_a_valid_declaration_keep_the_licence_of_the_release(declared):
    assert engine_licence(Declaring(declared)) == engine_licence(object()) == TENCENT


def test_declared_weights_give_their_licence_to_records_and_tables(tmp_path: Path):
    licence = engine_licence(Declaring("apache-2.0"))
    store = Store(str(tmp_path))
    record = make_commit(make_sample(1), licence=licence)
    commits.commit(store, record)
    assert seal_shard(store, 0, ["s001"])
    table = read_table(store, 0)
    assert records_licence([record]) == "apache-2.0"
    assert table.column("licence").to_pylist() == ["apache-2.0"]
    assert table.schema.metadata[b"hv_batch.licence"] == b"apache-2.0"


def test_a_run_of_an_earlier_version_is_under_the_licence_of_the_release():
    assert run_licence({"licence": "a text"}) == TENCENT
    assert run_licence({"licence_id": "apache-2.0"}) == "apache-2.0"


def test_the_notice_and_the_card_name_the_licence_of_the_weights():
    assert "Tencent Hunyuan Community License Agreement" in licence_notice()
    assert "does not apply" in licence_notice("apache-2.0")
    assert hub_licence("apache-2.0") == {"license": "apache-2.0"}
    assert hub_licence("my-terms") == {"license": "other", "license_name": "my-terms"}
    assert hub_licence(TENCENT)["license_name"] == TENCENT
