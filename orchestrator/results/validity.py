"""Can the point of a trial be trusted? `RULES` says what makes it INVALID. Pure.

A further rule is a function and its entry in `RULES`: codes, documents and report follow.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum

import pyarrow as pa

from orchestrator.results.records import ClientFacts, Metrics, ServerFacts
from orchestrator.results.samples import completed_at_s, drift, in_flight_mean, in_window, never_finished


class TroubleKind(StrEnum):
    """What a broken rule says about a point. Today each kind makes it INVALID."""

    noise = "noise"  # the figures moved while they were measured: a trend, other work on the machine
    dilution = "dilution"  # the client or the way to the service shares in the figures, or offered less load than asked
    outcome = "outcome"  # the service did this, and it belongs to its arm: errors, restarts
    breakage = "breakage"  # the measurement failed, so its figures are not of the window and load that were asked for


class Unbroken(Enum):
    """Answers of a rule that is not broken."""

    passed = "passed"
    unknown = "unknown"  # nobody knows what it asks for: listed as unchecked, and does not invalidate
    not_applicable = "not applicable"  # there is nothing that it could ask for


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one trial. A fact of `client` or `server` that is None was not told.

    `metrics` are `compute_metrics` of `samples` and `duration_s`. `concurrency` is None in open loop.
    """

    samples: pa.Table
    metrics: Metrics
    concurrency: int | None
    duration_s: float
    client: ClientFacts
    server: ServerFacts = field(default_factory=ServerFacts)

    @property
    def num_successful(self) -> int:
        """In the window, as everything here."""
        return self.metrics.num_successful or 0

    @property
    def num_failed(self) -> int:
        return self.metrics.num_failed or 0

    @property
    def num_requests(self) -> int:
        return self.num_successful + self.num_failed

    @property
    def commonest_error(self) -> str:
        """The end of a clause about failures; empty if none of them says what it was."""
        completed = in_window(completed_at_s(self.samples), self.duration_s)
        counted = completed | never_finished(self.samples, self.duration_s)
        errors = Counter(self.samples["error"].filter(pa.array(counted)).drop_null().to_pylist())
        return "".join(f", most often with {error}" for error, _ in errors.most_common(1))


