"""Does the report say what was found, leave out nothing that matters, and let no name break its format?"""

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from analysis import figures, formats, load, published, report, wording
from analysis.cells import Cell, Comparison
from analysis.differences import Difference
from orchestrator.results.records import Declaration, Failure, PlanRecord, RunRecord, SummaryRow, keys, write_json

LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HOSTILE = 'a<script>alert("1")</script>|`b`&*c*'
RECORD = RunRecord(
    run_id="2026-11-21_05-36-31",
    status="complete",
    started_at="2026-11-21T05:36:31+00:00",
    finished_at="2026-11-21T07:02:29+00:00",
    command=["workload=unary", "profile=baseline,optimized", "sweep.repeats=5", "-m"],
    seed=1848130049,
    plan=PlanRecord(arms=[], services=[], trials=[]),
    compare=Declaration(treatment=["profile"], baseline=None, repeats=5, redeploy="per_repeat"),
    primary_cells=[],
    provenance={
        "git": {"commit": "696ae36af56a54a57fbfbbf786bfb04e78a8ca65", "dirty": True},
        "packages": {"ray": "2.60.0", "locust": "2.47.0", "numpy": "2.4.6"},
        "python": "3.11.7",
        "host": {"cpu_model": "AMD EPYC", "num_logical_cpus": 2, "memory_gib": 23.54, "gpus": [], "governor": None},
    },
)


def cell(
    ratio: float | None = 3.94,
    low: float | None = 3.71,
    high: float | None = 4.18,
    verdict: str | None = "FASTER",
    **changes: Any,
) -> Cell:
    """A judged cell of throughput at 64 clients; `changes` are any of its fields."""
    fields: dict[str, Any] = {
        "metric": "throughput_rps",
        "level": "c0064",
        "concurrency": 64,
        "offered_rps": None,
        "axes": "",
        "baseline": "baseline",
        "candidate": "optimized",
        "baseline_value": 193.2,
        "candidate_value": None if ratio is None else 193.2 * ratio,
        "ratio": ratio,
        "ci_low_ratio": low,
        "ci_high_ratio": high,
        "confidence": None if low is None else 0.95,
        "num_blocks": 5,
        "num_planned": 5,
        "family": "primary",
        "verdict": verdict,
        "reason": "",
        "floor_ratio": None,
    }
    return Cell(**(fields | changes))


def comparison(
    primary: Cell | None = None, summary: str = "optimized is ×3.94 faster than baseline.", **changes: Any
) -> Comparison:
    """2 arms x 9 levels: a primary cell, 10 secondary ones and the descriptive rest, 81 cells in all."""
    first = primary or cell()
    common = {"baseline": first.baseline, "candidate": first.candidate, "axes": first.axes}
    cells = [first]
    for metric in ("latency_p50_ms", "latency_p99_ms"):
        cells.append(cell(1.31, 0.98, 1.75, "INCONCLUSIVE", metric=metric, family="secondary", confidence=0.9917,
                          reason="about 6 to 14 further blocks would settle it", **common))  # fmt: skip
    for level in LEVELS:
        if level != 64:
            cells.append(cell(1.002, 0.984, 1.021, "EQUIVALENT", level=f"c{level:04}", concurrency=level,
                              family="secondary", confidence=0.9917, **common))  # fmt: skip
    for metric in ("latency_mean_ms", "latency_p50_ms", "latency_p90_ms", "latency_p95_ms", "latency_p99_ms",
                   "latency_p999_ms", "goodput_rps", "ttft_p99_ms"):  # fmt: skip
        for level in LEVELS:
            if not (level == 64 and metric in ("latency_p50_ms", "latency_p99_ms")):
                ratio = 1 + math.log2(level) / 4
                described: dict[str, Any] = {"metric": metric, "level": f"c{level:04}", "concurrency": level}
                described |= {
                    "family": "descriptive",
                    "baseline_value": 12.345 * level,
                    "candidate_value": 1234.5 / level,
                }
                if metric == "latency_p999_ms" and level < 32:
                    described |= {"baseline_value": None, "reason": "fewer than 10,000 samples a block"}
                    cells.append(cell(None, None, None, None, **described, **common))
                else:
                    cells.append(cell(ratio, ratio * 0.9, ratio * 1.1, None, **described, **common))
    fields: dict[str, Any] = {
        "baseline_run": "outputs/2026-11-21_05-36-31",
        "candidate_run": "outputs/2026-11-21_05-36-31",
        "treatment": "profile",
        "margin": 0.05,
        "look": 1,
        "primary": first,
        "cells": tuple(cells),
        "differences": (
            Difference("profile.env.RAY_SERVE_ENABLE_HA_PROXY", "(unset)", "1", "declared", True),
            Difference("profile.env.RAY_SERVE_THROUGHPUT_OPTIMIZED", "(unset)", "1", "declared", True),
            Difference("env.RAY_SERVE_ENABLE_HA_PROXY", "(unset)", "1", "effective", True),
            Difference("env.RAY_SERVE_THROUGHPUT_OPTIMIZED", "(unset)", "1", "effective", True),
            Difference("hardware.num_cpus", "2", "4", "effective", False),
            Difference("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1", "1000", "consequence", True),
        ),
        "warnings": (),
        "summary": summary,
    }
    return Comparison(**(common | fields | changes))


