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

from orchestrator.errors import TrialError

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
    """All observers at once, each under its name; they are left in reverse order, whatever happens.

    Raises TrialError when one of them fails.
    """
    with ExitStack() as stack:
        yield {name: stack.enter_context(_during(name, observers[name], service, directory)) for name in observers}


@contextmanager
def _during(name: str, observer: Observer, service: Service, directory: Path) -> Iterator[Recording]:
    measured = True  # whether what went on beside it went well
    try:
        with observer.during(service, directory) as recording:
            try:
                yield recording
            except BaseException:
                measured = False
                raise
    except TrialError:
        raise
    except Exception as error:  # of code that anybody may have written
        if not measured:
            raise
        raise _failed(name, error) from error


def observed_facts(recordings: Mapping[str, Recording], window: Period) -> dict[str, Mapping[str, object]]:
    """`observed` of a trial's record: observer to its facts of the window. Raises TrialError when one has none."""
    observed: dict[str, Mapping[str, object]] = {}
    for name, recording in recordings.items():
        try:
            observed[name] = asdict(recording.facts(window))
        except TrialError:
            raise
        except Exception as error:  # of code that anybody may have written
            raise _failed(name, error) from error
    return observed


def _failed(name: str, error: Exception) -> TrialError:
    text = f"the observer {name} failed: {type(error).__name__}: {error}"
    return TrialError(f"{text}; facts() returns a dataclass" if isinstance(error, TypeError) else text)


def is_here(urls: Sequence[str]) -> bool:
    """Whether the service shares this machine with the client."""
    return urlsplit(urls[0]).hostname in ("127.0.0.1", "localhost", "::1")
