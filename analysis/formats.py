"""A comparison as text: Markdown for a pull request, a table for the terminal, JSON, and JUnit XML for the gate.

Everything that came from outside (names, errors, flags) is escaped for the format it goes into.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from analysis.cells import Cell, Comparison
from analysis.figures import heading
from analysis.report import SIGNS, TrialDetail, findings, grouped_differences, judged, provenance, render
from analysis.wording import MISSING, effect_text, is_missing, number, ratio_texts
from orchestrator.load.level import Level
from orchestrator.results.records import RunRecord

STYLES = {"FASTER": "bold green", "SLOWER": "bold red", "EQUIVALENT": "bold blue", "INCONCLUSIVE": "bold yellow"}
# What the gate made of a cell -> how it says so, in which style, and the element that CI shows for it.
GATE = {
    "ok": ("PASS", "bold green", "system-out"),
    "slower": ("FAIL: SLOWER", "bold red", "failure"),
    "inconclusive": ("INCONCLUSIVE", "bold yellow", "skipped"),
    "invalid": ("INVALID", "bold magenta", "error"),
}
# Shown beside the judged cells where replies are streamed; described, not judged.
OF_STREAMS = ("output_throughput_tok_per_s", "ttft_p50_ms", "tpot_p50_ms")


# ---- Markdown ----


def escaped(text: Any) -> str:
    """Literal text in GitHub Markdown, also inside a table."""
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~#@])", r"\\\1", flat)


def render_markdown(
    comparisons: Sequence[Comparison],
    record: RunRecord,
    points: pd.DataFrame,
    details: Sequence[TrialDetail] = (),
) -> str:
    """A comment for a pull request: verdict and judged cells in sight, the rest folded. As `render_html`."""
    told = dict(provenance(comparisons, record, {}))
    packages = record.provenance.get("packages") or {}
    facts = {"run": told.get("Run"), "Ray": packages.get("ray"), "commit": told.get("Orchestrator commit")}
    return render(
        "report.md.jinja",
        {"md": escaped, "effect": effect_text},
        comparisons=comparisons,
        findings=findings(points, details),
        differences=grouped_differences(comparisons),
        facts=facts | {"seed": told.get("Seed"), "host": told.get("Client host")},
    )


# ---- Terminal, JSON ----


def render_terminal(comparison: Comparison) -> Group:
    """Sentence and judged cells, to be printed with rich; fits 80 columns and more."""
    verdict, first = comparison.verdict, comparison.primary
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=escape(comparison.label), title_justify="left")
    for column in ("level", "metric", "baseline", "candidate", "ratio", "verdict"):
        justify: Any = "right" if column in ("baseline", "candidate", "ratio") else "left"
        table.add_column(column, overflow="fold", no_wrap=column not in ("metric", "ratio"), justify=justify)
    of_streams = [cell for cell in comparison.family("descriptive") if first and cell.level == first.level]
    of_streams = [cell for cell in of_streams if cell.metric in OF_STREAMS]
    for cell in [*comparison.family("primary", "secondary"), *of_streams]:
        ratio, interval = ratio_texts(cell)
        table.add_row(
            Level.parse(cell.level).short_text,
            heading(cell.metric).replace("(", "").replace(")", ""),
            number(cell.baseline_value),
            number(cell.candidate_value),
            f"{ratio} ({interval})" if interval else ratio,
            Text(cell.verdict or MISSING, STYLES.get(cell.verdict or "", "")),
        )
    notes = [
        f"{Level.parse(cell.level).short_text} {heading(cell.metric)}: {cell.reason}"
        for cell in comparison.family("secondary")
        if cell.reason
    ]
    notes.append("Figures are geometric means over the blocks in which both arms are VALID.")
    lines = [
        *(Text(note, "dim") for note in notes),
        *(Text(f"warning: {warning}", "yellow") for warning in comparison.warnings),
    ]
    if others := len(comparison.family("descriptive")):
        lines.append(Text(f"{others} more cells are descriptive: no verdict, see --format json or the report.", "dim"))
    sign = (f"{SIGNS.get(verdict, '?')} {verdict}", STYLES.get(verdict, "bold"))
    sentence = Text.assemble(sign, "  ", comparison.summary)
    return Group(sentence, Text("; ".join(judged(comparison)) + ".\n", "dim"), table, *lines)


def _jsonable(value: Any) -> Any:
    """NaN and infinity are not JSON, numpy's scalars neither: null and plain numbers."""
    if isinstance(value, Mapping):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    value = value.item() if hasattr(value, "item") else value
    return None if is_missing(value) else value


