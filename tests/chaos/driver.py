"""`hv-batch` with shorter pauses: `python -m tests.chaos.driver run ...`. A schedule lasts minutes, not hours.

The ratios are those of the package: a holder of the lease must survive several failed heartbeats.
"""

from __future__ import annotations

from hv_batch.cli.process import run_command


def main() -> None:
    from hv_batch.job.records import lease
    from hv_batch.job.scheduling import limits

    limits.OUTAGE_PAUSE_S, limits.OUTAGE_LIMIT_S = 1.0, 120.0
    lease.HEARTBEAT_S, lease.POLL_S, lease.STALE_S, lease.SUSPENDED_S = 3.0, 1.0, 20.0, 40.0

    import botocore.auth  # noqa: F401  # reads the clock

    import hv_batch.runtime.render  # noqa: F401  # its modules read the clock as well
    from hv_batch.cli.main import main as run_main  # after that, because some modules import these by value
    from tests.chaos.faults.clock import shift_clock

    shift_clock()
    run_main()


if __name__ == "__main__":
    run_command(main)