def points(
    arms: tuple[str, ...] = ("baseline", "optimized"), repeats: int = 5, workload: str = "unary"
) -> pd.DataFrame:
    """All complete and VALID, but optimized at 64 clients: one INVALID, one failed, one not run."""
    rows = []
    for arm in arms:
        for level in LEVELS:
            for repeat in range(repeats):
                row: dict[str, Any] = dict.fromkeys(keys(SummaryRow))
                row |= {"arm": arm, "level": f"c{level:04}", "trial_id": f"c{level:04}-r{repeat}", "repeat": repeat}
                row |= {"state": "complete", "valid": True, "invalid_reasons": "", "load_mode": "closed"}
                row |= {
                    "notes": "colocated_client;unchecked:replica_restart",
                    "concurrency": level,
                    "workload": workload,
                }
                if arm == arms[-1] and level == 64:
                    if repeat == 1:
                        row |= {"valid": False, "invalid_reasons": "drift;client_lag"}
                    if repeat in (2, 3):
                        row |= {
                            "state": "failed" if repeat == 2 else "planned",
                            "valid": None,
                            "invalid_reasons": None,
                            "notes": None,
                        }
                rows.append(row)
    return pd.DataFrame(rows)


DETAILS = [
    report.TrialDetail(
        "optimized",
        "c0064-r1",
        invalid_details={
            "drift": "Throughput changed by +23% over the window (95 % interval +2% to +44%), more than 20%. "
            "Lengthen warmup_s, or stop other work on these machines.",
        },
    ),
    report.TrialDetail(
        "optimized",
        "c0064-r2",
        failure=Failure(
            arm="optimized",
            trial_id="c0064-r2",
            repeat=2,
            stage="service",
            error="asked for a service within 180 s, found <no replica> ready",
            log="services/optimized/r2/driver.log",
        ),
    ),
]


class _Page(HTMLParser):
    """Text, tags and whether they nest."""

    VOID = frozenset({"meta", "link", "img", "br", "wbr", "rect", "line", "circle"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def text(self, *tags: str) -> str:
        return " ".join(data for tag, data in self.texts if tag != "style" and (not tags or tag in tags))


def page(*comparisons: Comparison, **arguments: Any) -> _Page:
    given: dict[str, Any] = {"record": RECORD, "points": points(), "figures": {}, "details": DETAILS} | arguments
    parsed = _Page(report.render_html(comparisons, **given))
    assert not parsed.open
    return parsed


# ---- Figures as text ----


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.9412, "3.94"), (0.0, "0"), (12345, "12,345"), (999.6, "1,000"), (0.01234, "0.0123"), (64.0, "64.0"),
     (None, "–"), (float("nan"), "–"), (float("inf"), "–"), (-0.5, "-0.500")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ((3.94, 3.71, 4.18), "×3.94 (95 % interval 3.71 to 4.18)"),
        ((1.04, 1.0012, 1.081), "×1.040 (95 % interval 1.001 to 1.081)"),  # not "1.00 to 1.08": this is FASTER
        ((0.97, 0.94, 0.99996), "×0.9700 (95 % interval 0.9400 to 1.0000)"),  # four decimals must do
        ((1.0, 0.98, 1.02), "×1.00 (95 % interval 0.98 to 1.02)"),
        ((12.3, 8.0, 18.9), "×12.3 (95 % interval 8.0 to 18.9)"),
        ((1.2, 0.003, 412.0), "×1.20 (95 % interval <0.01 to >100)"),
        ((1.5, None, None), "×1.50"),
        ((None, None, None), "–"),
    ],
)
def test_effect_text(ratios: tuple[float | None, ...], text: str) -> None:
    assert wording.effect_text(cell(*ratios)) == text


def test_names() -> None:
    assert figures.heading("latency_p999_ms") == "latency p99.9 (ms)"
    assert figures.heading("output_throughput_tok_per_s") == "output throughput (tok/s)"
    assert figures.heading("ttft_p99_ms") == "TTFT p99 (ms)"
    assert wording.confidence_text(0.999999) == "99.99 %"


# ---- HTML ----


