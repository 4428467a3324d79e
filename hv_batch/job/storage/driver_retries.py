"""Disables the retries of fsspec drivers, because `Store` repeats failed requests itself.

With retries in two layers their numbers multiply: a server that answered 503 got 94 requests for one object, and
neither the outage nor a request to stop was noticed for minutes. The drivers have no common setting.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

# The methods of gcsfs that send requests, each of them decorated with retries. Methods that call these are, too.
GCS_METHODS = ("_request", "_get_file_request")


class GcsRequestError(OSError):
    """A failed request to Google Cloud Storage, of a class that gcsfs does not repeat. The cause is its own error."""


def disable_retries(fs: Any) -> None:
    """Let each request of `fs` fail at its first error. `fs` must not be connected yet."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if "s3" in protocols:
        fs.retries = 1
        fs.config_kwargs = {**fs.config_kwargs, "retries": {"total_max_attempts": 1, "mode": "standard"}}
    elif "gs" in protocols:
        for name in GCS_METHODS:
            if plain := getattr(getattr(type(fs), name, None), "__wrapped__", None):
                setattr(fs, name, _once(plain, fs))
    elif "abfs" in protocols:
        policy = getattr(getattr(fs.service_client, "_config", None), "retry_policy", None)
        if policy is not None:
            policy.total_retries = 0


def _once(plain: Callable[..., Awaitable[Any]], fs: Any) -> Callable[..., Awaitable[Any]]:
    @wraps(plain)
    async def request(*args: Any, **options: Any) -> Any:
        try:
            return await plain(fs, *args, **options)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            raise GcsRequestError(str(error)) from error

    return request
