"""The first contact with a Ray cluster: is there one at the address, which token does it want, which versions has it?

`ray.init` answers these questions late: it retries for minutes, aborts the process without a token, and reports that no
cluster answers. So this module asks the cluster's control service (GCS), with two small requests, before anything is
written. It also sets RAY_AUTH_MODE to what the cluster uses: a driver that uses tokens on a cluster without
them loses all its actors.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.core.generated import gcs_service_pb2 as gcs

from hv_batch.protocol import UserError

TIMEOUT_S = 10.0  # for the connection, and for each request
MODE = "RAY_AUTH_MODE"
REMEDY = (
    "Pass the address that `ray start --head` prints (HOST:6379 by default) with --address, or omit both --address and "
    "RAY_ADDRESS to use a local Ray."
)


def resolve_address(address: str | None) -> str:
    """The address to use: `address`, else RAY_ADDRESS, else "local". Raises UserError if it has no usable form."""
    source = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    scheme, separator, _ = address.partition("://")
    if separator and scheme == "ray":
        raise UserError(
            f"{source} is {address}, the address of Ray's client server. The driver must run on a node of the cluster, "
            f"because a client loses its run with its connection. {REMEDY} From outside, use `ray job submit`."
        )
    if separator:
        raise UserError(
            f"{source} is {address}, the address of Ray's dashboard, which only `ray job submit` uses. {REMEDY}"
        )
    if address not in ("local", "auto") and not re.fullmatch(r"(\[.+\]|[^:/]+):\d+", address):
        raise UserError(f"{source} is {address!r}, which is not HOST:PORT. {REMEDY}")
    return address


def contact_cluster(address: str) -> None:
    """Check that this process can use the cluster at `address`, and set RAY_AUTH_MODE as the cluster needs it.

    Raises UserError if nothing or something else answers there, or if token or versions do not fit.
    """
    if address in ("local", "auto") or os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # "auto" is a cluster of this machine, for which Ray chooses the token; TLS needs its certificates
    _check_service(address)
    token = _request_token(address)
    try:
        found = _metadata(address, token)
    except grpc.RpcError as error:
        raise _no_cluster(address, _reason(error)) from error
    _check_versions(address, found)


def describe_token() -> str:
    """Where this process has its token for Ray, without the token."""
    mode = os.environ.get(MODE, "")
    return f"token: {_token_source() if _token() else 'none'}{f', {MODE}={mode}' if mode else ''}"


def private_token() -> None:
    """Write Ray's token file for this user's local clusters, if there is none, and make it readable only for the user.

    Ray itself would write it with the permissions of any file. Without a home folder the token goes to the environment.
    """
    if os.environ.get(MODE, "token") != "token" or os.environ.get("RAY_AUTH_TOKEN") or _token_path_is_set():
        return
    path = _token_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(secrets.token_hex(32))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except OSError:
        if _token() is None:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_service(address: str) -> None:
    """Raises UserError if no gRPC service listens at the address."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: ray\r\nConnection: close\r\n\r\n")
            answer = connection.recv(5)
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error
    if answer == b"HTTP/":
        raise UserError(
            f"{address} is an HTTP server and not a Ray cluster; it may be Ray's dashboard (port 8265), which only "
            f"`ray job submit` uses. {REMEDY}"
        )


def _request_token(address: str) -> str | None:
    """The token that the cluster accepts; None if it uses none. Sets RAY_AUTH_MODE. Raises UserError if none fits."""
    mode, token = os.environ.get(MODE, "").lower(), _token()
    if _accepts(address, None):
        if mode == "token":
            raise UserError(
                f"The Ray cluster at {address} uses no tokens, but {MODE} is token, so its workers could not answer "
                f"this driver. Unset {MODE}."
            )
        return None
    where = f"RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or {_token_file()}"
    get = "`ray get-auth-token`, run on the cluster's head, prints the right one."
    if mode not in ("", "token"):
        raise UserError(f"The Ray cluster at {address} wants a token, but {MODE} is {mode}. Unset it. {get}")
    if token is None:
        raise UserError(f"The Ray cluster at {address} wants a token, and there is none in {where}. {get}")
    if not _accepts(address, token):
        raise UserError(
            f"The Ray cluster at {address} refuses the token in {_token_source()}, which is that of another cluster, "
            f"for example of this user's local Ray. Set RAY_AUTH_TOKEN. {get}"
        )
    if mode != "token":
        os.environ[MODE] = "token"
        ray._raylet.Config.initialize("")  # Ray has read the environment when it was imported
    return token


def _accepts(address: str, token: str | None) -> bool:
    """Whether the GCS answers with this token. Raises UserError if it does not answer, or is no GCS."""
    try:
        _call(address, "NodeInfoGcsService/GetClusterId", gcs.GetClusterIdRequest(), gcs.GetClusterIdReply, token)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return False
        raise _no_cluster(address, _reason(error)) from error
    return True


def _metadata(address: str, token: str | None) -> dict[str, Any]:
    """The versions of the cluster; empty if it does not publish them."""
    request = gcs.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
    reply = _call(address, "InternalKVGcsService/InternalKVGet", request, gcs.InternalKVGetReply, token)
    try:
        return dict(json.loads(reply.value))
    except (ValueError, TypeError):
        return {}


def _check_versions(address: str, found: dict[str, Any]) -> None:
    theirs = str(found.get("ray_version", ray.__version__)), str(found.get("python_version", platform.python_version()))
    ours = ray.__version__, platform.python_version()
    same_python = theirs[1].split(".")[:2] == ours[1].split(".")[:2]
    if theirs[0] != ours[0] or not same_python:
        raise UserError(
            f"The Ray cluster at {address} runs Ray {theirs[0]} on Python {theirs[1]}, and this driver has Ray "
            f"{ours[0]} on Python {ours[1]}. Ray needs equal versions of Ray and equal minor versions of Python: "
            f"install ray[default]=={theirs[0]} for Python {'.'.join(theirs[1].split('.')[:2])} here, or use the image "
            "of the cluster for the driver."
        )


def _call(address: str, method: str, request: Any, reply: Any, token: str | None) -> Any:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(
            f"/ray.rpc.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        return call(request, timeout=TIMEOUT_S, metadata=[("authorization", f"Bearer {token}")] if token else [])


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(f"No Ray cluster answers at {address}: {reason}. {REMEDY}")


def _reason(error: grpc.RpcError) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "another service listens there"
    return f"{error.code().name}, {error.details()}"


def _token() -> str | None:
    """The token that Ray would use, from the same places in the same order."""
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return value
    try:
        return _token_file().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _token_path_is_set() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN_PATH"))


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token").expanduser())


def _token_source() -> str:
    return "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN", "").strip() else str(_token_file())
