"""From what a client and a service told about one window to its record: figures, and can they be trusted?"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from orchestrator.clients.base import Measurement
from orchestrator.journal import now
from orchestrator.plan import Trial
from orchestrator.results.records import Metrics, ServerFacts, TrialRecord
from orchestrator.results.samples import compute_metrics, read_samples, tokens_are_bunched
from orchestrator.results.validity import Evidence, check_validity


def judge(
    trial: Trial,
    run_id: str,
    samples_path: Path,
    measurement: Measurement,
    *,
    started_at: str,
    server: ServerFacts | None,
    observed: Mapping[str, Mapping[str, object]],
    round_trip_ms: float | None,
    colocated: bool,
) -> TrialRecord:
    """`colocated`: the client ran on the service's machine. Raises ValueError for samples that are not ours."""
    config, sweep = trial.arm.config, trial.arm.config.sweep
    duration_s, facts, whole_run = measurement.duration_s, measurement.facts, measurement.whole_run
    samples = read_samples(samples_path)
    metrics = compute_metrics(samples, duration_s, dataclasses.asdict(config.slo))
    evidence = Evidence(
        samples=samples,
        metrics=metrics,
        concurrency=trial.level.concurrency,
        duration_s=duration_s,
        client=facts,
        server=server or ServerFacts(),
    )
    validity = check_validity(evidence, dataclasses.asdict(config.validity))
    return TrialRecord(
        trial_id=trial.id,
        run_id=run_id,
        arm=trial.arm.name,
        repeat=trial.repeat,
        level=trial.level.name,
        load_mode=trial.level.load_mode,
        concurrency=trial.level.concurrency,
        offered_rps=trial.level.offered_rps,
        service_key=trial.arm.key,
        started_at=started_at,
        finished_at=now(),
        duration_s=duration_s,
        # A client that counts requests has no such times: its window lies where all its clients are busy.
        warmup_s=0.0 if whole_run else sweep.warmup_s,
        ramp_up_s=0.0 if whole_run else sweep.ramp_up_s,
        drain_s=None if whole_run else sweep.drain_s,
        client=facts,
        server=server,
        observed=observed,
        round_trip_ms=round_trip_ms,
        metrics=metrics,
        whole_run=whole_run,
        valid=validity.valid,
        invalid_reasons=validity.reasons,
        invalid_details=validity.details,
        unchecked=validity.unchecked,
        notes=[
            *(["colocated_client"] if colocated else []),
            *(["far_client"] if _is_far(round_trip_ms, metrics) else []),
            *(["bunched_tokens"] if tokens_are_bunched(samples, duration_s) else []),
        ],
    )


def _is_far(round_trip_ms: float | None, metrics: Metrics) -> bool:
    """Whether at least half of what a request takes is the way there and back."""
    latency_ms = metrics.latency_p50_ms
    return round_trip_ms is not None and latency_ms is not None and round_trip_ms > latency_ms / 2
