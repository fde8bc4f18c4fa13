"""Run directories as the orchestrator writes them, with requests that are drawn instead of sent."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from orchestrator.journal import Journal
from orchestrator.load.level import Level
from orchestrator.paths import RunPaths, safe_name, trial_id
from orchestrator.results.records import (
    ClientFacts,
    Declaration,
    Metrics,
    PlannedArm,
    PlanRecord,
    PrimaryCell,
    RunRecord,
    SummaryRow,
    TrialRecord,
)
from orchestrator.results.samples import SAMPLES_SCHEMA, compute_metrics, write_samples

VALIDITY = {"max_error_ratio": 0.01}


def make_run(
    directory: Path,
    speeds: Mapping[str, float],
    *,
    levels: Sequence[float] = (4, 16),
    open_loop: bool = False,
    figure: str = "throughput_rps",
    repeats: int = 3,
    noise: float = 0.02,
    seed: int = 0,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    effective: Mapping[str, Mapping[str, Any]] | None = None,
    invalid: Sequence[tuple[str, int, int]] = (),
    failed: Sequence[tuple[str, int, int]] = (),
    missing: Sequence[tuple[str, int, int]] = (),
    status: str = "complete",
    **compare: Any,
) -> RunPaths:
    """`speeds`: arm -> replies of one client per second. `invalid`, `failed`, `missing`: (arm, level, repeat).

    `levels`: clients, or with `open_loop` requests per second. `figure`: what the run is judged by.

    `config`, `effective`: arm -> what is laid over the usual. An arm called `x~2` is a copy of `x`.
    """
    paths = RunPaths(directory)
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with closing(Journal(paths)) as journal:
        arms = []
        for arm, speed in speeds.items():
            profile = arm.partition("~")[0]
            arms.append(
                PlannedArm(
                    name=safe_name(arm),
                    axes={"profile": profile},
                    levels=[_level(level, open_loop).name for level in levels],
                    copy=int("~" in arm),
                    service_key=f"key-{profile}",
                )
            )
            _write_config(paths, arm, profile, (config or {}).get(arm, {}))
            for repeat in range(repeats):
                _write_effective(journal, arm, profile, repeat, (effective or {}).get(arm, {}))
                deployed = speed * np.exp(rng.normal(0, noise))
                for level in levels:
                    where = (arm, level, repeat)
                    row = _row(paths, arm, profile, level, repeat, open_loop)
                    journal.expect([row])
                    if where in failed:
                        error = "DEPLOY_FAILED: no luck"
                        journal.fail(row.arm, row.trial_id, "service", error, directory / "services" / "x")
                    elif where not in missing:
                        journal.record(_measure(paths, row, deployed, rng, where in invalid))
        declared = Declaration(**(COMPARE | {"repeats": repeats} | compare))
        journal.begin(_record(journal, arms, _level(max(levels), open_loop), figure, declared))
        journal.save() if status == "running" else journal.finish(status)
    return paths


COMPARE: dict[str, Any] = {"treatment": ["profile"], "baseline": None, "redeploy": "per_repeat"}


def _record(journal: Journal, arms: list[PlannedArm], highest: Level, figure: str, compare: Declaration) -> RunRecord:
    names = [arm.name for arm in arms]
    candidates: list[str | None] = [*names[1:]]
    return RunRecord(
        run_id=journal.paths.run_id,
        status="running",
        started_at="2026-11-21T07:00:00+00:00",
        command=["profile=baseline,optimized", "-m"],
        seed=7,
        plan=PlanRecord(arms=arms, services=[], trials=[f"{row.arm}/{row.trial_id}" for row in journal.rows]),
        compare=compare,
        primary_cells=[
            PrimaryCell(
                axes={},
                baseline=names[0],
                candidate=name,
                metric=figure,
                level=highest.name,
            )
            for name in candidates or [None]
        ],
        provenance={"git": {"commit": "abc", "dirty": False}, "packages": {"ray": "2.60.0"}, "host": {}},
    )


def _write_config(paths: RunPaths, arm: str, profile: str, over: Mapping[str, Any]) -> None:
    env = {"RAY_SERVE_FLAG": "1"} if profile == "optimized" else {}
    config = {
        "cluster": {"name": "local", "env": {}},
        "workload": {"name": "unary", "payload_bytes": 10, "num_replicas": 1, "env": {}},
        "profile": {"name": profile, "env": env, "app": {}},
        "sweep": {"name": "quick", "concurrency": [4, 16], "repeats": 3, "duration_s": 4.0},
        "validity": VALIDITY,
    }
    for key, value in over.items():
        node: dict[str, Any] = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    folder = paths.hydra_dir(safe_name(arm))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _write_effective(journal: Journal, arm: str, profile: str, repeat: int, over: Mapping[str, Any]) -> None:
    env = {"RAY_SERVE_FLAG": "1"} if profile == "optimized" else {}
    actors = [
        {
            "name": f"SERVE_{kind}-{repeat}",
            "kind": kind,
            "pid": 1,
            "env": {**env, "RAY_PORT": f"{repeat}{arm}", "RAY_JOB_ID": f"{arm}{repeat}", **over.get("env", {})},
            "constants": {"RAY_SERVE_COMPUTED": profile},
        }
        for kind in ("ServeController", "ServeReplica")
    ]
    folder = journal.paths.service_dir(safe_name(arm), repeat)
    folder.mkdir(parents=True)
    told = {
        "declared_env": env,
        "actors": actors,
        "warnings": over.get("warnings", []),
        "isolation_env": ["RAY_PORT"],
        "listener": {"process": "python", "pid": 1},
        "versions": {"ray": "2.60.0", **over.get("versions", {})},
        "hardware": {"num_logical_cpus": 2, "ray_resources": {"memory": repeat}, **over.get("hardware", {})},
    }
    journal.read_back(folder, f"key-{profile}", told)


def planned_row(**known: Any) -> SummaryRow:
    """A trial of four clients that was not measured yet, but for what is known of it."""
    usual: dict[str, Any] = {
        "run_id": "r",
        "arm": "baseline",
        "trial_id": "c0004-r0",
        "repeat": 0,
        "workload": "unary",
        "profile": "baseline",
        "cluster": "local",
        "service_key": "key-baseline",
        "load_mode": "closed",
        "concurrency": 4,
        "duration_s": 4.0,
        "num_replicas": 1,
    }
    return SummaryRow(**(usual | known))


def trial_record(row: SummaryRow, **found: Any) -> TrialRecord:
    """A complete, VALID trial without a figure, but for what was found."""
    usual: dict[str, Any] = {
        **{name: getattr(row, name) for name in ("trial_id", "run_id", "arm", "repeat", "load_mode")},
        **{name: getattr(row, name) for name in ("concurrency", "offered_rps")},
        "level": row.trial_id.rpartition("-r")[0],
        "service_key": row.service_key,
        "started_at": "2026-11-21T07:00:00+00:00",
        "finished_at": "2026-11-21T07:00:10+00:00",
        "duration_s": row.duration_s,
        "warmup_s": 1.0,
        "ramp_up_s": 0.5,
        "drain_s": 1.0,
        "client": ClientFacts(),
        "metrics": Metrics(),
        "valid": True,
        "invalid_reasons": [],
        "invalid_details": {},
        "unchecked": [],
        "notes": ["colocated_client"],
    }
    return TrialRecord(**(usual | found))


def _level(amount: float, open_loop: bool) -> Level:
    return Level.of_rate(amount) if open_loop else Level.of_clients(int(amount))


def _row(paths: RunPaths, arm: str, profile: str, amount: float, repeat: int, open_loop: bool) -> SummaryRow:
    level = _level(amount, open_loop)
    return planned_row(
        run_id=paths.run_id,
        arm=safe_name(arm),
        trial_id=trial_id(level.name, repeat),
        repeat=repeat,
        profile=profile,
        service_key=f"key-{profile}",
        load_mode=level.load_mode,
        concurrency=level.concurrency,
        offered_rps=level.offered_rps,
    )


def _measure(paths: RunPaths, row: SummaryRow, speed: float, rng: np.random.Generator, invalid: bool) -> TrialRecord:
    assert row.duration_s is not None
    if row.concurrency is not None:
        samples = draw_samples(row.concurrency, speed, row.duration_s, rng)
    else:
        assert row.offered_rps is not None
        samples = draw_arrivals(row.offered_rps, speed, row.duration_s, rng)
    path = paths.samples(row.arm, row.trial_id.rpartition("-r")[0], row.repeat)
    path.parent.mkdir(parents=True)
    write_samples(path, samples)
    return trial_record(
        row,
        client=ClientFacts(
            num_requests=len(samples),
            num_processes=1,
            cpu_ratio=0.1,
            latency_resolution_ms=0.0,
            versions={"locust": "2.47.0"},
        ),
        metrics=compute_metrics(samples, row.duration_s, {"latency_p99_ms": 500}),
        valid=not invalid,
        invalid_reasons=["drift"] if invalid else [],
        invalid_details={"drift": "Throughput changed by +30%."} if invalid else {},
    )


def draw_samples(concurrency: int, speed: float, duration_s: float, rng: np.random.Generator) -> pa.Table:
    """Closed loop: each client sends its next request when its last is answered."""
    num = int(1.3 * speed * (duration_s + 2)) + 20
    latency_s = rng.lognormal(np.log(1 / speed) - 0.045, 0.3, (concurrency, num))
    sent_at_s = np.cumsum(latency_s, axis=1) - latency_s - 1.5
    keep = sent_at_s < duration_s
    order = np.argsort(sent_at_s[keep])
    return _samples(sent_at_s[keep][order], latency_s[keep][order] * 1000)


def draw_arrivals(rate_rps: float, speed: float, duration_s: float, rng: np.random.Generator) -> pa.Table:
    """Open loop: Poisson arrivals, each answered in 1 / `speed` s on average."""
    sent_at_s = np.cumsum(rng.exponential(1 / rate_rps, int(1.3 * rate_rps * (duration_s + 2)) + 20)) - 1.5
    sent_at_s = sent_at_s[sent_at_s < duration_s]
    return _samples(sent_at_s, rng.lognormal(np.log(1 / speed) - 0.045, 0.3, len(sent_at_s)) * 1000)


def _samples(sent_at_s: np.ndarray, latency_ms: np.ndarray) -> pa.Table:
    columns: dict[str, Any] = {
        name: pa.nulls(len(sent_at_s), SAMPLES_SCHEMA.field(name).type) for name in SAMPLES_SCHEMA.names
    }
    columns |= {"sent_at_s": sent_at_s, "latency_ms": latency_ms, "ok": np.ones(len(sent_at_s), bool)}
    columns["client_process"] = np.zeros(len(sent_at_s), np.int16)
    return pa.table(columns, schema=SAMPLES_SCHEMA)
