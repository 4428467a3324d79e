"""The last line of a dataset card: what the card says about the run, and a hash of the text before it.

    <!-- hv_batch/card/1 state=finished committed=13 quarantined=0 sha256=... -->

The hash shows an edit, not a forgery. A card without this line belongs to the user: hv_batch neither checks nor
replaces it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

SCHEMA = "hv_batch/card/1"
MAX_BYTES = 4 << 20

_LAST_LINE = re.compile(
    rb"<!-- hv_batch/card/1 state=(?P<state>finished|unfinished) committed=(?P<committed>\d{1,10}) "
    rb"quarantined=(?P<quarantined>\d{1,10}) sha256=(?P<sha256>[0-9a-f]{64}) -->\n?\Z"
)


@dataclass(frozen=True, slots=True)
class CardState:
    """What a card says about its run; both numbers are 0 for an unfinished run."""

    is_finished: bool
    committed: int = 0
    quarantined: int = 0


def sign_card(text: str, state: CardState) -> bytes:
    """The card `text` with its last line."""
    body = text.encode()
    name = "finished" if state.is_finished else "unfinished"
    line = f"committed={state.committed} quarantined={state.quarantined} sha256={hashlib.sha256(body).hexdigest()}"
    return body + f"<!-- {SCHEMA} state={name} {line} -->\n".encode()


def parse_card(data: bytes) -> CardState | None:
    """The state in the last line of a card; None if the card is the user's own. Raises ValueError if it was edited."""
    found = _LAST_LINE.search(data)
    if found is None:
        return None
    if len(data) > MAX_BYTES or hashlib.sha256(data[: found.start()]).hexdigest().encode() != found["sha256"]:
        raise ValueError("its text was changed after it was written")
    return CardState(found["state"] == b"finished", int(found["committed"]), int(found["quarantined"]))