def test_html_needs_nothing_else() -> None:
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    parsed = page(comparison(), figures={"a b": ("Ratio by level", svg), "c": ("Other", svg)})
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "iframe", "object", "style-src")
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["Ratio by level", "Other"]
    assert [(image["src"] or "").split(";")[0] for image in images] == ["data:image/svg+xml"] * 2
    ids = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    links = {(attributes["href"] or "")[1:] for tag, attributes in parsed.tags if tag == "a"}
    assert links <= ids


@pytest.mark.parametrize("verdict", ["FASTER", "SLOWER", "EQUIVALENT", "INCONCLUSIVE"])
def test_html_verdict_first(verdict: str) -> None:
    parsed = page(comparison(cell(verdict=verdict), summary=f"It is {verdict} & so on."))
    assert f"It is {verdict} & so on." in parsed.text("h1")
    assert [tag for tag, _ in parsed.tags].count("h1") == 1
    text = parsed.text()
    assert text.index(verdict, text.index("Run 2026")) < text.index("metric")
    assert "5 of 5 blocks usable" in text
    assert "no noise floor given" in text


def test_html_escapes_names() -> None:
    hostile = replace(cell(), baseline=HOSTILE, axes=HOSTILE, reason=HOSTILE)
    html = report.render_html(
        [
            comparison(
                hostile,
                summary=HOSTILE,
                warnings=(HOSTILE,),
                differences=(Difference(HOSTILE, HOSTILE, HOSTILE, "declared", False),),
            )
        ],
        replace(RECORD, run_id=HOSTILE, command=[HOSTILE]),
        points(("baseline", HOSTILE)),
        {HOSTILE: (HOSTILE, b"")},
        [report.TrialDetail(HOSTILE, "c0064-r1", invalid_details={"drift": HOSTILE})],
    )
    assert "<script" not in html
    assert 'alert("' not in html
    assert HOSTILE in _Page(html).text("h1")


def test_html_says_what_may_be_doubted() -> None:
    text = page(comparison(warnings=("run still in progress: 4 of 18 trials",))).text()
    assert "87 of 90 planned trials are VALID, 1 INVALID, 1 failed, 1 not run." in text
    assert "optimized, 64 clients" in text
    assert "2 of 5 blocks VALID" in text
    assert "Throughput changed by +23%" in text  # the trial's own sentence
    assert "median lag of the client's event loop" in text  # no sentence of its own: the rule
    assert "found <no replica> ready (log: services/optimized/r2/driver.log)" in text
    assert "run still in progress: 4 of 18 trials" in text
    assert "The load client shared the machine" in text
    assert "Closed loop: each client waits" in text
    assert "Not checked, which is not passed: replica_restart (a replica was replaced" in text
    assert "1 difference is not part of the treatment" in text
    assert "with uncommitted changes" in text


def test_html_of_several_and_of_none() -> None:
    several = [
        comparison(replace(cell(), axes=f"workload={name}"), summary=f"{name} sentence") for name in ("recsys", "unary")
    ]
    parsed = page(*several)
    assert "2 comparisons: 2 FASTER" in parsed.text("h1")
    assert "recsys sentence" in parsed.text("h2")
    assert "unary sentence" in parsed.text("h2")
    assert parsed.text().count("Declared in the configs") == 1  # the same differences are shown once
    none = page(points=points().iloc[:0], details=[])
    assert "No trial was planned." in none.text()
    assert "Nothing to compare" in none.text("h1")


def test_html_without_primary_or_figures_that_are_missing() -> None:
    bare = replace(comparison(), primary=None, cells=(), differences=())
    untold = replace(RECORD, run_id="imported", finished_at=None, command=[], seed=None, provenance={})
    text = page(bare, record=untold, points=points(repeats=1), details=[]).text()
    assert "NO VERDICT" in text
    assert "No difference was found." in text
    single = cell(1.4, None, None, "INCONCLUSIVE", num_blocks=1, num_planned=1, reason="one deployment an arm")
    parsed = page(comparison(single))
    assert "one deployment an arm" in parsed.text()
    assert not re.search(r"\b(nan|none)\b", parsed.text(), re.IGNORECASE)
    titles = [attributes["title"] for _, attributes in parsed.tags if "title" in attributes]
    assert "fewer than 10,000 samples a block" in titles


# ---- The other formats ----


def test_markdown() -> None:
    hostile = replace(cell(), baseline=HOSTILE)
    text = formats.render_markdown([comparison(hostile, warnings=("be careful",))], RECORD, points(), DETAILS)
    assert text.startswith("### ▲ FASTER: optimized against a&lt;script&gt;")
    assert "<script" not in text
    assert "×3.94 (95 % interval 3.71 to 4.18)" in text
    assert text.count("<details>") == text.count("</details>") == 3
    widths = {len(line.replace(r"\|", "").split("|")) for line in text.splitlines() if line.startswith("| throughput")}
    assert widths == {10}
    assert "be careful" in text
    assert "Throughput changed by +23%" in text
    assert "· Ray 2.60.0 ·" in text