Answer = Unbroken | str  # broken: a sentence with the figure, the limit and what to do


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way in which a point is INVALID.

    `limit` is a key of `validity` in the config; None where none is set and the rule is fixed. `check` is given the
    value of the limit, 0 for a fixed one. `meaning` is the rule in a clause, for documents and report.
    """

    code: str
    kind: TroubleKind
    limit: str | None = None
    meaning: str
    check: Callable[[Evidence, float], Answer]


@dataclass
class Validity:
    """Codes of `RULES` that were broken (with a sentence each) or could not be checked, in the order of `RULES`."""

    reasons: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        """No rule is broken. Unchecked ones do not make a point INVALID; they are shown."""
        return not self.reasons

    def invalidate(self, code: str, detail: str) -> None:
        assert code in {rule.code for rule in RULES}, code
        self.reasons.append(code)
        self.details[code] = detail


def check_validity(evidence: Evidence, thresholds: Mapping[str, float]) -> Validity:
    """Judge one trial by `RULES`. `thresholds` is `validity` of the config: each `limit` of a rule to its value."""
    validity = Validity()
    for rule in RULES:
        answer = rule.check(evidence, 0.0 if rule.limit is None else thresholds[rule.limit])
        if isinstance(answer, str):
            validity.invalidate(rule.code, answer)
        elif answer is Unbroken.unknown:
            validity.unchecked.append(rule.code)
    return validity


# ---- Were there requests, and did they succeed? One cause, one code: what follows from it is not judged again. ----


def _no_samples(it: Evidence, limit: float) -> Answer:
    if it.num_requests > limit:
        return Unbroken.passed
    return (
        f"No request completed in the window of {it.duration_s:g} s ({len(it.samples)} were recorded in all). "
        "Read client.log; if requests take longer than the window, raise duration_s."
    )


def _no_success(it: Evidence, limit: float) -> Answer:
    if not it.num_requests:
        return Unbroken.not_applicable
    if it.num_successful > limit:
        return Unbroken.passed
    failed = f"All {it.num_failed} requests of the window failed{it.commonest_error}"
    return f"{failed}. Read client.log and the service's logs."


def _error_ratio(it: Evidence, limit: float) -> Answer:
    if it.num_requests and not it.num_successful:
        return Unbroken.not_applicable
    found = it.metrics.error_ratio
    if found is None:
        return Unbroken.unknown
    if found > limit:
        return (
            f"{found:.2%} of requests failed ({it.num_failed}{it.commonest_error}), more than {limit:.2%}. "
            "Failures are often fast: read the errors in samples.parquet and the service's logs."
        )
    return Unbroken.passed


def _drift(it: Evidence, limit: float) -> Answer:
    if not it.num_successful:
        return Unbroken.unknown
    trend = drift(it.samples, it.duration_s)
    assert trend is not None, "metrics are of other samples"
    if abs(trend.ratio) > limit and not trend.ci_low <= 0 <= trend.ci_high:
        return (
            f"Throughput changed by {trend.ratio:+.0%} over the window (95 % interval "
            f"{trend.ci_low:+.0%} to {trend.ci_high:+.0%}), more than {limit:.0%}. "
            "Lengthen warmup_s (vLLM's client: raise num_prompts), or stop other work on these machines."
        )
    return Unbroken.passed


# ---- Was the load there that was asked for? ----


def _in_flight(it: Evidence, limit: float) -> Answer:
    if it.concurrency is None:
        return Unbroken.not_applicable
    if not it.num_requests:
        return Unbroken.unknown
    found = it.client.in_flight_mean
    found = in_flight_mean(it.samples, it.duration_s) if found is None else found
    if found < limit * it.concurrency:
        return (
            f"On average {found:.4g} of {it.concurrency} requests were in flight, fewer than {limit:.0%}. "
            "Either the client did not keep up (give it more processes, or a machine of its own), "
            "or requests failed at once (see the errors)."
        )
    return Unbroken.passed


def _window_cut_short(it: Evidence, limit: float) -> Answer:
    """Mean number in flight by the client's own record, else by the samples."""
    window_s = it.client.window_s
    if window_s is not None and window_s < it.duration_s * (1 - limit):
        return (
            f"The client offered load for {window_s:g} s of {it.duration_s:g} s, short by more than "
            f"{limit:.1%}. Read client.log for why it stopped."
        )
    # In flight, not completions: with latencies as long as the window completions may well stop early, load does not.
    # In open loop an idle tenth may be chance; with >= 100 requests it has a probability of e^-10 or so.
    expect_load = it.num_requests >= (100 if it.concurrency is None else 1)
    if expect_load and in_flight_mean(it.samples, it.duration_s, 0.9 * it.duration_s) == 0:
        return (
            f"No request was in flight in the last tenth of the window of {it.duration_s:g} s, "
            "where there should always be some. Read client.log for why it stopped."
        )
    return Unbroken.unknown if window_s is None else Unbroken.passed


def _ramp_in_window(it: Evidence, limit: float) -> Answer:
    found = it.client.all_clients_started_at_s
    if found is None:
        return Unbroken.unknown
    if found > limit:
        return f"The last client started {found:.3g} s into the window, not before it. Lengthen warmup_s."
    return Unbroken.passed


def _task_error(it: Evidence, limit: float) -> Answer:
    found = it.client.num_task_errors
    if found is None:
        return Unbroken.unknown
    if found > limit:
        return (
            f"The locustfile's task raised {found} times, none is allowed: what it found wrong is in client.log. "
            "Mark a bad reply with response.failure() instead."
        )
    return Unbroken.passed


def _offered_rate(it: Evidence, limit: float) -> Answer:
    sent_rps, offered_rps = it.client.sent_rps, it.client.offered_rps
    if sent_rps is None or offered_rps is None:
        return Unbroken.not_applicable
    if sent_rps < limit * offered_rps:
        return (
            f"Requests were sent at {sent_rps:.4g}/s, less than {limit:.0%} of the {offered_rps:g}/s offered: all "
            "clients waited for replies. Offer less, or raise the concurrency."
        )
    return Unbroken.passed


# ---- Was it the service that was measured, and not the client? ----


