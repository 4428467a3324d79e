"""The keys of an output root: one function for each kind of object.

    run.json                                     what this root is: the run's identity, config, versions
    data/shard-00017/<key>-<hash8>.mp4           media; the hash of its bytes is in its name
    data/shard-00017/metadata.parquet            the sealed shard
    webdataset/shard-00017.tar                   the sealed shard as one file, if output.webdataset is set
    lineage/shard-00017.parquet                  how its videos were rendered: times, attempts, places, versions
    posters/shard-00017/<key>-<hash8>.jpg        a frame of a video for pages, if media.poster is set
    commits/shard-00017/<key>.json               the record of a committed sample
    quarantine/shard-00017/<key>.json            the record of a quarantined sample
    retried/shard-00017/<key>.json               the quarantine record of a sample that was released for a retry
    withdrawn/shard-00017/<key>.json             the tombstone of a sample that was withdrawn for good
    latents/shard-00017/<key>.safetensors        the final latents of a sample that is not committed yet
    steps/shard-00017/<key>.safetensors          the last step checkpoint of an unfinished denoise
    report/shards/shard-00017.json               the totals of the sealed shard, for the summary
    events/20261129T014500Z-0a1b2c3d/00017.jsonl what one driver did, in parts that are written once (`job/event_log`)
    report/parts/shard-00017.json                the samples of the shard as the report shows them
    report/digests/shard-00017.json              what the report counts of the shard, and the state that it describes
    choices.json                                 what the first group chose for `auto` options, such as the kernel
    lease.json                                   the process that is writing to the root
    plan/index.json, plan/part-00017-<hash8>.parquet   the checked manifest; a resume reads its samples from it
    README.md                                    the dataset card; that of an unfinished run refuses to be loaded
    summary.json, report/index.html, report/report.json, _SUCCESS

Keys are POSIX paths relative to the root. `key` is a sample's key-safe name (`Sample.key`), unique within the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# The path of an object whose name is a sample's key and nothing else. Folders and suffixes belong together: a
# `commits/shard-00000/a.safetensors` is no record.
_SAMPLE_OBJECT = re.compile(
    r"(?:(?:commits|quarantine|retried|withdrawn)/shard-\d{5,}/(?P<record>[^/]+)\.json"
    r"|(?:latents|steps)/shard-\d{5,}/(?P<tensors>[^/]+)\.safetensors)"
)
# The path of a media file or poster: the sample's key, eight digits of the file's hash, a suffix.
_MEDIA = re.compile(r"(?:data|posters)/shard-\d{5,}/(?P<key>[^/]+)-[0-9a-f]{8}\.[A-Za-z0-9]+")
# The path of a part of a driver's events: the start of the driver, eight digits that tell drivers apart, the part.
_EVENT_PART = re.compile(r"events/(?P<driver>\d{8}T\d{6}Z-[0-9a-f]{8})/(?P<part>\d{5})\.jsonl")
# The name of the folder of a shard. No run has more than `documents.fields.MAX_SAMPLES` of them.
_SHARD = re.compile(r"shard-(?P<number>\d{5,9})")
# The key of a row (`hv_batch.job.manifest.rows`) or of one of its videos, which adds a suffix of up to 6 characters.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,101}")

RUN = "run.json"
SUMMARY = "summary.json"
SUCCESS = "_SUCCESS"
REPORT = "report/index.html"
REPORT_DATA = "report/report.json"
CHOICES = "choices.json"
LEASE = "lease.json"
CARD = "README.md"  # the name that the Hugging Face Hub and its loaders expect
COMMITS = "commits/"
STEPS = "steps/"
QUARANTINE = "quarantine/"
RETRIED = "retried/"
WITHDRAWN = "withdrawn/"
EVENTS = "events/"
MEDIA = "data/"
SHARD_FOLDERS = (
    COMMITS,
    QUARANTINE,
    RETRIED,
    WITHDRAWN,
    MEDIA,
    "posters/",
    "latents/",
    STEPS,
)  # with a folder for each shard
SEAL_FOLDERS = ("webdataset/", "lineage/", "report/shards/")  # with an object for each sealed shard
PLAN = "plan/"
INDEX = f"{PLAN}index.json"


def examples() -> tuple[str, ...]:
    """A key of each kind of object."""
    digest, sample = "0" * 64, "sample"
    return (
        *(RUN, SUMMARY, SUCCESS, REPORT, REPORT_DATA, CHOICES, LEASE, CARD, INDEX, index_part(0, digest)),
        *(report_part_key(0), report_digest_key(0)),
        *(media_key(0, sample, digest, suffix) for suffix in (".mp4", ".png")),
        *(metadata_key(0), totals_key(0), tar_key(0), lineage_key(0), poster_key(0, sample, digest)),
        *(commit_key(0, sample), quarantine_key(0, sample), retried_key(0, sample), withdrawn_key(0, sample)),
        *(latent_key(0, sample), step_key(0, sample), event_part("20261129T014500Z-0a1b2c3d", 0)),
    )


def index_part(number: int, sha256: str) -> str:
    """The key of one part of the index.

    The name holds the hex digest `sha256` of the part's bytes, so no writer can replace another writer's part.
    """
    return f"{PLAN}part-{number:05d}-{sha256[:8]}.parquet"


def event_part(driver: str, part: int) -> str:
    """The key of one part of the events of a driver, as the path names it."""
    return f"{EVENTS}{driver}/{part:05d}.jsonl"


def event_driver(path: str) -> tuple[str, int] | None:
    """The name of the driver and the number of the part in the path of a part of its events; None for other objects."""
    match = _EVENT_PART.fullmatch(path)
    return (match["driver"], int(match["part"])) if match else None


def folders(shards: Iterable[int]) -> Iterator[str]:
    """The folders in which a run writes objects: those of these shards, and those that all shards share."""
    yield from ("", PLAN, "report/", "report/shards/", "report/parts/", "report/digests/", "lineage/", "webdataset/")
    for shard in shards:
        yield from (media_dir(shard), poster_dir(shard), commit_dir(shard), quarantine_dir(shard), retried_dir(shard))
        yield from (latent_dir(shard), f"{STEPS}{shard_name(shard)}/")


def shard_name(shard: int) -> str:
    # Five digits keep names in numerical order up to 100,000 shards: 25 million samples at the default shard size.
    return f"shard-{shard:05d}"


def shard_number(name: str) -> int | None:
    """The number of the shard with this name; None for any other name."""
    match = _SHARD.fullmatch(name)
    return int(match["number"]) if match and shard_name(int(match["number"])) == name else None


def media_dir(shard: int) -> str:
    return f"{MEDIA}{shard_name(shard)}/"


def media_key(shard: int, key: str, sha256: str, suffix: str) -> str:
    """The key of a rendered file. `sha256` is the hex digest of its bytes; `suffix` begins with the dot.

    Different bytes get a different name, so a late writer cannot overwrite a committed file (P1).
    """
    return f"{media_dir(shard)}{key}-{sha256[:8]}{suffix}"


def poster_dir(shard: int) -> str:
    """Posters have a folder of their own, because dataset loaders reject a folder that mixes images and videos."""
    return f"posters/{shard_name(shard)}/"


def poster_key(shard: int, key: str, sha256: str) -> str:
    return f"{poster_dir(shard)}{key}-{sha256[:8]}.jpg"


def is_poster_of(path: str, shard: int, key: str) -> bool:
    """Whether `path` is that of a poster of this sample, whatever its hash."""
    prefix, _, rest = path.rpartition("-")
    return prefix == f"{poster_dir(shard)}{key}" and re.fullmatch(r"[0-9a-f]{8}\.jpg", rest) is not None


def metadata_key(shard: int) -> str:
    return f"{media_dir(shard)}metadata.parquet"


def totals_key(shard: int) -> str:
    return f"report/shards/{shard_name(shard)}.json"


def report_part_key(shard: int) -> str:
    return f"report/parts/{shard_name(shard)}.json"


def report_digest_key(shard: int) -> str:
    return f"report/digests/{shard_name(shard)}.json"


def tar_key(shard: int) -> str:
    return f"webdataset/{shard_name(shard)}.tar"


def lineage_key(shard: int) -> str:
    return f"lineage/{shard_name(shard)}.parquet"


def commit_dir(shard: int) -> str:
    return f"{COMMITS}{shard_name(shard)}/"


def commit_key(shard: int, key: str) -> str:
    return f"{commit_dir(shard)}{key}.json"


def quarantine_dir(shard: int) -> str:
    return f"{QUARANTINE}{shard_name(shard)}/"


def quarantine_key(shard: int, key: str) -> str:
    return f"{quarantine_dir(shard)}{key}.json"


def retried_dir(shard: int) -> str:
    return f"{RETRIED}{shard_name(shard)}/"


def retried_key(shard: int, key: str) -> str:
    return f"{retried_dir(shard)}{key}.json"


def withdrawn_dir(shard: int) -> str:
    return f"{WITHDRAWN}{shard_name(shard)}/"


def withdrawn_key(shard: int, key: str) -> str:
    return f"{withdrawn_dir(shard)}{key}.json"


def latent_dir(shard: int) -> str:
    return f"latents/{shard_name(shard)}/"


def latent_key(shard: int, key: str) -> str:
    return f"{latent_dir(shard)}{key}.safetensors"


def step_dir(shard: int) -> str:
    return f"{STEPS}{shard_name(shard)}/"


def step_key(shard: int, key: str) -> str:
    return f"{step_dir(shard)}{key}.safetensors"


def media_owner(path: str) -> str | None:
    """The key in the path of a media file or poster, whatever its hash; None for any other object."""
    match = _MEDIA.fullmatch(path)
    return match["key"] if match and is_sample_key(match["key"]) else None


def is_sample_key(name: str) -> bool:
    """Whether a sample can have this key. Such a name is safe in every path, and as the member of a tar."""
    return _KEY.fullmatch(name) is not None and ".." not in name and not name.endswith(".")


def sample_keys(paths: Iterable[str]) -> frozenset[str]:
    """The sample keys of records, latents or checkpoints. Other objects (an editor's copy, a subfolder) have none."""
    return frozenset(key for key in map(sample_key, paths) if key is not None)


def sample_key(path: str) -> str | None:
    """The sample key in the path of one of its records or latents; None for any other object."""
    match = _SAMPLE_OBJECT.fullmatch(path)
    key = (match["record"] or match["tensors"]) if match else None
    return key if key is not None and is_sample_key(key) else None


def media_name(key: str, sha256: str, num_frames: int) -> str:
    """The name of a sample's file in `media_dir`: a PNG for one frame, else an MP4."""
    return f"{key}-{sha256[:8]}{'.png' if num_frames == 1 else '.mp4'}"
