"""Does the report hold up in a real browser: on a phone, on a desk, in the dark and on paper?

Needs Chromium (CHROMIUM names another binary than the one on the path) and the package `playwright`, which drives it.
No browser is downloaded.
"""

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis.differences import Difference
from analysis.report import render_html
from orchestrator.results.records import Effective
from tests.test_report import DETAILS, HOSTILE, LEVELS, RECORD, cell, comparison, points

pytestmark = pytest.mark.e2e

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# A container's root has no sandbox; the rest keeps the browser from talking to anyone.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {"phone": (360, 800), "desktop": (1280, 900)}
LONG = "workload.application.deployments.ingress.autoscaling_config.target_ongoing_requests" * 2


def figures() -> dict[str, Any]:
    """Two pictures as wide as real ones."""
    made = {}
    for name, caption in (
        ("throughput-by-level", "Throughput by level. Bars: 95 % interval between deployments."),
        ("latency-by-level", "p99 latency by level."),
    ):
        figure = Figure(figsize=(7.2, 4), layout="constrained")
        axes = figure.subplots()
        for arm, factor in (("baseline", 1.0), ("optimized", 3.94)):
            axes.plot(LEVELS, factor * 200 * (1 - np.exp(-np.array(LEVELS) / 20)), marker="o", label=arm)
        axes.set(xscale="log", xlabel="clients", ylabel="req/s", title=name)
        axes.legend()
        file = io.BytesIO()
        figure.savefig(file, format="svg")
        made[name] = (caption, file.getvalue())
    return made


def cases() -> dict[str, str]:
    """Name -> HTML: what real runs look like, and the worst that may come."""
    invalid = cell(None, None, None, "INCONCLUSIVE", baseline_value=None, num_blocks=0,
                   reason="no block with both points VALID: baseline 0 of 5 VALID (client_lag)")  # fmt: skip
    single = cell(1.42, None, None, "INCONCLUSIVE", num_blocks=1, num_planned=1,
                  reason="single run, no interval")  # fmt: skip
    hostile = replace(cell(), baseline=HOSTILE, candidate=LONG, axes=f"workload={LONG}", reason=HOSTILE * 3)
    three = {
        "recsys": (cell(1.41, 1.33, 1.49), "optimized serves recsys 41 % faster than baseline at 64 clients."),
        "unary": (cell(0.91, 0.86, 0.962, "SLOWER"), "optimized serves unary 9 % slower than baseline at 64 clients."),
        "streaming": (cell(1.004, 0.981, 1.027, "EQUIVALENT"), "optimized and baseline are equivalent on streaming."),
        "llm": (cell(1.12, 0.94, 1.33, "INCONCLUSIVE", reason="The interval holds 1; 4 to 11 further blocks would "
                "settle it."), "Whether optimized is faster than baseline on llm is not known."),
    }  # fmt: skip
    several = [comparison(replace(first, axes=f"workload={name}"), text) for name, (first, text) in three.items()]
    differences = (*comparison().differences, Difference(LONG, HOSTILE, LONG, "declared", False))
    effective = Effective(
        service_key="0", versions={"ray": "2.60.0"}, hardware={"cpu_model": "AMD EPYC", "num_cpus": 2}
    )
    summary = "optimized is faster than baseline: ×3.94 the throughput at 64 clients (95 % interval 3.71 to 4.18)."
    pictures = figures()
    return {
        "usual": render_html(
            [comparison(summary=summary)], RECORD, points(), pictures, DETAILS, {"baseline": effective}
        ),
        "several": render_html(several, RECORD, points(), pictures, DETAILS),
        "invalid": render_html(
            [comparison(invalid, "No verdict: the primary cell is INVALID in every block.")],
            replace(RECORD, status="interrupted"), points(), {}, DETAILS,
        ),
        "single": render_html(
            [comparison(single, "optimized shows ×1.42, but nobody can tell effect from noise: one run an arm.")],
            replace(RECORD, run_id="imported"), points(repeats=1), {}, (),
        ),
        "hostile": render_html(
            [comparison(hostile, f"{LONG} {HOSTILE}", warnings=tuple(f"{i}: {HOSTILE} {LONG}" for i in range(10)),
                        differences=differences)],
            replace(RECORD, command=[LONG, HOSTILE]), points(("baseline", LONG)), pictures, DETAILS,
        ),
        "nothing": render_html([], replace(RECORD, run_id="one arm"), points(("baseline",)), pictures, ()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or set CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: see the dev extra")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)  # with a new, empty profile
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("reports")
    files = {}
    for name, html in cases().items():
        files[name] = directory / f"{name}.html"
        files[name].write_text(html, encoding="utf-8")
    return files


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["usual", "several", "invalid", "single", "hostile", "nothing"])
def test_report_in_a_browser(name: str, size: str, browser: Any, reports: dict[str, Path]) -> None:
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    console: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("dialog", lambda dialog: console.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(reports[name].as_uri(), wait_until="load")

    assert console == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    scroll_width, client_width = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert scroll_width <= client_width, "the page scrolls sideways"
    images = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth])")
    assert all(complete and natural_width > 0 for complete, natural_width in images)
    assert len(images) == (0 if name in ("invalid", "single") else 2)
    if name == "usual":
        assert "×3.94 the throughput at 64 clients" in page.inner_text("h1")
    page.close()


def test_report_on_paper(browser: Any, reports: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(reports["usual"].as_uri())
    assert page.pdf(format="A4").startswith(b"%PDF-")
    page.emulate_media(media="print")
    # On paper nothing scrolls: what is cut off is lost. 718 px = A4 less the margins.
    page.set_viewport_size({"width": 718, "height": 1000})
    overflowing = page.evaluate(
        "[...document.querySelectorAll('table, figure, section')].filter("
        "each => each.scrollWidth > 718 || each.getBoundingClientRect().right > 718).length"
    )
    assert overflowing == 0
    page.close()