def _client_cpu(it: Evidence, limit: float) -> Answer:
    found = it.client.cpu_ratio
    if found is None:
        return Unbroken.unknown
    if found > limit:
        return (
            f"The busiest client process used {found:.0%} of a core, more than {limit:.0%}. "
            "Give the client more processes, or a machine of its own."
        )
    return Unbroken.passed


def _client_lag(it: Evidence, limit: float) -> Answer:
    found, p50_ms = it.client.lag_p50_ms, it.metrics.latency_p50_ms
    if found is None or p50_ms is None:
        return Unbroken.unknown
    if found > limit * p50_ms:
        return (
            f"The client's event loop lagged by {found:.3g} ms (median), more than {limit:.0%} of the "
            f"median latency of {p50_ms:.3g} ms. Give the client more processes, or a machine of its own."
        )
    return Unbroken.passed


# ---- Is the service that ended the trial the one that began it? ----


def _replica_restart(it: Evidence, limit: float) -> Answer:
    return _changed(it.server.restarted, "replaced", limit)


def _actor_failed(it: Evidence, limit: float) -> Answer:
    return _changed(it.server.failed, "lost", limit)


def _changed(names: Sequence[str] | None, what: str, limit: float) -> Answer:
    if names is None:
        return Unbroken.unknown
    if len(names) > limit:
        return (
            f"{len(names)} {what} during the trial ({', '.join(names)}), none is allowed. "
            "Read the service's logs for the cause (memory, health checks, an exception)."
        )
    return Unbroken.passed


# In the order in which reasons are given.
RULES: Sequence[Rule] = (
    Rule(
        code="no_samples",
        kind=TroubleKind.breakage,
        meaning="no request completed or failed in the window",
        check=_no_samples,
    ),
    Rule(
        code="no_success",
        kind=TroubleKind.outcome,
        meaning="requests failed in the window and none succeeded",
        check=_no_success,
    ),
    Rule(
        code="error_ratio",
        kind=TroubleKind.outcome,
        limit="max_error_ratio",
        meaning="error_ratio above max_error_ratio",
        check=_error_ratio,
    ),
    Rule(
        code="drift",
        kind=TroubleKind.noise,
        limit="max_drift_ratio",
        meaning="throughput trend over the window beyond max_drift_ratio, and its 95 % interval excludes 0",
        check=_drift,
    ),
    Rule(
        code="in_flight",
        kind=TroubleKind.dilution,
        limit="min_in_flight_ratio",
        meaning="closed loop: time-average number in flight below min_in_flight_ratio of concurrency",
        check=_in_flight,
    ),
    Rule(
        code="window_cut_short",
        kind=TroubleKind.breakage,
        limit="max_window_shortfall_ratio",
        meaning="the client's window_s shorter than duration_s by more than max_window_shortfall_ratio, "
        "or nothing in flight in the last tenth of the window",
        check=_window_cut_short,
    ),
    Rule(
        code="ramp_in_window",
        kind=TroubleKind.dilution,
        meaning="the last client started inside the window",
        check=_ramp_in_window,
    ),
    Rule(
        code="task_error",
        kind=TroubleKind.breakage,
        meaning="the locustfile's task raised during the trial",
        check=_task_error,
    ),
    Rule(
        code="offered_rate",
        kind=TroubleKind.dilution,
        limit="min_offered_ratio",
        meaning="open loop: requests were sent at less than min_offered_ratio of offered_rps",
        check=_offered_rate,
    ),
    Rule(
        code="client_cpu",
        kind=TroubleKind.dilution,
        limit="max_client_cpu_ratio",
        meaning="busiest client process above max_client_cpu_ratio of a core",
        check=_client_cpu,
    ),
    Rule(
        code="client_lag",
        kind=TroubleKind.dilution,
        limit="max_client_lag_ratio",
        meaning="median lag of the client's event loop above max_client_lag_ratio of latency_p50_ms",
        check=_client_lag,
    ),
    Rule(
        code="replica_restart",
        kind=TroubleKind.outcome,
        meaning="a replica was replaced during the trial",
        check=_replica_restart,
    ),
    Rule(
        code="actor_failed",
        kind=TroubleKind.outcome,
        meaning="a Serve actor died during the trial",
        check=_actor_failed,
    ),
)
