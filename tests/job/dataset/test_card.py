"""The dataset card: `datasets.load_dataset(ROOT)` loads a finished root, and nothing of an unfinished one."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.dataset.card import write_card
from hv_batch.job.dataset.card_text import CardFacts, card_text, markdown
from hv_batch.job.documents.card import CardState, parse_card, sign_card
from hv_batch.job.inspection.findings import Fault
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.inspection.verify import remove_faults, verify
from hv_batch.job.licences import TENCENT
from hv_batch.job.records.run_document import read_run
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.records.unfinished_card import UNFINISHED_CARD
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from hv_batch.media.probe import decode_media
from tests.support.rendered_roots import make_commit, make_sample, open_root
from tests.support.small_runs import real_media, run_small, some_samples

SAMPLES = [make_sample(number, extra={"topic": f"t{number}"}) for number in range(1, 7)]
RUN = {"fingerprint": "ab" * 32, "identity": {"seed": 0}, "versions": {"hv_batch": "0.2.0"}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A finished root of six samples in two shards; the second sample is quarantined."""
    store = Store(str(tmp_path / "root"))
    run_small(store, SAMPLES, poison=["s002"])
    return store


def load(store: Store, cache: Path) -> datasets.Dataset:
    return datasets.load_dataset(store.url, split="train", cache_dir=str(cache))


def card_faults(store: Store) -> list[str]:
    return [one.details for one in verify(store, decode_media, decodes=0).findings if one.fault is Fault.CARD]


def test_a_finished_root_loads_by_its_path(store, tmp_path):
    """Item 6: the media of every committed sample, with its metadata, without the name of a loader."""
    rows = load(store, tmp_path / "cache").cast_column("video", datasets.Video(decode=False))
    assert sorted(rows["id"]) == ["s001", "s003", "s004", "s005", "s006"]
    assert set(rows["topic"]) == {"t1", "t3", "t4", "t5", "t6"}
    assert all(Path(row["video"]["path"]).is_file() for row in rows)


def test_real_videos_and_images_load_together(tmp_path):
    """Item 6: a majority of images does not turn the videos into images; both kinds keep their rows."""
    store = Store(str(tmp_path / "root"))
    run_small(store, [*some_samples(1), *some_samples(4, num_frames=1)[1:]], media=real_media)
    rows = load(store, tmp_path / "cache").cast_column("video", datasets.Video(decode=False))
    assert sorted(Path(row["video"]["path"]).suffix for row in rows) == [".mp4", ".png", ".png", ".png"]


def test_images_alone_load_as_images(tmp_path):
    store = Store(str(tmp_path / "root"))
    run_small(store, some_samples(2, num_frames=1), media=real_media)
    rows = load(store, tmp_path / "cache")
    assert [row["image"].size for row in rows] == [(96, 128)] * 2


def test_an_unfinished_root_refuses_to_be_loaded(tmp_path):
    """Item 6: loading before the seal must not drop media silently. The message says why."""
    store = Store(str(tmp_path / "root"))
    open_root(store, 6)
    record = make_commit(make_sample(1))
    store.put(record["file"], b"a video")
    with pytest.raises(FileNotFoundError, match="this-run-is-not-finished"):
        load(store, tmp_path / "cache")


def test_a_shard_that_is_opened_again_is_not_loaded_as_complete(store, tmp_path):
    """P1: between a retry and the next seal, the root refuses to be loaded; the seal brings the card back."""
    finished = store.get(layout.CARD)
    unseal_shard(store, 1)
    assert store.get(layout.CARD) == UNFINISHED_CARD
    with pytest.raises(FileNotFoundError, match="this-run-is-not-finished"):
        load(store, tmp_path / "cache")
    run_small(store, SAMPLES, poison=["s002"])
    assert store.get(layout.CARD) == finished