def cells_json(comparison: Comparison) -> dict[str, object]:
    """`{"summary": ..., "verdict": ..., "baseline": ..., "cells": [...]}`, fit for `json.dumps(allow_nan=False)`."""
    first = comparison.primary
    primary = f"{first.metric}@{first.level}" if first else None
    top = {"summary": comparison.summary, "verdict": comparison.verdict}
    told = top | asdict(comparison) | {"primary": primary}
    return {name: _jsonable(value) for name, value in told.items()}


# ---- The gate ----


def _what(cell: Cell) -> str:
    return f"{heading(cell.metric)} at {Level.parse(cell.level)}"


def gate_line(cell: Cell, outcome: str, max_slowdown: float) -> Text:
    """One line a metric, to be printed with rich."""
    word, style, _ = GATE[outcome]
    reason = f"; {cell.reason}" if cell.reason else ""
    limit = f"limit ×{number(1 / (1 + max_slowdown))}"
    return Text.assemble((word, style), f"  {_what(cell)}: {effect_text(cell)}, {limit}{reason}")


def gate_markdown(comparison: Comparison, outcomes: Sequence[tuple[Cell, str]], max_slowdown: float) -> str:
    """The gate's answer for a job summary or a comment."""
    lines = [["gate", "metric", "level", "ratio, > 1 is better", "blocks", "why"], ["---"] * 6]
    for cell, outcome in outcomes:
        row = [f"**{GATE[outcome][0]}**", escaped(heading(cell.metric)), escaped(Level.parse(cell.level).text)]
        lines.append([*row, effect_text(cell), f"{cell.num_blocks}/{cell.num_planned}", escaped(cell.reason)])
    limit = f"Fails below ×{number(1 / (1 + max_slowdown))} (at most {100 * max_slowdown:g} % slower)."
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### Gate: {escaped(comparison.label)}\n\n{limit}\n\n{table}\n"


def junit_xml(comparison: Comparison, outcomes: Sequence[tuple[Cell, str]]) -> str:
    """The gate's answer for CI: one testcase a judged cell.

    `outcomes`: cells with "ok", "slower" (a failure), "inconclusive" (skipped) or "invalid" (an error).
    """
    texts = ((_what(cell), outcome, f"{effect_text(cell)}. {cell.reason}".strip()) for cell, outcome in outcomes)
    return _junit(comparison.label, [(name, outcome, text, text) for name, outcome, text in texts])


def junit_refusal(what: str, error: str) -> str:
    """A gate that could not be judged: one testcase with an error."""
    return _junit(what, [("comparable", "invalid", error.splitlines()[0], error)])


def _junit(what: str, cases: Iterable[tuple[str, str, str, str]]) -> str:
    """`cases`: name, outcome, message and text of each."""
    root = ET.Element("testsuites")
    suite = ET.SubElement(root, "testsuite", name=_xml(f"serve-orchestrator: {what}"))
    for name, outcome, message, text in cases:
        case = ET.SubElement(suite, "testcase", classname=_xml(what), name=_xml(name), time="0")
        facts = {} if outcome == "ok" else {"message": _xml(message), "type": outcome}
        ET.SubElement(case, GATE[outcome][2], facts).text = _xml(text)
    counters = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    counts = {counter: str(len(list(suite.iter(tag)))) for counter, tag in counters.items()}
    root.attrib |= counts
    suite.attrib |= counts
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """ElementTree escapes markup, but writes control characters that no XML 1.0 reader takes."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)
