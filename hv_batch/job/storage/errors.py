"""Classifies what a store raises: an outage, refused access, or a broken store. No error is attributed to a sample.

Every fsspec driver raises the errors of its own packages, which are optional and may not be picklable. `translate` maps
each of them to one of three built-in kinds (P5):

- StorageUnavailableError, an outage: the run goes on, videos wait on the disks of the nodes, and the request is
  repeated. Expired credentials and a wrong clock belong here, because an operator can correct them while the run waits.
  An error of unknown kind is an outage, too.
- StorageRefusedError: the credentials do not permit the request, or there are none.
- StorageBrokenError: the request fails with any credentials: no such bucket, a full disk, a link or a folder in
  place of an object, a server that does not support the request.

The last two stop the run. FileNotFoundError and FileExistsError of a read or a conditional write are results, not
errors, and are passed on.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

from hv_batch.job.redaction import public_text, public_url
from hv_batch.protocol import UserError


class StorageError(OSError):
    """An error of an output root or another store. Its message names the URL of the store."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()  # without "[Errno 13]", which means nothing for a bucket


class StorageUnavailableError(StorageError, ConnectionError):
    """The store does not serve this request at present."""


class StorageRefusedError(StorageError, PermissionError):
    """The store does not permit this request."""


class StorageBrokenError(StorageError):
    """The store cannot serve this request."""


class Kind(Enum):
    TRANSIENT = auto()  # a retry of the same request is likely to succeed
    EXPIRED = auto()  # the credentials: a retry with those that the operator has renewed succeeds
    CLOCK = auto()  # of this machine: it succeeds once the clock is set
    UNKNOWN = auto()
    REFUSED = auto()
    FULL = auto()
    CHECKSUMS = auto()  # an S3-compatible server that does not support checksums of uploads
    BROKEN = auto()


OUTAGES = frozenset({Kind.TRANSIENT, Kind.EXPIRED, Kind.CLOCK, Kind.UNKNOWN})
REPEATED = frozenset({Kind.TRANSIENT, Kind.EXPIRED})  # at once; the caller repeats other outages after a longer pause

CHECKSUM_SETTING = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"

REMEDIES = {
    Kind.EXPIRED: "the credentials (token) have expired or cannot be renewed. Renew them in the place where this "
    "machine finds them; they are read again before every request",
    Kind.CLOCK: "the clock of this machine differs too much from that of the store. Set the clock, for example by NTP",
    Kind.CHECKSUMS: "the server does not support the checksums that the AWS SDK adds to uploads. Set "
    f"{CHECKSUM_SETTING} in the environment of every process",
}

