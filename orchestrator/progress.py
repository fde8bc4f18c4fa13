"""What a person sees while a run goes on, and the table at its end.

On a terminal: one line that stays (what is happening now, live throughput, p99 and errors, time left), results
above it. Elsewhere (CI, a pipe): the same facts as plain lines, without the live figures.
"""

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Column, Table

from orchestrator.arms import comparisons, primary_cells
from orchestrator.clients.base import Live
from orchestrator.load.level import Level
from orchestrator.paths import level_of
from orchestrator.plan import Plan, Service, Trial
from orchestrator.results.records import PLANNED, Effective, SummaryRow

_COLUMNS = {"throughput_rps": "req/s", "latency_p50_ms": "p50 ms", "latency_p99_ms": "p99 ms"}
_STREAM_COLUMNS = {
    "throughput_rps": "req/s",
    "output_throughput_tok_per_s": "tok/s",
    "ttft_p50_ms": "TTFT ms",
    "tpot_p50_ms": "TPOT ms",
    "latency_p99_ms": "p99 ms",
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Drop the output when nobody reads it any more (`| head`, a closed terminal), so that the run goes on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False)


def line(text: str) -> None:
    """One line of rich markup, never broken: paths and commands stay fit to copy."""
    console.print(text, soft_wrap=True)


class Progress:
    """Shows one run. Use as a context manager."""

    def __init__(self, plan: Plan, num_trials: int) -> None:
        self._plan = plan
        self._num_trials = num_trials
        self._num_done = 0
        self._ends_at = time.monotonic() + plan.duration_s * num_trials / max(1, plan.num_trials)
        self._service_started_at: dict[Service, float] = {}
        self._status: Status | None = console.status("planning") if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def service_starting(self, service: Service) -> None:
        self._service_started_at[service] = time.monotonic()
        number = f"{len(self._service_started_at)}/{len(self._plan.services)}"
        line(f"service {number}  [bold]{escape(service.label)}[/bold]  starting")

    def service_status(self, service: Service, text: str) -> None:
        self._now(f"{service.label}: {text}")

    def service_ready(self, service: Service, effective: Effective) -> None:
        took_s = time.monotonic() - self._service_started_at[service]
        process = f"; HTTP by {escape(effective.listener['process'])}" if effective.listener else ""
        line(f"  [bold]{escape(service.label)}[/bold] ready in {took_s:.0f} s{process}")

    def stopping(self, service: Service) -> None:
        self._now(f"{service.label}: stopping")

    def live(self, trial: Trial, live: Live) -> None:
        phase = "warm-up" if live.elapsed_s < 0 else f"{live.elapsed_s:.0f}/{trial.arm.config.sweep.duration_s:g} s"
        self._now(
            f"trial {self._num_done + 1}/{self._num_trials}  {_name(trial)}  {phase}  {live.throughput_rps:.0f} req/s  "
            f"p99 {_number(live.latency_p99_ms)} ms  {live.num_failed} errors"
        )

    def trial_done(self, trial: Trial, row: SummaryRow, details: Mapping[str, str]) -> None:
        verdict = "[green]VALID[/green]" if row.valid else f"[red]INVALID[/red] {row.invalid_reasons}"
        self._trial_ended(
            trial,
            f"{_number(row.throughput_rps)} req/s  p50 {_number(row.latency_p50_ms)} ms  "
            f"p99 {_number(row.latency_p99_ms)} ms  {verdict}",
        )
        for text in details.values():
            line(f"      {escape(text)}")

    def trial_failed(self, trial: Trial, error: str) -> None:
        self._trial_ended(trial, f"[red]FAILED[/red] {escape(error.splitlines()[0])}")

    def _trial_ended(self, trial: Trial, result: str) -> None:
        self._num_done += 1
        line(f"  {self._num_done}/{self._num_trials}  {escape(_name(trial))}  {result}")

    def teardown_failed(self, error: str) -> None:
        line(f"[red]teardown failed[/red] {escape(error)}")

    def service_failed(self, service: Service, error: str, num_trials: int) -> None:
        self._num_done += num_trials
        line(f"[red]service {escape(service.label)} failed[/red]\n{escape(error)}")

    def warning(self, text: str) -> None:
        line(f"  [yellow]warning[/yellow] {escape(text)}")

    def _now(self, text: str) -> None:
        if self._status:
            left_s = max(0.0, self._ends_at - time.monotonic())
            self._status.update(f"{escape(text)}  about {left_s / 60:.0f} min left")


def _name(trial: Trial) -> str:
    return f"{trial.arm.name} {trial.level.short_text} r{trial.repeat}"


