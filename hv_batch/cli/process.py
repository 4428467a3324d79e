"""What every command needs of its process before anything slow is imported: stop signals and standard streams.

A stop at any moment ends a command with exit code 143 and one sentence. A run and a nightly job replace the handlers of
this module while they have work to drain (`hv_batch.runtime.stop_signals`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

STOPPED = 143
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

WAIT_S = 5.0  # for a reader of stderr that is slow; what it does not take until then is dropped
PIPE_BYTES = 4096  # PIPE_BUF of Linux: a pipe that is ready takes so many bytes without blocking


class _StoppedBySignal(SystemExit):
    """Raised by the handler, so that the lease of an output root is released and temporary folders are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(STOPPED)
        self.name = signal.Signals(number).name


def run_command(command: Callable[[], object]) -> NoReturn:
    """Call `command`, and end the process with the exit code of the SystemExit that it raises.

    After a stop the process ends without the exit hooks of Ray and of process pools, which wait for work that nobody
    needs any more.
    """
    _prepare()
    try:
        command()
        sys.exit(0)
    except SystemExit as end:
        if isinstance(end, _StoppedBySignal):
            _report_stop(end.name)
        if end.code == STOPPED:
            _flush()
            os._exit(STOPPED)
        raise


def _prepare() -> None:
    """Open the standard streams that are closed, make stderr lossy, and handle the stop signals."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would get this number, and the messages of all libraries
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    sys.stderr = lossy_stream(2)
    for signal_number in STOP_SIGNALS:
        if signal_number != signal.SIGHUP or signal.getsignal(signal_number) is not signal.SIG_IGN:
            signal.signal(signal_number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # `timeout` sends a second one at once, which must not cut the end short
    raise _StoppedBySignal(number)


def _report_stop(name: str) -> None:
    print(f"stopped by {name}; run the same command again", file=sys.stderr)
    if sys.argv[1:2] == ["nightly"]:  # before its nights have begun; later it prints the line itself
        line = {"schema": "hv_batch/night/1", "date": None, "outcome": "stopped", "exit_code": STOPPED}
        print(json.dumps({**line, "seconds": 0.0, "nights": []}))
    elif "--json" in sys.argv[1:]:
        print(json.dumps({"schema": "hv_batch/error/1", "error": f"stopped by {name}", "exit_code": STOPPED}))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone
            stream.flush()


def lossy_stream(number: int) -> io.TextIOWrapper:
    """A text stream on a file descriptor whose writes neither fail nor block.

    Messages must not end or stop a run: a full disk, a closed pipe, or a pager that is not scrolled loses them.
    """
    raw = _LossyFile(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True
    )


class _LossyFile(io.FileIO):
    _wait_s = WAIT_S
    _dropped = 0

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        note = f"[{self._dropped} bytes of messages were dropped: nobody read them]\n" if self._dropped else ""
        if note and self._put(memoryview(note.encode())):
            self._dropped = 0
        if self._dropped or not self._put(view):
            self._dropped += len(view)
        return len(view)

    def _put(self, view: memoryview) -> bool:
        """Write everything; False if the file does not take it."""
        while view:
            poll = select.poll()
            poll.register(self.fileno(), select.POLLOUT)
            if not poll.poll(1000 * self._wait_s):
                self._wait_s = 0.0  # wait for this reader only once
                return False
            try:
                view = view[os.write(self.fileno(), view[:PIPE_BYTES]) :]
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    return False
        self._wait_s = WAIT_S
        return True