# Error codes in the bodies of S3 and Azure, and the reasons of Google. They say more than the HTTP status: S3 answers
# 400 or 403 to an expired token, depending on the request.
CODES = {
    Kind.EXPIRED: {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidTokenId"}
    | {"InvalidAuthenticationInfo", "AuthenticationFailed"},
    Kind.CLOCK: {"RequestTimeTooSkewed", "RequestExpired"},
    Kind.TRANSIENT: {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "RequestLimitExceeded"}
    | {"OperationAborted", "ConditionalRequestConflict", "IncompleteBody", "BadDigest", "ServerBusy"}
    | {"OperationTimedOut", "TooManyRequests", "Throttling", "ThrottlingException"},
    Kind.REFUSED: {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidAccessKeyId", "NotSignedUp"}
    | {"SignatureDoesNotMatch", "AuthorizationFailure", "AuthorizationPermissionMismatch"},
    Kind.BROKEN: {"NoSuchBucket", "ContainerNotFound", "InvalidBucketName", "PermanentRedirect"}
    | {"MethodNotAllowed", "KeyTooLongError", "EntityTooLarge", "NotImplemented"},
    Kind.CHECKSUMS: {"XAmzContentSHA256Mismatch", "MissingContentLength"},
}
KIND_OF_CODE = {code: kind for kind, codes in CODES.items() for code in codes}

# S3 answers 409 to concurrent conditional PUTs of one key. A retry finds out which one succeeded. 507 is from
# S3-compatible servers that store objects on local disks.
STATUSES = {
    Kind.TRANSIENT: {408, 409, 425, 429, 500, 502, 503, 504},
    Kind.EXPIRED: {401},
    Kind.REFUSED: {403},
    Kind.FULL: {507},
}
KIND_OF_STATUS = {status: kind for kind, statuses in STATUSES.items() for status in statuses}

# Class names, because the packages that define them are optional: botocore, requests, aiohttp, azure, google.
NAMES = {
    Kind.TRANSIENT: {"HTTPClientError", "ConnectionError", "Timeout", "ClientConnectionError"}
    | {"ServiceRequestError", "ServiceResponseError", "TransportError", "FSTimeoutError", "ClientPayloadError"},
    Kind.REFUSED: {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
    | {"CredentialUnavailableError"},
    Kind.EXPIRED: {"ClientAuthenticationError", "RefreshError", "CredentialRetrievalError", "TokenRetrievalError"}
    | {"UnauthorizedSSOTokenError", "SSOTokenLoadError", "LoginError"},
}
# Of these, the errors that mean that the machine has no credentials at all.
NO_CREDENTIALS = NAMES[Kind.REFUSED]
NO_CREDENTIALS_REMEDY = (
    "this machine has no complete credentials for the store. Give them in the environment (for S3: AWS_ACCESS_KEY_ID "
    "and AWS_SECRET_ACCESS_KEY), in the store's own credential file, or as a role of the machine; on a cluster, every "
    "node needs them"
)
KIND_OF_NAME = {name: kind for kind, names in NAMES.items() for name in names}

ERRNOS = {
    Kind.TRANSIENT: {errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENETUNREACH}
    | {errno.EHOSTUNREACH, errno.ESTALE},
    Kind.REFUSED: {errno.EACCES, errno.EPERM, errno.EROFS},
    Kind.FULL: {errno.ENOSPC, errno.EDQUOT},
    Kind.BROKEN: {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EFBIG}
    | {errno.ENOTEMPTY, errno.EEXIST},
}
KIND_OF_ERRNO = {number: kind for kind, numbers in ERRNOS.items() for number in numbers}

# Texts for which there is no code: of Google (JSON Web Tokens, rate limits) and Azure.
_CLOCK_TEXT = re.compile(r"time ?skew|clock skew|request date header|reasonable timeframe|iat and exp", re.I)
_LIMIT_TEXT = re.compile(r"rate ?limit|too many requests", re.I)
_CHECKSUM_TEXT = re.compile(
    r"aws-chunked|STREAMING-|x-amz-(checksum|sdk-checksum|trailer|content-sha256)|header you provided implies", re.I
)
_CHECKSUM_CODES = frozenset({"InvalidRequest", "InvalidArgument", "BadRequest", "NotImplemented", "400", "501"})


def translate(error: Exception, url: str, *, num_bytes: int = 0, writes: bool = False) -> Exception:
    """The error to raise in place of `error`, which a request to the store at `url` has raised.

    `writes` is whether the request was an unconditional write, and `num_bytes` the bytes that it writes.
    """
    if isinstance(error, StorageError | UserError | MemoryError):
        return error
    kind = kind_of(error)
    if isinstance(error, FileNotFoundError) and kind is not Kind.BROKEN:
        if not writes:
            return error
        kind = Kind.BROKEN
    if isinstance(error, FileExistsError) and not writes:
        return error
    remedy = f"; {REMEDIES[kind]}" if kind in REMEDIES else ""
    if kind is Kind.REFUSED and "SignatureDoesNotMatch" in error_codes(error):
        remedy = f"; check the secret key. A server other than AWS may also need {CHECKSUM_SETTING}"
    elif kind is Kind.REFUSED and any(type(cause).__name__ in NO_CREDENTIALS for cause in _chain(error)):
        remedy = f"; {NO_CREDENTIALS_REMEDY}"
    space = f"{num_bytes:,} bytes are needed: " if kind is Kind.FULL and http_status(error) else ""
    message = public_text(f"{public_url(url)}: {space}{_describe(error)}{remedy}")
    if kind in OUTAGES:
        return StorageUnavailableError(message)
    if kind is Kind.REFUSED:
        return StorageRefusedError(errno.EACCES, message)
    number = error.errno if isinstance(error, OSError) and error.errno in KIND_OF_ERRNO else None
    return StorageBrokenError(number or (errno.ENOSPC if kind is Kind.FULL else errno.EIO), message)


def kind_of(error: BaseException) -> Kind:
    """What an error of any driver says about the store. Codes are more specific than names, statuses and errnos."""
    codes, text = error_codes(error), str(error)
    if _CHECKSUM_TEXT.search(text) and _CHECKSUM_CODES.intersection(codes):
        return Kind.CHECKSUMS
    if _CLOCK_TEXT.search(text):
        return Kind.CLOCK
    for code in codes:
        if code in KIND_OF_CODE:
            return KIND_OF_CODE[code]
    for cause in _chain(error):
        for base in type(cause).__mro__:
            if base.__name__ in KIND_OF_NAME:
                return KIND_OF_NAME[base.__name__]
    status = http_status(error)
    # gcsfs raises a plain OSError with this text and without the status.
    if any(type(cause) is OSError and str(cause).startswith("Forbidden: ") for cause in _chain(error)):
        status = 403
    if status == 403 and _LIMIT_TEXT.search(text):
        return Kind.TRANSIENT
    if status in KIND_OF_STATUS:
        return KIND_OF_STATUS[status]
    if isinstance(error, OSError) and error.errno in KIND_OF_ERRNO:
        return KIND_OF_ERRNO[error.errno]
    if isinstance(error, PermissionError):
        return Kind.REFUSED
    return Kind.TRANSIENT if isinstance(error, TimeoutError | ConnectionError) else Kind.UNKNOWN


def error_codes(error: BaseException) -> list[str]:
    """The error codes that the store has sent, from the cause chain of any driver's error."""
    codes: list[Any] = []
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            codes.append(response.get("Error", {}).get("Code"))
        codes.append(getattr(cause, "error_code", None))  # azure
    return [str(getattr(code, "value", code)) for code in codes if code]


def http_status(error: BaseException) -> int | None:
    """The HTTP status in the cause chain of any driver's error, or None."""
    candidates: list[Any] = []
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            candidates.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        # aiohttp, azure, gcsfs
        candidates += [getattr(cause, name, None) for name in ("status", "status_code", "code")]
    return next((int(candidate) for candidate in candidates if str(candidate).isdigit()), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and its causes. Some drivers raise an error from itself, so the chain may be a ring."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and not any(cause is one for one in seen):
        yield cause
        seen.append(cause)
        cause = cause.__cause__


def _describe(error: Exception) -> str:
    """The class and the message of `error`, and the code that the driver has translated away."""
    # The message of an OSError begins with the number of the error, which the new error has as well.
    message = error.strerror if type(error) is OSError and error.strerror and not error.filename else str(error)
    text = f"{type(error).__name__}: {message}"
    code = next((code for code in error_codes(error) if not code.isdigit()), "")
    return text if not code or code in text else f"{text} ({code})"
