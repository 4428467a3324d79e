"""The memory of a run does not grow with its samples (P7)."""

from __future__ import annotations

import pytest

from tests.limits.memory import measure

ACTORS = ("RankActor", "EncoderActor", "DecoderActor")
MAX_SLOPE_KB = 10.0  # of a line through 1,500 samples, on which the allocator still finds its size


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_driver_and_actors_keep_their_size():
    """P7: `python -m tests.limits.memory` reports the slopes, and runs of other lengths."""
    code, found = measure(2000, groups=2, decoders=2, step_seconds=0.0)
    assert code == 0
    own = [growth for growth in found if growth.process.startswith(("driver", *ACTORS))]
    assert {growth.process.split()[0] for growth in own} == {"driver", *ACTORS}
    assert [growth for growth in own if growth.slope_kb > MAX_SLOPE_KB] == []
