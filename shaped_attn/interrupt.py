"""Ctrl-C as a request to finish: long work ends early and keeps what it has."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """Set by the first Ctrl-C; the second one raises KeyboardInterrupt as usual."""

    def __init__(self) -> None:
        self.is_set = False


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Turn the first SIGINT into a request, so that work ends between two steps."""
    request = StopRequest()
    previous = signal.getsignal(signal.SIGINT)

    def handle(signum, frame):
        request.is_set = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)
