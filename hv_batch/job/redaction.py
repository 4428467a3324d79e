"""Removes secrets from URLs, config values and messages before they are shown or stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"  # replaces a secret

SECRET_NAMES = re.compile(r"token|secret|passw|credential|(api|access|private|account)_?key", re.I)


def public_url(url: str) -> str:
    """A URL without secrets: without the user and password before its host, and without its query."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


# The user and password before a host, and the query after a path. The whole query is removed, because the name of the
# parameter that holds a signature differs from store to store.
_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_QUERY = re.compile(r"(://[^?\s'\"]*)\?[^\s'\")\]}>]*")


def public_text(text: str) -> str:
    """A message, traceback or other text without the passwords and queries of the URLs in it."""
    return _QUERY.sub(r"\1", _USER_INFO.sub("", text)) if "://" in text else text


def public_values(value: Any) -> Any:
    """A copy of a JSON value in which every value is masked whose name suggests a secret, or that is a URL with one."""
    if isinstance(value, Mapping):
        return {k: MASK if SECRET_NAMES.search(str(k)) else public_values(v) for k, v in value.items()}
    if isinstance(value, str):
        return value if public_text(value) == value else MASK
    return [public_values(item) for item in value] if isinstance(value, list) else value