@pytest.mark.parametrize("width", [100, 80])
def test_terminal_fits(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(formats.render_terminal(comparison(warnings=("w" * 70, "[bold]not markup"))))
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, output.splitlines())) <= width
    for whole in (
        "INCONCLUSIVE",
        "EQUIVALENT",
        "throughput",
        "3.71 to 4.18",
        "×3.94",
        "c=256",
        "761",
        "candidate",
        "[bold]not",
    ):
        assert whole in output, output
    assert "…" not in output


def test_json_is_json() -> None:
    odd = replace(cell(), candidate_value=float("nan"), floor_ratio=float("inf"))
    answer = json.loads(json.dumps(formats.cells_json(comparison(odd)), allow_nan=False))
    assert answer["summary"].startswith("optimized is")
    assert answer["verdict"] == "FASTER"
    assert answer["primary"] == "throughput_rps@c0064"
    first = answer["cells"][0]
    assert first["candidate_value"] is None
    assert (first["metric"], first["ratio"], first["ci_low_ratio"], first["family"]) == (
        "throughput_rps",
        3.94,
        3.71,
        "primary",
    )


def test_junit() -> None:
    cells = [
        cell(),
        cell(0.8, 0.75, 0.85, "SLOWER", reason="bad \x07 <worse>"),
        cell(1.0, 0.9, 1.1),
        cell(None, None, None),
    ]
    text = formats.junit_xml(comparison(), list(zip(cells, ("ok", "slower", "inconclusive", "invalid"), strict=True)))
    root = ET.fromstring(text)
    suite = root.find("testsuite")
    assert suite is not None
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "1", "errors": "1", "skipped": "1",
    }  # fmt: skip
    assert [[child.tag for child in case] for case in suite.iter("testcase")] == [
        ["system-out"],
        ["failure"],
        ["skipped"],
        ["error"],
    ]
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("message") == "×0.80 (95 % interval 0.75 to 0.85). bad � <worse>"
    with pytest.raises(KeyError):
        formats.junit_xml(comparison(), [(cell(), "whatever")])


def test_gate_in_words() -> None:
    slower = cell(0.8, 0.75, 0.85, None, reason="a|b")
    line = formats.gate_line(slower, "slower", 0.03).plain
    assert (
        line == "FAIL: SLOWER  throughput (req/s) at 64 clients: ×0.80 (95 % interval 0.75 to 0.85), limit ×0.971; a|b"
    )
    text = formats.gate_markdown(comparison(), [(slower, "slower"), (cell(), "ok")], 0.03)
    assert "at most 3 % slower" in text
    assert (
        r"| **FAIL: SLOWER** | throughput (req/s) | 64 clients | ×0.80 (95 % interval 0.75 to 0.85) | 5/5 | a\|b |"
        in text
    )
    assert "**PASS**" in text


# ---- A whole run ----


def imported(outputs: Path) -> load.RunData:
    source = Path(__file__).parent / "data/published/unary.csv"
    return load.load_run(published.import_source(source, "locust", "unary", "baseline", outputs).root)


def test_write_a_run_of_one_arm(tmp_path: Path) -> None:
    run = imported(tmp_path)
    assert report.write(run) == []
    text = _Page(run.paths.report_html.read_text()).text()
    assert "Nothing to compare" in text
    assert f"{len(run.points)} planned trials" in text
    assert "not measured by the orchestrator" in text.lower()
    assert run.paths.comparison_csv.read_text().startswith("metric,level,")
    assert not list(tmp_path.rglob("*.partial"))


def test_trial_details(tmp_path: Path) -> None:
    run = imported(tmp_path)
    rows = load.records(run.points)
    run.points["valid"] = pd.Series([False, None, *[True] * (len(rows) - 2)], dtype=object)
    run.points.loc[1, "state"] = "failed"
    arm, repeat, trial_id = rows[1]["arm"], rows[1]["repeat"], rows[1]["trial_id"]
    failure = Failure(arm=arm, trial_id=trial_id, repeat=repeat, stage="trial", error="gone", log=None)
    path = run.paths.failure_json(arm, rows[1]["level"], repeat)
    write_json(path, failure)
    details = report.trial_details(run)
    assert [(detail.trial_id, detail.failure) for detail in details] == [
        (rows[0]["trial_id"], None),
        (trial_id, failure),
    ]
    assert {detail.run_dir for detail in details} == {str(run.paths.root)}
    path.write_text("{")
    with pytest.raises(load.LoadError, match=r"failure\.json"):
        report.trial_details(run)
    path.unlink()
    assert len(report.trial_details(run)) == 1
    assert len(report.points_of([run, run])) == 2 * len(rows)
