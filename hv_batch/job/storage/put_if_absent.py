"""How an output root guarantees that exactly one of several concurrent writers creates an object."""

from __future__ import annotations

import enum


class PutIfAbsent(enum.Enum):
    """The mechanism behind `Store.put_new`, as found by `Store.probe`."""

    EXCLUSIVE_LINK = "exclusive hard link"
    CONDITIONAL_PUT = "conditional put"
    UNSAFE = "check, then write"

    @property
    def warning(self) -> str | None:
        """The warning for the user, or None if `put_new` is exclusive."""
        if self is not PutIfAbsent.UNSAFE:
            return None
        return (
            "This output root does not support put-if-absent, so two runs that write to it at the same time could both "
            "commit the same sample. One run at a time is safe. To be safe in every case, use a local disk with hard "
            "links, S3, Google Cloud Storage or Azure Blob Storage."
        )
