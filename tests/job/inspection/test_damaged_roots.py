"""Commands on damaged output roots: each reports the problem in a sentence and never with a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.records import run_document
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.cli_calls import files, hv_batch
from tests.support.pending import iterate
from tests.support.small_runs import ListedShards, run_small, some_samples

SAMPLES = some_samples(6)
RECORD, GIVEN_UP = "commits/shard-00000/s001.json", "quarantine/shard-00000/s003.json"
OPEN = [layout.SUCCESS, layout.metadata_key(0)]  # removed, so that the records are read and not the table


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """A finished root of two shards, with two quarantined samples."""
    root = tmp_path_factory.mktemp("rendered") / "root"
    run_small(Store(str(root)), SAMPLES, poison={"s003", "s005"})
    return root


@pytest.fixture
def root(rendered, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(rendered, tmp_path / "root"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def spoil(text: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(text) and None


def change(**values) -> Callable[[Path], None]:
    """A JSON document with other values, and without those that are None here."""

    def act(path: Path) -> None:
        document = {name: value for name, value in (json.loads(path.read_text()) | values).items() if value is not None}
        path.write_text(json.dumps(document))

    return act


def answer(*arguments: str) -> tuple[int, str]:
    """The exit code and the output of a command, also if it reports a problem."""
    try:
        return hv_batch(*arguments)
    except UserError as error:
        return 1, str(error)


DAMAGES = [
    (RECORD, cut),
    (RECORD, spoil(b"[]")),
    (RECORD, spoil(bytes(range(200)))),
    (RECORD, spoil(b'{"key": "s001"}')),
    (GIVEN_UP, cut),
    (GIVEN_UP, change(message=7, row="x", history=3)),
    (GIVEN_UP, change(fingerprint=[])),
    (GIVEN_UP, change(**{"class": None})),
    ("commits/shard-00000/s001.json~", spoil(b"an editor's copy")),
    ("data/shard-00001/metadata.parquet", spoil(b"no table")),
    ("report/shards/shard-00001.json", spoil(b"no sums")),
    ("lineage/shard-00001.parquet", spoil(b"no table")),
    ("summary.json", cut),
    ("lease.json", spoil(b"[1]")),
    ("retried/shard-00000/s001.json", spoil(b"?")),
    (layout.RUN, cut),
    (layout.RUN, change(manifest=None)),
    (layout.RUN, change(config=None)),
]


# The slow ones damage objects that the others damage in another way.
EACH = [
    pytest.param(*case, marks=pytest.mark.slow) if number in (1, 2, 7, 16) else case
    for number, case in enumerate(DAMAGES)
]


@pytest.mark.parametrize(("name", "damage"), EACH)
@pytest.mark.parametrize("is_open", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_damage_causes_a_traceback(root, rendered, name, damage, is_open):
    """P5: each command does its work or reports what is damaged; read-only commands change nothing."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    damage(root / name)
    for seal in OPEN if is_open else ():
        (root / seal).unlink()
    before = files(str(root))
    for command in (["status"], ["status", "--json"], ["gc", "--min-age-hours", "0"], ["retry"], ["verify"], ["diff"]):
        arguments = [*command, str(root), *([str(rendered)] if command == ["diff"] else [])]
        code, text = answer(*arguments)
        assert code in (0, 3) or name in text
    assert files(str(root)) == before


@pytest.mark.parametrize("damage", [damage for name, damage in DAMAGES if name == RECORD])
def test_a_damaged_record_is_named_if_all_are_needed(root, rendered, damage):
    """P5: `diff` and the end of a run name it and the remedy, which is `verify --repair`; this repairs it."""
    damage(root / RECORD)
    for seal in OPEN:
        (root / seal).unlink()
    with pytest.raises(UserError, match=rf"{RECORD} .* is damaged .*verify.* --repair"):
        hv_batch("diff", root, rendered)
    with pytest.raises(UserError, match=rf"{RECORD} .* is damaged .*verify.* --repair"):
        aggregate(Store(str(root)))
    assert hv_batch("verify", root, "--remove", "--sample-decode", "0")[0] == 3
    run_small(Store(str(root)), SAMPLES, poison={"s003", "s005"})
    assert hv_batch("diff", root, rendered)[0] == 0


def test_a_foreign_file_hides_no_pending_sample(root):
    """P2: other files in the folders of records are counted neither by a status nor by a resume."""
    (root / RECORD).rename(root / f"{RECORD}~")
    (root / "commits" / "shard-00000" / "readme.txt").touch()
    assert "3 of 6 samples committed, 2 quarantined, 1 pending" in hv_batch("status", root)[1]
    store = Store(str(root))
    pending = [found.sample.key for found in iterate(PendingSamples(store, ListedShards(SAMPLES)))]
    assert pending == ["s001"]


def test_a_run_document_without_a_required_field_is_refused(root):
    """P2: a run.json that lacks a required field is not used."""
    change(manifest=None)(root / layout.RUN)
    with pytest.raises(UserError, match="not written by this version"):
        run_document.read_run(Store(str(root)))
