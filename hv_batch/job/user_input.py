"""Opens the user's files (config, manifest) from any fsspec URL, and formats their values for messages."""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import fsspec

from hv_batch.job.redaction import refuse_credentials
from hv_batch.protocol import UserError

MANIFEST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".pq")
SHOWN_CHARS = 60  # of an invalid value: enough to find it, short enough for one line


@contextmanager
def open_input(role: str, url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """Open `url` for reading; `role` ("config", "manifest") names the file in messages.

    Raises UserError if it cannot be opened. Errors while reading are raised unchanged.
    """
    refuse_credentials(role, url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
        file = filesystem.open(path, "rb")
    except Exception as error:  # each storage backend raises its own classes (credentials, endpoints, missing packages)
        raise UserError(f"The {role} {url} {explain_failure(error, url)}") from error
    with file:
        yield file


def is_manifest_name(url: str) -> bool:
    """Whether the name of a file is that of a manifest, and never that of a config."""
    return url.lower().removesuffix(".gz").removesuffix(".zst").endswith(MANIFEST_SUFFIXES)


def explain_failure(error: Exception, url: str = "") -> str:
    """The reason and the remedy if the file at `url` cannot be opened, as the rest of a sentence that begins so."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, OSError):
        # fsspec's HTTP driver raises FileNotFoundError also if it cannot reach the server.
        return f"cannot be reached: {error.__cause__}. Check the URL, the network and the credentials."
    if isinstance(error, FileNotFoundError):
        return _explain_missing(url)
    if isinstance(error, IsADirectoryError):
        return "is a directory. Give the path or URL of one file."
    if isinstance(error, PermissionError):
        return "cannot be read with these credentials. Grant read access, or use other credentials."
    if isinstance(error, ImportError):
        return f"needs a storage package that is not installed ({error}). Install the extra s3, gcs or azure."
    return f"cannot be opened: {type(error).__name__}: {error}. Check the URL, the network and the credentials."


def _explain_missing(url: str) -> str:
    if not url or "://" in url:
        return "does not exist. Give the path or URL of an existing file."
    place = f"does not exist: there is no {os.path.abspath(url)} on {socket.gethostname()}."
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or os.path.isabs(url):
        return f"{place} Give the path or URL of an existing file."
    return (
        f"{place} That is the copy of working_dir which `ray job submit` has uploaded, without the files that a "
        ".gitignore or `excludes` of the runtime environment name. Check both, or give a URL or a path on storage that "
        "all nodes share."
    )


def quote_argument(text: str) -> str:
    """A text from outside as one argument of a shell command that a message suggests. It may be copied into a shell."""
    return shlex.quote(shorten(text)[1:-1])


def shorten(value: Any) -> str:
    """A value as JSON of at most SHOWN_CHARS characters, on one line and without control characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys that JSON has not, as dates; huge numbers; deep nesting
        text = _as_python(value)
    text = "".join(char if char.isprintable() else "�" for char in text)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _as_python(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python converts numbers of at most 4,300 digits
        return f"({type(value).__name__})"
