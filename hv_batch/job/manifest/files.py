"""Which files a manifest is: paths, URLs, globs and folders become a list of files in one fixed order.

Folders named `column=value` in a file's path are columns of its rows, as Hive, Spark and DuckDB write and read them. A
file's version (size and whatever its store tells of its last change) is what later looks are compared with, so that a
manifest that changes under a run is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote

import fsspec

from hv_batch.job.user_input import explain_failure
from hv_batch.protocol import UserError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv",)
PARQUET_SUFFIXES = (".parquet", ".pq")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of the text formats; Parquet compresses inside
ALLOWED = (
    f"{', '.join(JSONL_SUFFIXES)} (one JSON object a line) and {', '.join(CSV_SUFFIXES)} (with a header), each also "
    f"with {' or '.join(COMPRESSIONS)} behind it, and {', '.join(PARQUET_SUFFIXES)}"
)
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # how Hive and Spark name the folder of rows without a value

# What stores tell of a file's last change. Which of them are there depends on the store.
VERSION_FACTS = ("size", "ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a manifest."""

    name: str  # as messages show it: what the user wrote, or the path or URL found in a folder
    filesystem: Any
    path: str
    suffix: str  # of the format, without that of the compression
    compression: str | None  # as Arrow names it
    version: Mapping[str, str]  # of VERSION_FACTS, those that the store tells

    @property
    def partitions(self) -> dict[str, str | None]:
        """Columns that the folders of the path stand for; None is a null."""
        pairs = (folder.partition("=") for folder in self.path.split("/")[:-1])
        named = {unquote(name): unquote(value) for name, equals, value in pairs if name and equals}
        return {name: None if value == NULL_PARTITION else value for name, value in named.items()}

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file's bytes. Raises UserError when it cannot be opened, or is no longer of this version at the end."""
        with _explained(self.name):
            self.require_version()
            file = self.filesystem.open(self.path, "rb")
        with file:
            yield file
        with _explained(self.name):
            self.require_version()

    def require_version(self) -> None:
        if _version(_info(self.filesystem, self.path)) != self.version:
            raise UserError(changed(self.name))


def changed(name: str) -> str:
    """What a user is told whose manifest is not what it was."""
    return (
        f"The manifest {name} changed while it was read. Leave a manifest as it is until its run has begun, and write "
        "new rows to a new file. What is committed stays."
    )


def find_sources(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> tuple[Source, ...]:
    """Every file behind `urls`, sorted by name; one that several of them mean is there once.

    A folder means all files below it, but for hidden ones (a name that begins with "." or "_"). Raises UserError when
    there is none, or one of another format.
    """
    found: dict[str, Source] = {}
    for url in urls:
        with _explained(url):
            filesystem, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
            for source in _expand(url, filesystem, path):
                found[source.name] = source
    return tuple(found[name] for name in sorted(found))


def _expand(url: str, filesystem: Any, path: str) -> Iterator[Source]:
    try:
        info = _info(filesystem, path)
    except FileNotFoundError:
        matches = filesystem.glob(path, detail=True) if any(char in path for char in "*?[") else {}
        if not matches:
            raise
        files = {match: facts for match, facts in matches.items() if facts["type"] == "file"}
    else:
        if info["type"] != "directory":
            yield _source(url, filesystem, path, info)
            return
        files = {
            below: facts
            for below, facts in filesystem.find(path, detail=True).items()
            if not any(part[0] in "._" for part in below.removeprefix(path).strip("/").split("/"))
        }
        if not files:
            raise UserError(f"The manifest {url} is a folder without files. Allowed in it: {ALLOWED}.")
    is_local = "file" in _protocols(filesystem)
    for below, facts in files.items():
        yield _source(below if is_local else filesystem.unstrip_protocol(below), filesystem, below, facts)


def _source(name: str, filesystem: Any, path: str, info: Mapping[str, Any]) -> Source:
    last = PurePosixPath(path.split("?")[0] if "://" in path else path)  # of a URL, without "?version=2"
    suffixes = ["", *(suffix.lower() for suffix in last.suffixes)]
    compression = COMPRESSIONS.get(suffixes[-1])
    suffix = suffixes[-2 if compression else -1]
    texts = JSONL_SUFFIXES + CSV_SUFFIXES
    if suffix not in (texts if compression else texts + PARQUET_SUFFIXES):
        raise UserError(
            f"The manifest {name} has the suffix {last.suffix or '(none)'!r}; allowed: {ALLOWED}. Convert, rename or "
            "move it."
        )
    return Source(name, filesystem, path, suffix, compression, _version(info))


def _info(filesystem: Any, path: str) -> dict[str, Any]:
    filesystem.invalidate_cache()  # listings of before a change would hide it
    found: dict[str, Any] = filesystem.info(path)
    return found


def _version(info: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(info[name]) for name in VERSION_FACTS if info.get(name) is not None}


def _protocols(filesystem: Any) -> tuple[str, ...]:
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every storage backend raises its own kinds (credentials, endpoints, missing packages)
        raise UserError(f"The manifest {name} {explain_failure(error)}") from error
