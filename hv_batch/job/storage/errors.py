"""Classifies the errors of a store: transient, refused, full, or none of these.

Every fsspec driver raises the errors of its own packages, which are optional and may not be picklable. Three kinds are
translated to built-in exceptions. An unreachable store becomes StorageUnavailableError, an infrastructure failure.
Refused credentials become PermissionError, and a full store becomes OSError with ENOSPC; both stop the run. None of the
three counts against a sample (P5).
"""

from __future__ import annotations

import errno
from typing import Any, NoReturn

from hv_batch.job.redaction import public_text, public_url

# S3 answers 409 to concurrent conditional PUTs of one key. A retry finds out which one succeeded.
TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
TRANSIENT_ERRNO = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ESTALE}
)
# Class names, because the packages that define them are optional: botocore, requests, aiohttp, azure.
TRANSIENT_NAMES = frozenset(
    {
        "HTTPClientError",
        "ConnectionError",
        "Timeout",
        "ClientConnectionError",
        "ServiceRequestError",
        "ServiceResponseError",
    }
)

FULL_STATUS = 507  # from S3-compatible servers that store objects on local disks

REFUSED_STATUS = frozenset({401, 403})
# Missing or expired credentials: botocore, azure, google.
REFUSED_NAMES = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ClientAuthenticationError",
        "DefaultCredentialsError",
        "RefreshError",
    }
)


class StorageUnavailableError(ConnectionError):
    """A transient error of the store that persisted through all retries."""


def raise_translated(error: Exception, url: str, num_bytes: int) -> NoReturn:
    """Raise the built-in exception for `error`, or `error` itself if it is none of the three kinds.

    `num_bytes` is the size of the failed write, for the message about a full store.
    """
    message = public_text(f"{public_url(url)}: {type(error).__name__}: {error}")
    if is_refused(error):
        raise PermissionError(errno.EACCES, message) from error
    if is_transient(error):
        raise StorageUnavailableError(message) from error
    if http_status(error) == FULL_STATUS:
        raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes are needed: {message}") from error
    raise error


def is_transient(error: BaseException) -> bool:
    """Whether a retry of the same request is likely to succeed."""
    if isinstance(error, FileNotFoundError | FileExistsError) or is_refused(error):
        return False
    if isinstance(error, TimeoutError | ConnectionError) or http_status(error) in TRANSIENT_STATUS:
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO:
        return True
    return _is_named(error, TRANSIENT_NAMES)


def is_refused(error: BaseException) -> bool:
    """Whether the store refuses the credentials, or there are none."""
    if isinstance(error, PermissionError) or http_status(error) in REFUSED_STATUS:
        return True
    # gcsfs raises a plain OSError with this text.
    return _is_named(error, REFUSED_NAMES) or (type(error) is OSError and str(error).startswith("Forbidden: "))


def http_status(error: BaseException) -> int | None:
    """The HTTP status in the cause chain of any driver's error, or None."""
    candidates: list[Any] = []
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            candidates.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        # aiohttp, azure, gcsfs
        candidates += [getattr(cause, name, None) for name in ("status", "status_code", "code")]
        cause = cause.__cause__
    return next((int(candidate) for candidate in candidates if str(candidate).isdigit()), None)


def _is_named(error: BaseException, names: frozenset[str]) -> bool:
    return any(base.__name__ in names for base in type(error).__mro__)