def print_plan(plan: Plan) -> None:
    """The dry run: services, trials, order, estimated duration."""
    table = Table(*(Column(name, overflow="fold") for name in ("arm", "levels", "flags")), box=None, pad_edge=False)
    for arm in plan.arms:
        flags = " ".join(f"{name}={value}" for name, value in arm.config.profile.env.items())
        table.add_row(
            escape(arm.name),
            " ".join(level.short_text.removeprefix("c=") for level in arm.levels),
            escape(flags) or "(none)",
        )
    console.print(table)
    if any(arm.config.workload.server is not None for arm in plan.arms):
        line("\nA workload without Ray Serve has no flags: it is measured once, whatever profiles are swept.")
    repeats = plan.arms[0].config.sweep.repeats
    line(
        f"\n{len(plan.arms)} arms x {repeats} repeats: {len(plan.services)} services, {plan.num_trials} trials, "
        f"about {_duration(plan.duration_s)} (seed {plan.seed})"
    )
    if rented := dict.fromkeys(
        tuple(arm.config.cluster.machines()) for arm in plan.arms if arm.config.cluster.machines()
    ):
        a_service = "; ".join(", ".join(f"{count} x {name}" for name, count in one) for one in rented)
        line(f"Each service: {escape(a_service)}. About {plan.service_hours:.1f} service hours, {_cost(plan)}")
    if any(arm.config.cluster.redeploy == "never" for arm in plan.arms):
        line("No verdict will come of it: one deployment an arm (cluster.redeploy=never) is no replicate.")
        _print_order(plan)
        return
    compare = plan.arms[0].config.compare
    looks = f"{compare.max_looks} look{'s' if compare.max_looks > 1 else ''}"
    for cell in primary_cells(plan.arms):
        if cell.candidate:
            what = f"{cell.candidate} against {cell.baseline}: {cell.metric} at {Level.parse(cell.level).text}"
            line(f"Judged: {escape(what)}, margin {100 * compare.margin:g} %, {looks}")
    _print_order(plan)


def _print_order(plan: Plan) -> None:
    line("Order of services:")
    for number, wave in enumerate(plan.waves, 1):
        line(f"  {number:>3}  {escape('  |  '.join(service.label for service in wave.services))}")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _cost(plan: Plan) -> str:
    """The estimated cost and the prices that it is made of, or how to declare a price."""
    clusters = [arm.config.cluster for arm in plan.arms]
    cost = plan.cost_usd()
    if cost is None:
        unpriced = dict.fromkeys(name for cluster in clusters for name in cluster.unpriced())
        prices = ", ".join(f"{name}: <USD>" for name in unpriced)
        return escape(f"cost unknown: declare the price of a machine, '++cluster.usd_per_hour={{{prices}}}'")
    prices_usd = ", ".join(
        f"{price:.2f}" for price in dict.fromkeys(filter(None, (cluster.hourly_usd() for cluster in clusters)))
    )
    return f"about {cost:.2f} USD at {prices_usd} USD an hour a service (cluster.usd_per_hour)"


def print_results(plan: Plan, rows: Sequence[SummaryRow]) -> None:
    """What each arm did at each level: medians over the VALID repeats. Ratios and verdicts are analysis' part."""
    for arms in comparisons(plan.arms):
        workloads = ", ".join(dict.fromkeys(arm.config.workload.name for arm in arms))
        title = ", ".join(f"{axis}={value}" for axis, value in arms[0].other_axes) or workloads
        names = {arm.name for arm in arms}
        streamed = any(row.arm in names and row.ttft_p50_ms is not None for row in rows)
        columns = _STREAM_COLUMNS if streamed else _COLUMNS
        table = Table(
            title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for column in ("level", "arm", *columns.values(), "valid"):
            table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
        levels = {(row.arm, Level.parse(level_of(row.trial_id))) for row in rows if row.arm in names}
        for level in sorted({level for _, level in levels}):
            for arm in arms:
                if (arm.name, level) in levels:
                    table.add_row(*_result_cells(arm.name, level, rows, columns))
            table.add_section()
        console.print(table)
    console.print("- : no VALID point, or too few samples to say (a p99 needs 1,000). TTFT, TPOT: medians.")


def _result_cells(arm: str, level: Level, rows: Sequence[SummaryRow], columns: Mapping[str, str]) -> list[str]:
    where = (arm, level.concurrency, level.offered_rps)
    ran = [row for row in rows if (row.arm, row.concurrency, row.offered_rps) == where and row.state != PLANNED]
    valid = [row for row in ran if row.valid]
    values = [[v for row in valid if (v := getattr(row, column)) is not None] for column in columns]
    medians = [_number(statistics.median(measured) if measured else None) for measured in values]
    return [level.short_text, escape(arm), *medians, f"{len(valid)}/{len(ran)}"]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
