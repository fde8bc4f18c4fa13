"""How much of its error may a look at the data use? Every look at growing data is a chance to be wrong.

The budget of a run is `stats.ALPHA`, and looks at different sets of points share it; looking at the same points again
is no new look. With `max_looks` of 1, the default, the error is spent in proportion to the planned blocks that are
there: all of it if all are VALID; if some are not, the rest is kept for when a resume has filled them. With
more looks declared, look k has ALPHA / 2**k. Both sum to ALPHA at most, so no order of looking exceeds it (Bonferroni).

Looks are appended to `looks.jsonl` of each run, never rewritten, since another process may look at the same time.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pandas as pd

from analysis import stats
from analysis.load import LoadError, RunData
from orchestrator.results.records import LookRecord, parse

_LEAST = 1e-6  # a smaller share of the error is none


@dataclass(frozen=True)
class Look:
    """One look at the data of a run: `number` from 1, `points` the digest of those that may enter a ratio.

    `alpha`: the level at which it may judge; None = the error is spent.
    """

    number: int
    points: str
    num_blocks: int
    num_planned: int
    alpha: float | None


def take(runs: Sequence[RunData], points: pd.DataFrame, num_blocks: int, num_planned: int, max_looks: int) -> Look:
    """The look at these points. `num_blocks` of `num_planned` primary points are VALID. Raises LoadError."""
    digest = _digest(points)
    # What was looked at in one run alone was one look there; the run looked at most often decides.
    earlier = max((_recorded(run) for run in runs), key=len)
    if digest in earlier:
        return earlier[digest]
    number = 1 + len(earlier)
    if max_looks > 1:
        alpha = stats.look_alpha(number, max_looks)
    else:
        spent = max(sum(look.alpha or 0 for look in _recorded(run).values()) for run in runs)
        left = stats.ALPHA * min(1, num_blocks / num_planned) - spent if num_planned else 0
        alpha = left if left > _LEAST else None
    return Look(number, digest, num_blocks, num_planned, alpha)


def after(look: Look, max_looks: int) -> float:
    """The level at which further blocks would be judged; those of a new run have an error of their own."""
    return (stats.look_alpha(look.number + 1, max_looks) if max_looks > 1 else None) or stats.ALPHA


def record(runs: Iterable[RunData], look: Look) -> None:
    """Note the look in each run, once. Raises LoadError if that cannot be done."""
    for run in runs:
        if look.alpha is not None and look.points not in _recorded(run):
            entry = LookRecord(
                look=look.number,
                points=look.points,
                num_blocks=look.num_blocks,
                num_planned=look.num_planned,
                alpha=look.alpha,
                at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            try:
                with run.paths.looks_jsonl.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(entry)) + "\n")
            except OSError as error:
                raise LoadError(
                    f"the look cannot be recorded, so there is no verdict ({error}); copy the run to a writable place"
                ) from error


def _recorded(run: RunData) -> dict[str, Look]:
    """Digest of the points -> the look at them."""
    found = {}
    try:
        for line in run.paths.looks_jsonl.read_text(encoding="utf-8").splitlines():
            entry = parse(LookRecord, json.loads(line), "a look")
            found[entry.points] = Look(entry.look, entry.points, entry.num_blocks, entry.num_planned, entry.alpha)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LoadError(f"{run.paths.looks_jsonl} is not as we write it: {error!r}") from error
    return found


def _digest(points: pd.DataFrame) -> str:
    rows = points[["run_id", "arm", "trial_id", "started_at"]].astype(str).to_numpy().tolist()
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]
