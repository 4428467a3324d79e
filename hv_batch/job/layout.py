"""The keys of an output root: one function a kind of object, so that the layout is written down once.

    run.json                                     what this root is: the run's identity, config, versions
    data/shard-00017/<key>-<hash8>.mp4           media; the hash of its bytes is in its name
    data/shard-00017/metadata.parquet            the sealed shard
    webdataset/shard-00017.tar                   the sealed shard as one file, where output.webdataset is set
    lineage/shard-00017.parquet                  how its videos came to be: times, tries, places, versions
    posters/shard-00017/<key>-<hash8>.jpg        the first frame of a video, where media.poster is set
    commits/shard-00017/<key>.json               the record that makes a sample done
    quarantine/shard-00017/<key>.json            the record of a sample that was given up
    retried/shard-00017/<key>.json               that record, once the sample was taken back
    latents/shard-00017/<key>.safetensors        a final latent whose video is not committed yet
    steps/shard-00017/<key>.safetensors          the last step checkpoint of a denoise that has not ended well yet
    report/shards/shard-00017.json               what the sealed shard adds to the summary
    lease.json                                   who is writing here at the moment
    plan/index.json, plan/part-00017-<hash8>.parquet   the manifest as it was checked, to go on without it
    summary.json, report/index.html, _SUCCESS

Keys are relative to the root and posix. `key` is a sample's key-safe name (`Sample.key`), unique within the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable

SUFFIXES = (".json", ".safetensors")  # of what is named after a sample's key alone

RUN = "run.json"
SUMMARY = "summary.json"
SUCCESS = "_SUCCESS"
REPORT = "report/index.html"
LEASE = "lease.json"
COMMITS = "commits/"
STEPS = "steps/"
PLAN = "plan/"
INDEX = f"{PLAN}index.json"


def index_part(number: int, sha256: str) -> str:
    """Where a part of the index goes; `sha256` is the hex digest of its bytes, so that no writer changes another's."""
    return f"{PLAN}part-{number:05d}-{sha256[:8]}.parquet"


def shard_name(shard: int) -> str:
    # Five digits keep names in order up to 100,000 shards, which is 25 million samples at the default shard size.
    return f"shard-{shard:05d}"


def media_dir(shard: int) -> str:
    return f"data/{shard_name(shard)}/"


def media_key(shard: int, key: str, sha256: str, suffix: str) -> str:
    """Where a rendered file goes; `sha256` is the hex digest of its bytes, `suffix` begins with the dot.

    The digest in the name is what makes a late writer harmless (P1): other bytes get another name.
    """
    return f"{media_dir(shard)}{key}-{sha256[:8]}{suffix}"


def poster_dir(shard: int) -> str:
    """Not beside the media: a folder of images and videos is no dataset to the loaders."""
    return f"posters/{shard_name(shard)}/"


def poster_key(shard: int, key: str, sha256: str) -> str:
    return f"{poster_dir(shard)}{key}-{sha256[:8]}.jpg"


def metadata_key(shard: int) -> str:
    return f"{media_dir(shard)}metadata.parquet"


def sums_key(shard: int) -> str:
    return f"report/shards/{shard_name(shard)}.json"


def tar_key(shard: int) -> str:
    return f"webdataset/{shard_name(shard)}.tar"


def lineage_key(shard: int) -> str:
    return f"lineage/{shard_name(shard)}.parquet"


def commit_dir(shard: int) -> str:
    return f"{COMMITS}{shard_name(shard)}/"


def commit_key(shard: int, key: str) -> str:
    return f"{commit_dir(shard)}{key}.json"


def quarantine_dir(shard: int) -> str:
    return f"quarantine/{shard_name(shard)}/"


def quarantine_key(shard: int, key: str) -> str:
    return f"{quarantine_dir(shard)}{key}.json"


def retried_dir(shard: int) -> str:
    return f"retried/{shard_name(shard)}/"


def retried_key(shard: int, key: str) -> str:
    return f"{retried_dir(shard)}{key}.json"


def latent_dir(shard: int) -> str:
    return f"latents/{shard_name(shard)}/"


def latent_key(shard: int, key: str) -> str:
    return f"{latent_dir(shard)}{key}.safetensors"


def step_key(shard: int, key: str) -> str:
    return f"{STEPS}{shard_name(shard)}/{key}.safetensors"


def sample_keys(paths: Iterable[str]) -> frozenset[str]:
    """Of the samples whose records, latents or checkpoints these are; of other files, which somebody else has put there
    (an editor's copy, the marker of a folder), none.
    """
    return frozenset(sample_key(path) for path in paths if path.endswith(SUFFIXES))


def sample_key(path: str) -> str:
    """The sample's key of the path of one of its objects. Keys may hold dots, so only the one suffix goes."""
    name = path.rsplit("/", 1)[-1]
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name
