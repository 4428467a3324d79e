"""Calls the sample hook: it may change the media file of a sample, or score it, before the sample is committed.

A command gets the path of the file as its last argument and the sample as JSON on its stdin. A function gets the path
and the sample. The hook changes the file in place, or leaves it. It answers with a JSON object (a command: on stdout; a
function: what it returns), which becomes the field `hook` of the commit record, or with nothing.
"""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hv_batch.job.hooks.call import call_command, call_function, read_answer
from hv_batch.job.hooks.hook import Hook, HookFailedError, HookUnavailableError, describe_hook
from hv_batch.job.storage.local_disk import file_sha256
from hv_batch.media.probe import decode_media
from hv_batch.media.writer import MediaInfo

MAX_ANSWER_CHARS = 65_536  # of the JSON text: a commit record is a small object


def check_sample_hook(hook: Hook, expected: Mapping[str, Any]) -> None:
    """Raises HookUnavailableError if the hook does not exist on this node, or is not the one of the run (P3)."""
    if (found := describe_hook(hook)) != expected:
        raise HookUnavailableError(
            f"the hook {hook.name} of this node has another content than that of the driver (sha256 {found['sha256']} "
            f"in place of {expected['sha256']}); install the same version on all nodes"
        )


def run_sample_hook(hook: Hook, media: MediaInfo, sample: Mapping[str, Any], timeout_s: float) -> MediaInfo:
    """Call the hook for the file of `media`. Returns `media` with the hash and size of the file as the hook left it.

    `sample` has the fields of a commit record that the plan determines. Raises HookUnavailableError (a fault of this
    node) and HookFailedError (of this sample).
    """
    document = {**sample, "produced": {"num_frames": media.num_frames, "height": media.height, "width": media.width}}
    document["scores"] = dict(media.scores)
    if hook.is_function:
        answer = call_function(hook, (media.path, copy.deepcopy(document)), timeout_s)
    else:
        answer = read_answer(hook, call_command(hook, json.dumps(document).encode(), timeout_s, str(media.path)))
    try:
        status = media.path.lstat()
    except FileNotFoundError:
        raise HookFailedError(f"the hook {hook.name} has removed the file") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise HookFailedError(f"the hook {hook.name} has left no file: it must change the file in place or leave it")
    sha256 = file_sha256(media.path)
    if sha256 != media.sha256:
        _check_file(hook, media)
    return replace(media, sha256=sha256, bytes=status.st_size, hook=_check_answer(hook, answer))


def _check_file(hook: Hook, media: MediaInfo) -> None:
    """Raises HookFailedError if the file, which the hook has changed, is not a medium of the same shape any more."""
    try:
        shape = decode_media(media.path.read_bytes(), media.suffix)
    except ValueError as error:
        raise HookFailedError(f"the file that the hook {hook.name} has changed cannot be decoded: {error}") from None
    if (shape.num_frames, shape.height, shape.width) != (media.num_frames, media.height, media.width):
        raise HookFailedError(
            f"the hook {hook.name} has made {shape.num_frames} frames of {shape.width}x{shape.height} from "
            f"{media.num_frames} frames of {media.width}x{media.height}; it must keep them"
        )


def _check_answer(hook: Hook, answer: Any) -> dict[str, Any] | None:
    """The answer as a JSON object, or None. Raises HookFailedError if it is anything else, or too large."""
    if answer is None or answer == {}:
        return None
    try:
        text = json.dumps(answer, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise HookFailedError(f"the hook {hook.name} answered what JSON cannot hold: {error}") from None
    if not isinstance(answer, dict) or len(text) > MAX_ANSWER_CHARS:
        raise HookFailedError(
            f"the hook {hook.name} answered {len(text):,} characters of JSON; allowed: an object of at most "
            f"{MAX_ANSWER_CHARS:,} characters, or nothing"
        )
    values: dict[str, Any] = json.loads(text)
    return values
