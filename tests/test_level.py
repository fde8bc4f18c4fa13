"""A level is one value: what it is called, how it sorts, what it says, and what is none."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.load.level import Level, Unit

CLIENTS = st.integers(1, 10**7).map(Level.of_clients)
RATES = st.integers(1, 10**8).map(lambda hundredths: Level.of_rate(hundredths / 100))


@given(CLIENTS | RATES)
def test_its_name_is_read_back(level: Level) -> None:
    assert Level.parse(level.name) == level


@given(st.lists(CLIENTS) | st.lists(RATES))
def test_it_sorts_by_its_amount(levels: list[Level]) -> None:
    assert [level.amount for level in sorted(levels)] == sorted(level.amount for level in levels)


@pytest.mark.parametrize(
    ("level", "name", "text", "short_text"),
    [
        (Level.of_clients(1), "c0001", "1 client", "c=1"),
        (Level.of_clients(64), "c0064", "64 clients", "c=64"),
        (Level.of_clients(12345), "c12345", "12,345 clients", "c=12,345"),
        (Level.of_rate(250), "r000250.00", "250 req/s", "250/s"),
        (Level.of_rate(0.5), "r000000.50", "0.5 req/s", "0.5/s"),
        (Level.of_rate(1234567.25), "r1234567.25", "1,234,567.25 req/s", "1,234,567.25/s"),
    ],
)
def test_how_it_is_written(level: Level, name: str, text: str, short_text: str) -> None:
    assert (level.name, level.text, level.short_text) == (name, text, short_text)


def test_what_it_counts() -> None:
    clients, rate = Level.of_clients(8), Level.of_rate(8)
    assert (clients.concurrency, clients.offered_rps, clients.load_mode) == (8, None, "closed")
    assert (rate.concurrency, rate.offered_rps, rate.load_mode) == (None, 8.0, "open")
    assert clients != rate
    assert clients == Level(Unit.clients, 8.0)
    assert clients.name == Level(Unit.clients, 8.0).name


@pytest.mark.parametrize("amount", [0, -1, 1.5, True, "8", None, float("inf"), float("nan")])
def test_what_is_no_number_of_clients(amount: Any) -> None:
    with pytest.raises(ValueError, match="clients"):
        Level(Unit.clients, amount)


@pytest.mark.parametrize("amount", [0, -1, 0.001, True, "8", None, float("inf"), float("nan")])
def test_what_is_no_rate(amount: Any) -> None:
    with pytest.raises(ValueError, match=r"per_s|per second"):
        Level.of_rate(amount)


@pytest.mark.parametrize("name", ["", "10", "c", "c0010-r0", "r250", "r000250.000", "x0010", "c0000", "r000000.00"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"level|whole|positive"):
        Level.parse(name)
