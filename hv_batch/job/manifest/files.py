"""Find the files of a manifest: paths, URLs, globs and folders become a list of files in one fixed order.

Folders named `column=value` in a file's path add columns to its rows, as in Hive, Spark and DuckDB. A file's version
(its size, and what its store reports about its last change) is compared each time the file is read, to detect a
manifest that changes during a run.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote

import fsspec
from fsspec.utils import glob_translate

from hv_batch.job.redaction import refuse_credentials
from hv_batch.job.user_input import explain_failure
from hv_batch.protocol import UserError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".json",)
CSV_SUFFIXES = (".csv",)
TSV_SUFFIXES = (".tsv",)
TEXT_SUFFIXES = (".txt",)
PARQUET_SUFFIXES = (".parquet", ".pq")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of the text formats; Parquet files are compressed internally
TEXT_FORMATS = JSONL_SUFFIXES + JSON_SUFFIXES + CSV_SUFFIXES + TSV_SUFFIXES + TEXT_SUFFIXES
ALLOWED_FORMATS = (
    f"{', '.join(JSONL_SUFFIXES)} (one JSON object a line), {', '.join(JSON_SUFFIXES)} (an array of objects), "
    f"{', '.join(CSV_SUFFIXES + TSV_SUFFIXES)} (with a header) and {', '.join(TEXT_SUFFIXES)} (one prompt a line), "
    f"each also with {' or '.join(COMPRESSIONS)} appended, and {', '.join(PARQUET_SUFFIXES)}"
)
DATASET_CARD = "/README.md"  # of a repository on the Hugging Face Hub; not a file of its data
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # Hive's and Spark's folder name for a null

# The fields in which stores report a file's version. Each store has some of them.
VERSION_FIELDS = ("size", "blob_id", "ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a manifest."""

    name: str  # in messages: what the user wrote, or the path or URL of a file in a folder
    filesystem: Any
    path: str
    suffix: str  # of the format, without the suffix of the compression
    compression: str | None  # Arrow's name for it
    version: Mapping[str, str]  # those of VERSION_FIELDS that the store reports
    base: int  # folders of the path that the manifest's URL names; those below are the manifest's own

    @property
    def partitions(self) -> dict[str, str | None]:
        """The columns given by `column=value` folders below the manifest's own folder or glob; None is a null."""
        return _columns_of(self._folders[self.base :])

    @property
    def unused_partitions(self) -> dict[str, str | None]:
        """What the folders above would give, which set nothing."""
        return _columns_of(self._folders[: self.base])

    @property
    def _folders(self) -> list[str]:
        return self.path.split("/")[:-1]

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file for reading bytes.

        Raises UserError if the file cannot be opened, or if its version has changed at the beginning or the end.
        """
        with _as_user_error(self.name):
            self.require_version()
            file = self.filesystem.open(self.path, "rb")
        with file:
            yield file
        with _as_user_error(self.name):
            self.require_version()

    def require_version(self) -> None:
        """Raises UserError if the file no longer has this version."""
        if _version(_info(self.filesystem, self.path)) != self.version:
            raise UserError(changed_message(self.name))


def _columns_of(folders: Sequence[str]) -> dict[str, str | None]:
    pairs = (folder.partition("=") for folder in folders)
    named = {unquote(name): unquote(value) for name, equals, value in pairs if name and equals}
    return {name: None if value == NULL_PARTITION else value for name, value in named.items()}


def changed_message(name: str) -> str:
    """The error message for a manifest that has changed."""
    return (
        f"The manifest {name} changed while it was read. Do not change a manifest before its run has started; write "
        "new rows to a new file. Committed samples are kept."
    )


def find_sources(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> tuple[Source, ...]:
    """All files that `urls` refer to, sorted by name and without duplicates.

    A folder stands for all files below it except README.md and hidden ones, whose name (or a folder's) begins with "."
    or "_". Raises UserError if a URL has no file, or a file has another format.
    """
    sources: dict[str, Source] = {}
    for url in urls:
        refuse_credentials("manifest", url)
        with _as_user_error(url):
            filesystem, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
            for source in _expand(url, filesystem, path):
                known = sources.get(source.name)
                if known is None or source.base < known.base:  # the order of the URLs must not matter
                    sources[source.name] = source
    return tuple(sources[name] for name in sorted(sources))


def _expand(url: str, filesystem: Any, path: str) -> Iterator[Source]:
    try:
        info = _info(filesystem, path)
    except FileNotFoundError:
        matches = filesystem.glob(path, detail=True) if _is_glob(path) else {}
        if not matches:
            raise
        files = {match: entry for match, entry in matches.items() if entry["type"] == "file"}
        base = _before_wildcards(path).count("/")
    else:
        if info["type"] != "directory":
            yield _source(url, filesystem, path, info, base=path.count("/"))
            return
        base = len(path.rstrip("/").split("/"))
        files = {
            below: entry
            for below, entry in filesystem.find(path, detail=True).items()
            if not _is_hidden(below, path) and not below.endswith(DATASET_CARD)
        }
        if not files:
            raise UserError(f"The manifest {url} is a folder without files. Allowed files: {ALLOWED_FORMATS}.")
    is_local = "file" in _protocols(filesystem)
    for below, entry in files.items():
        yield _source(below if is_local else filesystem.unstrip_protocol(below), filesystem, below, entry, base)


def refuse_own_outputs(urls: Sequence[str], root: str, keys: Iterable[str]) -> None:
    """Raise UserError if a folder or glob among `urls` would also read objects of the output root at the URL `root`.

    `keys` are keys of such objects, one of each kind. The first run would still read only the manifest, and the second
    one would fail. Sources that do not exist are ignored.
    """
    filesystem, base = fsspec.core.url_to_fs(root)
    objects = [f"{_real(filesystem, base).rstrip('/')}/{key}" for key in keys]
    for url in urls:
        with _as_user_error(url):
            other, path = fsspec.core.url_to_fs(url)
        if set(_protocols(other)).isdisjoint(_protocols(filesystem)):
            continue
        if read := next((one for one in objects if _would_read(other, _real(other, path), one)), None):
            raise UserError(
                f"The manifest {url} would also read the output root {root} (for example {read}), so the next run with "
                "it would fail. Name the files of the manifest, or choose an output root outside of it."
            )


def _would_read(filesystem: Any, path: str, file: str) -> bool:
    """Whether a manifest at `path` reads `file`, if that exists."""
    try:
        is_folder = filesystem.isdir(path)
    except Exception:  # noqa: BLE001  (each storage backend raises its own types; reading the manifest reports them)
        return False
    if is_folder:
        folder = f"{path.rstrip('/')}/"
        return file.startswith(folder) and not _is_hidden(file, folder)
    return _is_glob(path) and re.match(glob_translate(path), file) is not None


def _real(filesystem: Any, path: str) -> str:
    """The path without symbolic links; of a glob, as far as it has no wildcards."""
    if "file" not in _protocols(filesystem):
        return path
    fixed = _before_wildcards(path).rpartition("/")[0] if _is_glob(path) else path
    return os.path.realpath(fixed) + path.removeprefix(fixed)


def _is_glob(path: str) -> bool:
    return any(char in path for char in "*?[")


def _before_wildcards(path: str) -> str:
    return re.split(r"[*?\[]", path, maxsplit=1)[0]


def _is_hidden(file: str, folder: str) -> bool:
    return any(part[0] in "._" for part in file.removeprefix(folder).strip("/").split("/"))


def _source(name: str, filesystem: Any, path: str, info: Mapping[str, Any], base: int) -> Source:
    last = PurePosixPath(path.split("?")[0] if "://" in path else path)  # without the query of a URL
    suffixes = ["", *(suffix.lower() for suffix in last.suffixes)]
    compression = COMPRESSIONS.get(suffixes[-1])
    suffix = suffixes[-2 if compression else -1]
    if suffix in (".yaml", ".yml"):
        raise UserError(f"The manifest {name} is a config. Give it with --config, and the prompts with --manifest.")
    if suffix not in (TEXT_FORMATS if compression else TEXT_FORMATS + PARQUET_SUFFIXES):
        raise UserError(
            f"The manifest {name} has the suffix {last.suffix or '(none)'!r}; allowed: {ALLOWED_FORMATS}. Convert, "
            "rename or move the file."
        )
    return Source(name, filesystem, path, suffix, compression, _version(info), base)


def _info(filesystem: Any, path: str) -> dict[str, Any]:
    filesystem.invalidate_cache()  # a cached listing would hide a change
    info: dict[str, Any] = filesystem.info(path)
    return info


def _version(info: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(info[name]) for name in VERSION_FIELDS if info.get(name) is not None}


def _protocols(filesystem: Any) -> tuple[str, ...]:
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


@contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each storage backend raises its own types (credentials, endpoints, missing packages)
        raise UserError(f"The manifest {name} {explain_failure(error, name)}") from error
