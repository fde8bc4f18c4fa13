"""The listed levels, each once, in their order, also after a part of them was measured before."""

from orchestrator.load.base import Measured
from orchestrator.load.ladder import Ladder
from orchestrator.load.level import Level
from tests.runs import planned_row

LEVELS = [Level.of_clients(amount) for amount in (4, 1, 16)]


def test_each_once_in_the_order_listed() -> None:
    asked: list[Measured] = []
    while (level := Ladder().next(LEVELS, asked)) is not None:
        asked.append(Measured(level, planned_row()))
    assert [each.level for each in asked] == LEVELS
    assert Ladder().most(LEVELS) == 3


def test_what_is_on_record_is_not_asked_again() -> None:
    assert Ladder().next(LEVELS, [Measured(LEVELS[1], planned_row())]) == LEVELS[0]
    assert Ladder().next(LEVELS, [Measured(level, planned_row()) for level in reversed(LEVELS)]) is None
