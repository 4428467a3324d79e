"""What an error of a store means: try again, give up on the store, or nothing of the kind.

Every fsspec driver raises errors of its own packages, which are optional and may not survive being pickled. Those that
others must tell apart become built-in exceptions: a store that stays away is a fault of the infrastructure; refused
credentials, or a store that is full, stop the run. None is the sample's fault (P5).
"""

from __future__ import annotations

import errno
from typing import Any, NoReturn

from hv_batch.job.redaction import public_text, public_url

# 409 is S3's answer to two conditional PUTs of one key at the same instant: ask again and learn who won.
TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
TRANSIENT_ERRNO = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ESTALE}
)
# By class name, since the packages that define them are optional: botocore, requests, aiohttp, azure.
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

FULL_STATUS = 507  # S3-compatible servers on disks of their own

REFUSED_STATUS = frozenset({401, 403})
# Credentials that are missing or out of date: botocore, azure, google.
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
    """The store kept failing in a way that usually passes."""


def raise_translated(error: Exception, url: str, num_bytes: int) -> NoReturn:
    """Raise `error` as what it means, which is unchanged unless it is of the kinds above.

    `num_bytes` were to be written.
    """
    said = public_text(f"{public_url(url)}: {type(error).__name__}: {error}")
    if is_refused(error):
        raise PermissionError(errno.EACCES, said) from error
    if is_transient(error):
        raise StorageUnavailableError(said) from error
    if http_status(error) == FULL_STATUS:
        raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes are needed: {said}") from error
    raise error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment."""
    if isinstance(error, FileNotFoundError | FileExistsError) or is_refused(error):
        return False
    if isinstance(error, TimeoutError | ConnectionError) or http_status(error) in TRANSIENT_STATUS:
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO:
        return True
    return _is_named(error, TRANSIENT_NAMES)


def is_refused(error: BaseException) -> bool:
    """Whether the store says no to these credentials, or there are none."""
    if isinstance(error, PermissionError) or http_status(error) in REFUSED_STATUS:
        return True
    # gcsfs says it in the text of a bare OSError.
    return _is_named(error, REFUSED_NAMES) or (type(error) is OSError and str(error).startswith("Forbidden: "))


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of any of the drivers, if there is one."""
    candidates: list[Any] = []
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            candidates.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        candidates += [
            getattr(cause, name, None) for name in ("status", "status_code", "code")
        ]  # aiohttp, azure, gcsfs
        cause = cause.__cause__
    return next((int(candidate) for candidate in candidates if str(candidate).isdigit()), None)


def _is_named(error: BaseException, names: frozenset[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)
