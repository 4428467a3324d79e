"""How an output root keeps the promise that of any number of writers exactly one creates an object."""

from __future__ import annotations

import enum


class PutIfAbsent(enum.Enum):
    """How a store keeps the promise of `Store.put_new`, as found by trying."""

    EXCLUSIVE_LINK = "exclusive hard link"
    CONDITIONAL_PUT = "conditional put"
    UNSAFE = "check, then write"

    @property
    def warning(self) -> str | None:
        """What to tell the user, or None when the promise holds."""
        if self is not PutIfAbsent.UNSAFE:
            return None
        return (
            "This output root cannot create an object only if it is absent, so two runs that write to it at the same "
            "time could both commit the same sample. One run at a time is safe. To be safe in every case use a local "
            "disk with hard links, or S3, Google Cloud Storage or Azure Blob Storage."
        )
