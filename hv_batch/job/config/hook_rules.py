"""Which hooks a run calls, and which of them this command may call.

A hook that a run.json names is code that anyone with access to the bucket could have chosen. A command calls it only if
the operator names it again (`refuse_unnamed_hooks`).
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from typing import Any

from hv_batch.job.config.sections import HooksConfig
from hv_batch.job.hooks.hook import HookUnavailableError, describe_hook, parse_hook
from hv_batch.job.redaction import safe_text
from hv_batch.protocol import UserError

KINDS = ("prompt", "sample")


def hook_texts(hooks: HooksConfig) -> dict[str, str]:
    """The hooks that are set, by kind."""
    return {kind: text for kind in KINDS if (text := getattr(hooks, kind)) is not None}


def identify_hooks(hooks: HooksConfig) -> dict[str, Any]:
    """The name and the content hash of each hook by kind, for the identity of the run; empty without hooks.

    Raises UserError if a hook does not exist on this machine.
    """
    found = {}
    for kind, text in hook_texts(hooks).items():
        try:
            found[kind] = describe_hook(parse_hook(text))
        except HookUnavailableError as error:
            raise UserError(
                f"hooks.{kind} = {safe_text(text)} cannot be used: {error}. It must exist on this machine and on every "
                "node that calls it: give the path or the import path of an installed program or function."
            ) from error
    return found


def refuse_unnamed_hooks(
    hooks: HooksConfig, output: str, named: Collection[str] = (), engines: Collection[str] = ()
) -> None:
    """Refuse the hooks of the run.json of `output` that are not among `named`, which the operator names.

    `engines` are those that the operator names, for the command in the message. Raises UserError.
    """
    recorded = hook_texts(hooks)
    if not set(recorded.values()) - set(named):
        return
    given = [("--engine", engine) for engine in engines] + [("--hook", text) for text in recorded.values()]
    options = "".join(f" {option} {shlex.quote(text)}" for option, text in given)
    listing = ", ".join(f"hooks.{kind} = {text}" for kind, text in recorded.items())
    raise UserError(
        safe_text(
            f"The run.json of {output} names programs to run on the nodes: {listing}. Whoever can write to an output "
            f"root could have written them, so they are not run. If they are yours, name them again: hv-batch resume "
            f"{shlex.quote(output)}{options} (verify --repair takes --hook, too), or run the command that started the "
            "run, whose config names them."
        )
    )
