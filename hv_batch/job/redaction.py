"""Removes secrets from URLs, config values and messages before they are shown or stored."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hv_batch.protocol import UserError

MASK = "***"  # replaces a secret

SECRET_NAMES = re.compile(r"token|secret|passw|credential|(api|access|private|account)_?key", re.I)


MIN_SECRET_CHARS = 8  # a shorter value of an environment variable may be a common word

# Schemes whose URLs name a user and a password by their standards. A store takes its credentials from elsewhere.
USER_SCHEMES = ("http", "https", "ftp", "ftps", "sftp", "ssh", "smb", "webdav")

# User and password at the beginning of what follows "://". The password may contain a slash, as the keys of S3 do; a
# number after the colon is a port.
_PASSWORD = re.compile(r"[^/?#\s'\"@:]*:(?!\d+(?:[/?#\s'\"]|$))[^\s'\"@]*@(?:[^/?#\s'\"]*@)?")


def refuse_credentials(role: str, url: str) -> None:
    """Raises UserError if a URL of a store contains credentials; `role` names it in the message.

    No store reads them there, its driver puts the URL into its own messages, and Ray logs command lines.
    """
    scheme, separator, rest = url.rpartition("://")
    if separator and scheme.rpartition("::")[2].lower() not in USER_SCHEMES and _PASSWORD.match(rest):
        shown = f"{scheme}://{MASK}@{public_text(rest.rpartition('@')[2])}"
        raise UserError(
            f"The {role} {shown} was given with credentials in its URL. Remove them there, replace these credentials, "
            "because command lines are logged, and give the new ones in the environment (for S3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY) or in the store's own credential file."
        )


def public_url(url: str) -> str:
    """A URL without secrets: without the user and password before its host, and without its query."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    if _PASSWORD.search(url, url.rfind("://") + 3):
        return public_text(url)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


# The user and password before a host, and the query after a path. The whole query is removed, because the name of the
# parameter that holds a signature differs from store to store.
_USER_INFO = re.compile(rf"(?<=://)(?:{_PASSWORD.pattern}|[^/?#\s'\"]*@)")
_QUERY = re.compile(r"(://[^?\s'\"]*)\?[^\s'\")\]}>]*")


def public_text(text: str) -> str:
    """A message, traceback or other text without the passwords and queries of the URLs in it."""
    return _QUERY.sub(r"\1", _USER_INFO.sub("", text)) if "://" in text else text


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """The values of the environment variables whose names suggest a secret, the longest first."""
    found = {value for name, value in environment.items() if SECRET_NAMES.search(name)}
    return sorted((value for value in found if len(value) >= MIN_SECRET_CHARS), key=len, reverse=True)


def masked_text(text: str, secrets: Iterable[str] | None = None) -> str:
    """`public_text` that masks the values in `secrets` as well; by default those of this process's environment."""
    for value in secret_values(os.environ) if secrets is None else secrets:
        text = text.replace(value, MASK)
    return public_text(text)


def printable_text(text: str) -> str:
    """A text whose control characters are shown as escapes, for a terminal or a log; lines and tabs stay.

    An id, a prompt or an error from outside could otherwise move the cursor, or hide and forge output.
    """
    return text if text.isprintable() else _CONTROL.sub(lambda found: _escape(found[0]), text)


# Control characters except for newline and tab, line separators, lone surrogates, and what changes the direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"


def safe_text(text: str, secrets: Iterable[str] | None = None) -> str:
    """What of a text may reach a terminal or a log: without secrets (`masked_text`) and control characters."""
    return printable_text(masked_text(text, secrets))


def public_values(value: Any) -> Any:
    """A copy of a JSON value in which every value is masked whose name suggests a secret, or that is a URL with one."""
    if isinstance(value, Mapping):
        return {k: MASK if SECRET_NAMES.search(str(k)) else public_values(v) for k, v in value.items()}
    if isinstance(value, str):
        return value if public_text(value) == value else MASK
    return [public_values(item) for item in value] if isinstance(value, list) else value
