"""Polling: waiting for something that does not say when it is there."""

import math
import time
from collections.abc import Iterator


def poll(interval_s: float, timeout_s: float = math.inf) -> Iterator[None]:
    """A turn at once, then one every `interval_s`, the last when `timeout_s` is over; not the time of a turn itself.

    for _ in poll(0.5, timeout_s=60):
        if is_there():
            return
    raise ...  # it was not there in time
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        yield
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return
        time.sleep(min(interval_s, left_s))
