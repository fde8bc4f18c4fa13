"""Where is what under `outputs/`? The one owner of these names; outputs/README.md draws the tree.

Nothing here reads or writes a file's content. Directories are made by whoever writes into them, but for the
run directory itself, which is made here, exclusively, so that no run ever writes into another's.
"""

import hashlib
import itertools
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# What a run directory holds beside its arms, so no arm may be called so.
_RESERVED = frozenset(
    {"services", "plots", "run.json", "summary.parquet", "summary.csv", "comparison.csv", "report.html", "looks.jsonl"}
)
_MAX_NAME_CHARS = 120  # of the 255 bytes a file system allows; an attempt's suffix and a temporary's come on top


def safe_name(name: str) -> str:
    """`name` as one component of a path: itself if safe, else cleaned, with a hash to stay distinct.

    Letters, digits and `_ , = ~ . + -` are kept; the first is a letter, a digit or `_` (never `.`: hidden, or
    a parent). Applying it again changes nothing. Raises `ValueError` for an empty name.
    """
    if not name:
        raise ValueError("an arm needs a name, got an empty one")
    cleaned = re.sub(r"[^A-Za-z0-9_,=~.+-]", "_", name)
    if not re.match(r"[A-Za-z0-9_]", cleaned) or cleaned in _RESERVED:
        cleaned = f"_{cleaned}"
    if cleaned == name and len(name) <= _MAX_NAME_CHARS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{cleaned[: _MAX_NAME_CHARS - 9]}~{digest}"


def trial_id(level: str, repeat: int) -> str:
    """`c0010-r0`: unique within an arm."""
    return f"{level}-r{repeat}"


def level_of(trial_id: str) -> str:
    """Name of the level in a `trial_id`."""
    return trial_id.rpartition("-r")[0]


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run. `arm` is a `safe_name`, `level` a `Level.name`, `repeat` counts from 0."""

    root: Path

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def summary_parquet(self) -> Path:
        return self.root / "summary.parquet"

    @property
    def comparison_csv(self) -> Path:
        return self.root / "comparison.csv"

    @property
    def looks_jsonl(self) -> Path:
        """One line a look at the comparison, appended."""
        return self.root / "looks.jsonl"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    @property
    def plots_dir(self) -> Path:
        return self.root / "plots"

    def arm_dir(self, arm: str) -> Path:
        assert arm == safe_name(arm), f"{arm!r} has not been through safe_name"
        return self.root / arm

    def hydra_dir(self, arm: str) -> Path:
        """Hydra's own record of the composed config and overrides."""
        return self.arm_dir(arm) / ".hydra"

    def service_dir(self, arm: str, repeat: int) -> Path:
        return self.root / "services" / self.arm_dir(arm).name / f"r{repeat}"

    def service_yaml(self, arm: str, repeat: int) -> Path:
        """The Serve application config as deployed."""
        return self.service_dir(arm, repeat) / "service.yaml"

    def effective_json(self, arm: str, repeat: int) -> Path:
        """Flags, versions and hardware read back from the live service."""
        return self.service_dir(arm, repeat) / "effective.json"

    def trial_dir(self, arm: str, level: str, repeat: int) -> Path:
        return self.arm_dir(arm) / "trials" / trial_id(level, repeat)

    def begun(self, arm: str) -> list[tuple[str, int]]:
        """Level and repeat of every trial that has a directory; earlier attempts are left out."""
        names = sorted(path.name for path in (self.arm_dir(arm) / "trials").glob("*"))
        found = (re.fullmatch(r"(.+)-r(\d+)", name) for name in names)
        return [(match[1], int(match[2])) for match in found if match]

    def trial_json(self, arm: str, level: str, repeat: int) -> Path:
        """Written last: present = complete."""
        return self.trial_dir(arm, level, repeat) / "trial.json"

    def failure_json(self, arm: str, level: str, repeat: int) -> Path:
        return self.trial_dir(arm, level, repeat) / "failure.json"

    def samples(self, arm: str, level: str, repeat: int) -> Path:
        return self.trial_dir(arm, level, repeat) / "samples.parquet"

    def raw_dir(self, arm: str, level: str, repeat: int) -> Path:
        """The client's own output files, kept."""
        return self.trial_dir(arm, level, repeat) / "raw"


def create_run_dir(outputs: Path, now: datetime, ending: str = "") -> RunPaths:
    """Make a new run directory `YYYY-MM-DD_HH-MM-SS<ending>` under `outputs`; a clash gets `_2`, `_3`, ...

    Making is the test (`mkdir` fails if it exists), so two processes in the same second get two directories.
    """
    outputs.mkdir(parents=True, exist_ok=True)
    stamp = now.strftime("%Y-%m-%d_%H-%M-%S") + ending
    for attempt in itertools.count(1):
        root = outputs / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            root.mkdir()
        except FileExistsError:
            continue
        return RunPaths(root)
    raise AssertionError("itertools.count ended")


def set_aside(trial_dir: Path) -> Path | None:
    """Rename an earlier attempt to the next free `<trial>.attempt<k>`, k from 1; None if there was none."""
    if not trial_dir.exists():
        return None
    for k in itertools.count(1):
        kept = trial_dir.with_name(f"{trial_dir.name}.attempt{k}")
        if not kept.exists():
            return trial_dir.rename(kept)
    raise AssertionError("itertools.count ended")
