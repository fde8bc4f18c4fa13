"""One way to wait: a first turn at once, a last one when the time is over, and no longer."""

import itertools
import time

import pytest

from orchestrator.waiting import poll


def test_turns_at_once_each_interval_and_at_the_end() -> None:
    began_s = time.monotonic()
    turns_s = [time.monotonic() - began_s for _ in poll(0.1, timeout_s=0.25)]
    assert turns_s == pytest.approx([0, 0.1, 0.2, 0.25], abs=0.09)
    assert turns_s[-1] >= 0.25


@pytest.mark.parametrize("timeout_s", [0, -5])
def test_one_turn_where_no_time_is_left(timeout_s: float) -> None:
    assert len(list(poll(60, timeout_s))) == 1


def test_a_turn_that_takes_longer_is_the_last() -> None:
    turns = 0
    for _ in poll(60, timeout_s=0.05):
        turns += 1
        time.sleep(0.1)
    assert turns == 1


def test_without_a_limit_until_one_leaves() -> None:
    assert len(list(itertools.islice(poll(0.001), 20))) == 20
