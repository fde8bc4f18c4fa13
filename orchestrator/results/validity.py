"""Can the point of a trial be trusted? The rules that make it INVALID. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from orchestrator.results.records import ClientFacts, Metrics, ServerFacts
from orchestrator.results.samples import completed_at_s, drift, in_flight_mean, in_window, never_finished

INVALID_REASONS = {
    "no_samples": "no request completed or failed in the window",
    "no_success": "requests failed in the window and none succeeded",
    "error_ratio": "error_ratio above max_error_ratio",
    "window_cut_short": (
        "the client's window_s shorter than duration_s by more than max_window_shortfall_ratio, "
        "or nothing in flight in the last tenth of the window"
    ),
    "ramp_in_window": "the last client started inside the window",
    "offered_rate": "open loop: requests were sent at less than min_offered_ratio of offered_rps",
    "drift": "throughput trend over the window beyond max_drift_ratio, and its 95 % interval excludes 0",
    "in_flight": "closed loop: time-average number in flight below min_in_flight_ratio of concurrency",
    "replica_restart": "a replica was replaced during the trial",
    "actor_failed": "a Serve actor died during the trial",
    "task_error": "the locustfile's task raised during the trial",
    "client_cpu": "busiest client process above max_client_cpu_ratio of a core",
    "client_lag": "median lag of the client's event loop above max_client_lag_ratio of latency_p50_ms",
}


@dataclass
class Validity:
    """Codes of `INVALID_REASONS` that were broken (with a sentence each) or could not be checked."""

    reasons: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        """An unchecked rule does not invalidate; it is shown."""
        return not self.reasons

    def invalidate(self, code: str, detail: str) -> None:
        assert code in INVALID_REASONS, code
        self.reasons.append(code)
        self.details[code] = detail

    def judge(self, code: str, found: float | None, limit: float, detail: str) -> None:
        """INVALID if `found` is above `limit`, unchecked if nobody knows it. `detail` is a template of both."""
        if found is None:
            self.unchecked.append(code)
        elif found > limit:
            self.invalidate(code, detail.format(found=found, limit=limit))


def check_validity(
    samples: pa.Table,
    metrics: Metrics,
    *,
    concurrency: int | None,
    duration_s: float,
    client: ClientFacts,
    server: ServerFacts | None,
    thresholds: Mapping[str, float],
) -> Validity:
    """Judge one trial by the rules of `INVALID_REASONS`.

    `metrics` are `compute_metrics` of the same samples and `duration_s`. `concurrency` is None in open loop,
    where `in_flight` does not apply. A fact of `client` or `server` that is None makes its rule `unchecked`.
    `thresholds` has the fields of `config.ValidityConfig`.
    """
    validity = Validity()
    num_successful, num_failed = metrics.num_successful or 0, metrics.num_failed or 0
    num_requests = num_successful + num_failed
    most = _commonest_error(samples, duration_s)
    quoted = most.replace("{", "{{").replace("}", "}}")
    if not num_requests:
        validity.invalidate(
            "no_samples",
            f"No request completed in the window of {duration_s:g} s ({len(samples)} were recorded in all). "
            "Read client.log; if requests take longer than the window, raise duration_s.",
        )
        # One cause, one code: what follows from it is not judged.
        validity.unchecked += ["error_ratio", "drift"] + ([] if concurrency is None else ["in_flight"])
    elif not num_successful:
        validity.invalidate(
            "no_success",
            f"All {num_failed} requests of the window failed{most}. Read client.log and the service's logs.",
        )
        validity.unchecked += ["drift"]
    else:
        validity.judge(
            "error_ratio",
            metrics.error_ratio,
            thresholds["max_error_ratio"],
            f"{{found:.2%}} of requests failed ({num_failed}{quoted}), more than {{limit:.2%}}. "
            "Failures are often fast: read the errors in samples.parquet and the service's logs.",
        )
        trend, limit = drift(samples, duration_s), thresholds["max_drift_ratio"]
        assert trend is not None, "metrics are of other samples"
        if abs(trend.ratio) > limit and not trend.ci_low <= 0 <= trend.ci_high:
            validity.invalidate(
                "drift",
                f"Throughput changed by {trend.ratio:+.0%} over the window (95 % interval "
                f"{trend.ci_low:+.0%} to {trend.ci_high:+.0%}), more than {limit:.0%}. "
                "Lengthen warmup_s (vLLM's client: raise num_prompts), or stop other work on these machines.",
            )
    if num_requests and concurrency is not None:
        found, limit = client.in_flight_mean, thresholds["min_in_flight_ratio"]
        found = in_flight_mean(samples, duration_s) if found is None else found
        if found < limit * concurrency:
            validity.invalidate(
                "in_flight",
                f"On average {found:.4g} of {concurrency} requests were in flight, fewer than {limit:.0%}. "
                "Either the client did not keep up (give it more processes, or a machine of its own), "
                "or requests failed at once (see the errors).",
            )

    window_s, limit = client.window_s, thresholds["max_window_shortfall_ratio"]
    # In flight, not completions: with latencies as long as the window completions may well stop early, load does not.
    # In open loop an idle tenth may be chance; with >= 100 requests it has a probability of e^-10 or so.
    expect_load = num_requests >= (100 if concurrency is None else 1)
    if window_s is not None and window_s < duration_s * (1 - limit):
        validity.invalidate(
            "window_cut_short",
            f"The client offered load for {window_s:g} s of {duration_s:g} s, short by more than "
            f"{limit:.1%}. Read client.log for why it stopped.",
        )
    elif expect_load and in_flight_mean(samples, duration_s, 0.9 * duration_s) == 0:
        validity.invalidate(
            "window_cut_short",
            f"No request was in flight in the last tenth of the window of {duration_s:g} s, "
            "where there should always be some. Read client.log for why it stopped.",
        )
    elif window_s is None:
        validity.unchecked.append("window_cut_short")
    _check_client(validity, metrics.latency_p50_ms, client, thresholds)
    _check_server(validity, server or ServerFacts())
    return validity


def _commonest_error(samples: pa.Table, duration_s: float) -> str:
    counted = in_window(completed_at_s(samples), duration_s) | never_finished(samples, duration_s)
    errors = Counter(samples["error"].filter(pa.array(counted)).drop_null().to_pylist())
    return "".join(f", most often with {error}" for error, _ in errors.most_common(1))


def _check_client(
    validity: Validity, p50_ms: float | None, client: ClientFacts, thresholds: Mapping[str, float]
) -> None:
    """Whether we measured the service or the client."""
    validity.judge(
        "ramp_in_window",
        client.all_clients_started_at_s,
        0,
        "The last client started {found:.3g} s into the window, not before it. Lengthen warmup_s.",
    )
    validity.judge(
        "task_error",
        client.num_task_errors,
        0,
        "The locustfile's task raised {found} times, none is allowed: what it found wrong is in client.log. "
        "Mark a bad reply with response.failure() instead.",
    )
    sent_rps, offered_rps, limit = client.sent_rps, client.offered_rps, thresholds["min_offered_ratio"]
    if sent_rps is not None and offered_rps is not None and sent_rps < limit * offered_rps:
        validity.invalidate(
            "offered_rate",
            f"Requests were sent at {sent_rps:.4g}/s, less than {limit:.0%} of the {offered_rps:g}/s offered: all "
            "clients waited for replies. Offer less, or raise the concurrency.",
        )
    validity.judge(
        "client_cpu",
        client.cpu_ratio,
        thresholds["max_client_cpu_ratio"],
        "The busiest client process used {found:.0%} of a core, more than {limit:.0%}. "
        "Give the client more processes, or a machine of its own.",
    )
    lag_ms, limit = client.lag_p50_ms, thresholds["max_client_lag_ratio"]
    validity.judge(
        "client_lag",
        None if p50_ms is None else lag_ms,
        limit * (p50_ms or 0),
        f"The client's event loop lagged by {{found:.3g}} ms (median), more than {limit:.0%} of the "
        f"median latency of {p50_ms or 0:.3g} ms. Give the client more processes, or a machine of its own.",
    )


def _check_server(validity: Validity, server: ServerFacts) -> None:
    """Whether the service that ended the trial is the one that began it."""
    for code, names, what in (
        ("replica_restart", server.restarted, "replaced"),
        ("actor_failed", server.failed, "lost"),
    ):
        if names is None:
            validity.unchecked.append(code)
        elif names:
            validity.invalidate(
                code,
                f"{len(names)} {what} during the trial ({', '.join(names)}), none is allowed. "
                "Read the service's logs for the cause (memory, health checks, an exception).",
            )
