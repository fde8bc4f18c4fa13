"""A run killed with SIGKILL at any step and resumed: are all trials measured, none twice, and is none changed?

The run is real but for its services and its load: a process of its own, which kills itself before its n-th step. A step
is whatever can be seen from outside: a directory made, a file renamed to its name (nothing counts before it has that),
a service asked for, ready or ended, requests sent.
"""

import collections
import hashlib
import itertools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from orchestrator import journal
from orchestrator.arms import Arm, Job
from orchestrator.clients.base import Load, Measurement
from orchestrator.execute import Run
from orchestrator.journal import keep_hydra_record, recorded_plan
from orchestrator.load.base import LevelRule, Measured
from orchestrator.load.ladder import Ladder
from orchestrator.load.level import Level
from orchestrator.paths import RunPaths
from orchestrator.plan import Plan, make_plan
from orchestrator.results.records import ClientFacts, RunRecord, TrialRecord, read, write_summary
from tests import answering
from tests.conftest import ROOT, Compose
from tests.runs import planned_row

STEPS = ("os.mkdir", "os.rename", "test.step")  # audit events; every rename and os.replace is an os.rename
PARTS = 2  # of the numbers of a step, for workers to share


class Watched(answering.Answering):
    """Tells of each step, and notes in a file of the test what it measures."""

    log: Path

    def service(self, *given: Any) -> Any:
        service = super().service(*given)
        for name in ("start", "wait_ready", "begin_stop", "stop"):
            setattr(service, name, lambda name=name: sys.audit("test.step", name))
        return service

    def run(self, load: Load, directory: Path, on_progress: object) -> Measurement:
        trial = f"{directory.parent.parent.name}/{directory.name}"
        before = self.log.read_text().split() if self.log.exists() else []
        with self.log.open("a") as file:
            file.write(f"{trial}\n")
        sys.audit("test.step", "under load")
        found = super().run(load, directory, on_progress)
        sys.audit("test.step", "samples are written")
        if trial == "baseline/c0002-r0" and trial not in before and (self.log.parent / "first is bad").exists():
            return found._replace(facts=ClientFacts(cpu_ratio=1.0))
        return found


@dataclass
class NotListed(LevelRule):
    """The first that is listed, then one more client: the second that is listed is never asked for."""

    def next(self, listed: Sequence[Level], done: Sequence[Measured]) -> Level | None:
        asked = [listed[0], Level.of_clients(int(listed[0].amount) + 1)]
        return asked[len(done)] if len(done) < 2 else None


@dataclass
class Case:
    """One run directory, and what was measured for it."""

    folder: Path
    plan: Plan
    killed_before: str = ""
    complete: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.folder / "run")

    @property
    def measured(self) -> collections.Counter[str]:
        log = self.folder / "log"
        return collections.Counter(log.read_text().split() if log.exists() else [])

    def invoke(self, dies_at: int | None = None) -> bool:
        """As a command does, in a process of its own, which ends before this step. Whether it lived to its end."""
        child = os.fork()
        if child == 0:
            try:
                sys.stdout = (self.folder / "output").open("a")
                Watched.log = self.folder / "log"
                if dies_at is not None:
                    sys.addaudithook(_dying(dies_at, self.folder / "last step"))
                self._command()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            self.killed_before = (self.folder / "last step").read_text()
            return False
        assert os.waitstatus_to_exitcode(status) == 0, (self.folder, self.killed_before)
        return True

    def _command(self) -> None:
        plan = self.plan
        if self.paths.run_json.exists():
            plan = recorded_plan(self.paths, ())
        else:
            self.paths.root.mkdir()
            keep_hydra_record(plan, self.paths)
        assert Run(plan, self.paths, []).go() in (0, 3)
        sys.audit("test.step", "the report is about to be written")

    def finished(self) -> dict[str, tuple[str, ...]]:
        """Trial to digests of what is kept of it."""
        return {
            f"{path.parent.parent.parent.name}/{path.parent.name}": tuple(
                hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, path.with_name("samples.parquet"))
            )
            for path in self.paths.root.glob("*/trials/*/trial.json")
            if ".attempt" not in path.parent.name
        }

    def check(self, expected: set[str]) -> None:
        """All that was expected is there, once, and nothing else."""
        assert read(RunRecord, self.paths.run_json).status == "complete"
        rows = pq.ParquetFile(self.paths.summary_parquet).read().to_pylist()
        assert sorted(f"{row['arm']}/{row['trial_id']}" for row in rows) == sorted(expected), self.killed_before
        assert {(row["state"], row["valid"]) for row in rows} == {("complete", True)}, self.killed_before
        found = self.finished()
        assert set(found) == expected, self.killed_before
        assert {name: found[name] for name in self.complete} == self.complete, self.killed_before


def _dying(at: int, note: Path) -> Callable[[str, tuple[Any, ...]], None]:
    steps = itertools.count()

    def on_event(event: str, given: tuple[Any, ...]) -> None:
        if event == "os.mkdir" and (os.path.exists(given[0]) or not os.path.exists(os.path.dirname(given[0]))):
            return  # it fails, and nothing has changed
        if event in STEPS and next(steps) == at:
            note.write_text(f"step {at}: {event} {given}")
            os.kill(os.getpid(), signal.SIGKILL)

    return on_event


