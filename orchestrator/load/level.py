"""One load point: so many clients, or so many requests a second. The one owner of its name, order, text and parsing.

A level is written in the names of trials (`c0010-r0`), in `run.json`, in tables and beside every figure. It is a
value: two levels of the same unit and amount are the same level.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum


class Unit(Enum):
    """What an amount of load counts."""

    clients = "clients"  # closed loop: each client sends its next request when the last was answered
    requests_per_s = "requests_per_s"  # open loop: requests are sent on a schedule, whatever the replies do


@dataclass(frozen=True)
class Level:
    """`amount` in `unit`. Sorts by unit, then by amount, so that c9999 comes before c10000.

    Raises ValueError for an amount that is not positive, a number of clients that is not whole, or a rate that two
    decimals cannot tell apart.
    """

    unit: Unit
    amount: float

    def __post_init__(self) -> None:
        if isinstance(self.amount, bool) or not isinstance(self.amount, int | float):
            raise ValueError(f"a level needs a number of {self.unit.value}, found {self.amount!r}")
        if self.unit is Unit.clients:
            if not 1 <= self.amount < math.inf or self.amount != int(self.amount):
                raise ValueError(f"a number of clients must be whole and at least 1, found {self.amount!r}")
        elif not 0 < self.amount < math.inf or round(self.amount, 2) != self.amount:
            raise ValueError(f"requests per second must be positive, with at most two decimals, found {self.amount!r}")

    @classmethod
    def of_clients(cls, concurrency: int) -> "Level":
        """Closed loop with so many clients."""
        return cls(Unit.clients, concurrency)

    @classmethod
    def of_rate(cls, offered_rps: float) -> "Level":
        """Open loop with so many requests per second."""
        return cls(Unit.requests_per_s, offered_rps)

    @classmethod
    def parse(cls, name: str) -> "Level":
        """The level that is called so on disk. Raises ValueError for any other text."""
        match = re.fullmatch(r"c(\d+)|r(\d+\.\d\d)", name)
        if match is None:
            raise ValueError(f"{name!r} is no level: c0010 is 10 clients, r000250.00 is 250 requests per second")
        return cls.of_clients(int(match[1])) if match[1] else cls.of_rate(float(match[2]))

    def __lt__(self, other: "Level") -> bool:
        return (self.unit.value, self.amount) < (other.unit.value, other.amount)

    def __str__(self) -> str:
        return self.text

    @property
    def concurrency(self) -> int | None:
        """Number of clients in closed loop, else None."""
        return int(self.amount) if self.unit is Unit.clients else None

    @property
    def offered_rps(self) -> float | None:
        """Requests per second in open loop, else None."""
        return float(self.amount) if self.unit is Unit.requests_per_s else None

    @property
    def load_mode(self) -> str:
        """As the summary has it: closed or open."""
        return "closed" if self.unit is Unit.clients else "open"

    @property
    def name(self) -> str:
        """On disk: `c0010` for 10 clients, `r000250.00` for 250 requests per second. `parse` reads it back."""
        return f"c{int(self.amount):04d}" if self.unit is Unit.clients else f"r{self.amount:09.2f}"

    @property
    def text(self) -> str:
        """In a sentence: "64 clients", "250 req/s"."""
        if self.unit is Unit.clients:
            return f"{self.amount:,.0f} client{'' if self.amount == 1 else 's'}"
        return f"{self._amount} req/s"

    @property
    def short_text(self) -> str:
        """In a table or at a point of a picture: "c=64", "250/s"."""
        return f"c={self.amount:,.0f}" if self.unit is Unit.clients else f"{self._amount}/s"

    @property
    def _amount(self) -> str:
        return f"{self.amount:,.2f}".rstrip("0").rstrip(".")
