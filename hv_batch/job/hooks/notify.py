"""Sends a JSON document to a command or a URL of the user, within a time limit, and never raises.

A URL is a secret: anyone who knows the URL of a webhook can write to it. It is never stored, and messages show only its
host.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import ssl
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from hv_batch.job.hooks.call import call_command
from hv_batch.job.hooks.hook import Hook, HookFailedError, HookUnavailableError, describe_hook, parse_hook
from hv_batch.job.redaction import MASK, safe_text
from hv_batch.protocol import UserError

VARIABLE = "HV_BATCH_ON_FINISH"
LIMIT_S = 30.0  # the process must end soon after its run: a scheduler may be waiting to kill it

logger = logging.getLogger(__name__)


def take_target(flag: str | None) -> str | None:
    """The target of the flag, or else of the environment variable; None if there is none.

    The variable is removed, so that no worker or hook inherits the secret. Raises UserError if the target is neither a
    URL of http or https, nor a command that exists here.
    """
    from_environment = os.environ.pop(VARIABLE, None)
    target = from_environment if flag is None else flag
    if target is None:
        return None
    source = VARIABLE if flag is None else "--on-finish"
    allowed = "allowed: an http or https URL, or a command line"
    if "://" in target.split(" ", 1)[0]:
        if not _is_web(target):
            raise UserError(f"{source} is a URL that cannot be used; {allowed}.")
        return target
    try:
        hook = parse_hook(target)
        if hook.is_function:
            raise ValueError("a command line, not a function")
        describe_hook(hook)
    except (ValueError, HookUnavailableError) as error:
        raise UserError(f"{source} = {safe_text(target)} cannot be used: {error}; {allowed}.") from error
    return target


def notify(target: str, document: Mapping[str, Any]) -> bool:
    """Send the document: a POST to a URL, or the stdin of a command. Returns whether it was accepted; logs why not."""
    outcome: list[str] = []

    def send() -> None:
        outcome.append(_post(target, document) if _is_web(target) else _call(parse_hook(target), document))

    thread = threading.Thread(target=send, daemon=True, name="on-finish")
    thread.start()
    thread.join(LIMIT_S + 1)  # a command has the same limit, and is killed at it
    problem = outcome[0] if outcome else f"no answer within {LIMIT_S:g} s"
    if problem:
        logger.warning(f"on_finish: {describe_target(target)} was not informed: {problem}")
        return False
    logger.info(f"on_finish: {describe_target(target)} was informed")
    return True


def describe_target(target: str) -> str:
    """The target for messages: of a URL, the host only."""
    if not _is_web(target):
        return f"the command {safe_text(target)}"
    url = urlsplit(target)
    return f"{url.scheme}://{url.hostname}/{MASK}"


def _is_web(target: str) -> bool:
    try:
        url = urlsplit(target)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def _call(hook: Hook, document: Mapping[str, Any]) -> str:
    try:
        call_command(hook, json.dumps(document).encode(), LIMIT_S)
    except (HookFailedError, HookUnavailableError, OSError) as error:
        return str(error)
    return ""


def _post(target: str, document: Mapping[str, Any]) -> str:
    """The problem with the request, or an empty text. Redirects are not followed: they could carry the secret away."""
    url = urlsplit(target)
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    try:
        connection = _connect(url)
        headers = {"Content-Type": "application/json", "User-Agent": "hv_batch"}
        connection.request("POST", path, json.dumps(document).encode(), headers)
        status = connection.getresponse().status
        connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return type(error).__name__ if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return "" if 200 <= status < 300 else f"it answered with HTTP status {status}"


def _connect(url: SplitResult) -> http.client.HTTPConnection:
    assert url.hostname is not None
    if url.scheme == "https":
        return http.client.HTTPSConnection(
            url.hostname, url.port, timeout=LIMIT_S, context=ssl.create_default_context()
        )
    return http.client.HTTPConnection(url.hostname, url.port, timeout=LIMIT_S)
