"""Observers: what is watched beside a measurement, and never sends a request.

An observer is entered before the client starts and left after its last reply. Which part of that time was the window
is known to the client alone, and only afterwards; so an observer records on its own, and is asked for its facts of
the window once the client has returned. An observer is a dataclass whose fields are its options.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Period(NamedTuple):
    """Of a measurement window: its start and end on this machine's monotonic clock, s."""

    start_s: float
    end_s: float


class Service(Protocol):
    """What an observer is told about the service under load."""

    @property
    def urls(self) -> Sequence[str]: ...

    @property
    def marker(self) -> str | None:
        """What its processes on this machine carry as `process.MARKER`; None where no process carries it."""


class Recording(Protocol):
    """What an observer recorded during one measurement."""

    def facts(self, window: Period) -> "DataclassInstance":
        """A dataclass that JSON can hold. Called once the observer was left; the window lies within that time."""


@dataclass
class Observer(ABC):
    """Watches one measurement at a time; one observer serves a whole run.

    Derive a dataclass from it: its fields are the keys of its YAML in `conf/observe/`.
    """

    @abstractmethod
    def during(self, service: Service, directory: Path) -> AbstractContextManager[Recording]:
        """Record while it is entered. `directory`: the trial's own, for files.

        Raises TrialError, on entering, on leaving or from `facts`, when what it watches or does makes the
        measurement useless; then the trial fails and the run goes on.
        """


@contextmanager
def observing(
    observers: Mapping[str, Observer], service: Service, directory: Path
) -> Iterator[Mapping[str, Recording]]:
    """All observers at once, each under its name; they are left in reverse order, whatever happens."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(observer.during(service, directory)) for name, observer in observers.items()}


def observed_facts(recordings: Mapping[str, Recording], window: Period) -> dict[str, Mapping[str, object]]:
    """`observed` of a trial's record: observer to its facts of the window."""
    return {name: asdict(recording.facts(window)) for name, recording in recordings.items()}


def is_here(urls: Sequence[str]) -> bool:
    """Whether the service shares this machine with the client."""
    return urlsplit(urls[0]).hostname in ("127.0.0.1", "localhost", "::1")