@pytest.fixture
def plan(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """2 arms, 2 levels, 2 blocks; also makes what every process shares, so that none has to import it again."""
    answering.install(monkeypatch, Watched)
    monkeypatch.setattr(journal, "collect", dict)
    fixed = ("sweep.concurrency=[2,4]", "sweep.repeats=2", "sweep.duration_s=4", "sweep.cooldown_s=0")
    jobs = []
    for profile in ("baseline", "grpc"):
        overrides = (*fixed, "observe=[]", f"profile={profile}")
        job = Job(compose(*overrides), {"profile": profile}, profile, tmp_path / profile)
        (tmp_path / profile).mkdir()
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            OmegaConf.save(hydra.compose("config", overrides=list(overrides)), tmp_path / profile / "config.yaml")
        jobs.append(job)
    return make_plan(jobs, 1)


@pytest.fixture
def case(plan: Plan, tmp_path: Path) -> Callable[[], Case]:
    numbers = itertools.count()

    def make() -> Case:
        folder = tmp_path / f"case{next(numbers)}"
        folder.mkdir()
        return Case(folder, plan)

    return make


def uninterrupted_run(made: Case) -> set[str]:
    """Its trials, each measured once."""
    assert made.invoke()
    # What is imported here, no process that follows has to import again: half a second each.
    write_summary(made.folder, [planned_row()])
    for path in made.paths.root.rglob("trial.json"):
        read(TrialRecord, path)
    expected = set(made.finished())
    made.complete = made.finished()
    assert made.measured == dict.fromkeys(expected, 1)
    return expected


@pytest.mark.parametrize(
    ("rule", "levels", "steps"),
    [
        *((Ladder(), ("c0002", "c0004"), (part, PARTS)) for part in range(PARTS)),
        (NotListed(), ("c0002", "c0003"), (0, 5)),
    ],
    ids=["ladder-even", "ladder-odd", "not listed"],
)
def test_killed_before_any_step_and_resumed(
    case: Callable[[], Case],
    monkeypatch: pytest.MonkeyPatch,
    rule: LevelRule,
    levels: tuple[str, ...],
    steps: tuple[int, int],
) -> None:
    """`steps`: the first, and how far the next is."""
    monkeypatch.setattr(Arm, "rule", rule)
    whole = case()
    expected = uninterrupted_run(whole)
    assert expected == {f"{arm}/{level}-r{r}" for arm in ("baseline", "grpc") for level in levels for r in (0, 1)}
    whole.check(expected)
    for step in itertools.count(*steps):
        cut = case()
        if cut.invoke(dies_at=step):
            assert step > 70
            break
        if not cut.paths.run_json.exists():  # no run yet, and nothing that one could resume
            assert cut.measured == {}
            continue
        cut.complete, before = cut.finished(), cut.measured
        assert cut.invoke()
        cut.check(expected)
        assert {name for name in cut.complete if cut.measured[name] != 1} == set(), cut.killed_before
        under_way = set(before) - set(cut.complete)
        assert len(under_way) <= 1, cut.killed_before
        assert {name for name, count in cut.measured.items() if count != 1} == under_way, cut.killed_before
        shutil.rmtree(cut.folder)


def test_killed_again_and_again(case: Callable[[], Case], plan: Plan) -> None:
    cut = case()
    times = 0
    while not cut.invoke(dies_at=20):
        times += 1
        finished = cut.finished()
        assert {name: finished[name] for name in cut.complete} == cut.complete, cut.killed_before
        cut.complete = finished
    assert times > 3
    cut.check({f"{trial.arm.name}/{trial.id}" for trial in plan.trials})
    assert cut.measured.total() <= 8 + times
    before = cut.measured
    services = list((cut.paths.root / "services").rglob("r*"))
    assert cut.invoke()  # there is nothing to do, and nothing comes up for it
    assert cut.measured == before
    assert list((cut.paths.root / "services").rglob("r*")) == services


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_while_an_invalid_point_is_measured_again(case: Callable[[], Case], part: int) -> None:
    """With what it is compared with, whichever of the two was put aside first."""
    bad = case()
    (bad.folder / "first is bad").touch()
    expected = uninterrupted_run(bad)
    again = {"baseline/c0002-r0", "grpc/c0002-r0"}
    kept = {name: digests for name, digests in bad.finished().items() if name not in again}
    for step in itertools.count(part, PARTS):
        cut = case()
        shutil.copytree(bad.folder, cut.folder, dirs_exist_ok=True)
        if lived := cut.invoke(dies_at=step):
            assert step > 20
        else:
            assert cut.invoke()
        cut.complete = kept
        cut.check(expected)
        assert {name for name, count in cut.measured.items() if count > 1} == again, cut.killed_before
        assert cut.measured.total() <= 8 + 2 + 1, cut.killed_before
        if lived:
            break
        shutil.rmtree(cut.folder)