def test_the_card_says_what_the_dataset_is(store):
    text = store.get(layout.CARD).decode()
    data = DatasetCard(text).data
    assert (data.license, data.license_name, data.size_categories) == ("other", TENCENT, ["n<1K"])
    for words in ("5 videos", "1 sample of the run failed", "| topic | string | from the manifest |", "torchcodec"):
        assert words in text
    assert "Tencent Hunyuan Community License Agreement" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: None, "README.md is missing"),
        (lambda data: data.replace(b"5 videos", b"9 videos"), "its text was changed"),
        (lambda data: UNFINISHED_CARD, "says that the run is not finished"),
        (lambda data: sign_card("# x\n", CardState(True, 4, 2)), "says 4 committed and 2 quarantined"),
    ],
)
def test_verify_finds_a_missing_or_changed_card_and_the_run_writes_it_again(store, damage, message):
    before = store.get(layout.CARD)
    assert card_faults(store) == []
    store.delete(layout.CARD)
    if (changed := damage(before)) is not None:
        store.put(layout.CARD, changed)
    (details,) = card_faults(store)
    assert message in details
    findings = verify(store, decode_media, decodes=0).findings
    assert all(finding.is_repairable for finding in findings)
    remove_faults(store, findings)
    write_card(store, read_run(store), aggregate(store))
    assert store.get(layout.CARD) == before


def test_a_card_that_claims_an_unfinished_run_complete_is_found(store):
    """P1: a stale card would let loaders drop the media of the open shard."""
    finished = store.get(layout.CARD)
    unseal_shard(store, 1)
    store.put(layout.CARD, finished)
    assert card_faults(store) == ["README.md says that the run is finished"]


def test_a_card_of_the_users_own_is_kept(store):
    """A user who removes the last line owns the card: it is neither reported nor replaced."""
    own = b"---\nlicense: mit\n---\n# Mine\n"
    store.put(layout.CARD, own)
    assert card_faults(store) == []
    write_card(store, read_run(store), aggregate(store))
    unseal_shard(store, 0)
    assert store.get(layout.CARD) == own


def test_a_root_of_a_version_without_cards_is_valid(store):
    store.delete(layout.CARD)
    run = read_run(store)
    del run["card"]
    store.put(layout.RUN, encode(run))
    assert card_faults(store) == []


def facts(*columns: str) -> CardFacts:
    return CardFacts(3, 0, 0, 1000, 1.5, pa.schema([(name, pa.string()) for name in columns]))


@given(st.text(), st.lists(st.text(), max_size=5, unique=True))
def test_no_name_or_text_changes_the_structure_of_the_card(text, columns):
    """P1: names of columns, versions and identities are hostile. The front matter, the tables and the blocks stay."""
    run = RUN | {"identity": {"defaults": {"negative_prompt": text}}, "versions": {"torch": text}}
    card = card_text(run, facts(*columns))
    plain = card_text(RUN, facts(*("x" for _ in columns)))
    assert DatasetCard(card).data.to_dict() == DatasetCard(plain).data.to_dict()
    assert card.count("```") == plain.count("```")
    lines = card.split("## Columns\n\n")[1].split("\n\n")[0].split("\n")
    assert len(lines) == 2 + len(columns)
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 4 for line in lines)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<script>", "&lt;script&gt;"),
        ("[x](javascript:1)", r"\[x\]\(javascript\:1\)"),
        ("a\n\n# b", r"a \# b"),
        ("\u202egpj", r"\\u202egpj"),
        ("x" * 200, "x" * 99 + "…"),
    ],
)
def test_markdown_shows_a_text_and_means_nothing_else(text, shown):
    assert markdown(text) == shown


@given(st.binary())
def test_any_bytes_are_a_card_of_the_user_or_refused(data):
    assert parse_card(data) is None


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_signed_card_says_what_was_signed(text, is_finished, committed, quarantined):
    state = CardState(is_finished, committed, quarantined)
    signed = sign_card(text, state)
    assert parse_card(signed) == state
    with pytest.raises(ValueError, match="was changed"):
        parse_card(b"x" + signed)
