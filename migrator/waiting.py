"""Waiting for descriptors by poll(2): select(2) knows none above 1023, and an agent with many containers has more."""

import math
import select
from collections.abc import Iterable


def readable(descriptors: Iterable[int], timeout_s: float | None = None) -> list[int]:
    """Those that can be read without waiting, or have ended; empty if none is by then. None: however long it takes."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [found for found, _ in poll.poll(None if timeout_s is None else max(0, math.ceil(timeout_s * 1000)))]
