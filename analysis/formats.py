"""A comparison as text: Markdown for a pull request, a table for the terminal, JSON, and JUnit XML for the gate.

Everything that came from outside (names, errors, flags) is escaped for the format it goes into.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from analysis.compare import Cell, Comparison
from analysis.report import SIGNS, family_of, findings, grouped_differences, judged, label_of, provenance, verdict_of
from analysis.wording import MISSING, effect_text, is_missing, level_text, metric_text, number, ratio_texts

STYLES = {"FASTER": "bold green", "SLOWER": "bold red", "EQUIVALENT": "bold blue", "INCONCLUSIVE": "bold yellow"}
# What the gate made of a cell -> how it says so, and the element that CI shows for it.
GATE_WORDS = {"ok": "PASS", "slower": "FAIL: SLOWER", "inconclusive": "INCONCLUSIVE", "invalid": "INVALID"}
JUNIT_ELEMENTS = {"ok": None, "slower": "failure", "inconclusive": "skipped", "invalid": "error"}


# ---- Markdown ----


def _md(text: Any) -> str:
    """Literal text in GitHub Markdown, also inside a table."""
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~#@])", r"\\\1", flat)


def _md_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md_cells(cells: Sequence[Cell], verdicts: bool) -> str:
    rows = []
    for cell in cells:
        values = [number(cell.baseline_value), number(cell.candidate_value), effect_text(cell)]
        row = [_md(metric_text(cell.metric)), _md(level_text(cell.level)), *values]
        row.append(f"{cell.num_blocks}/{cell.num_planned}")
        if verdicts:
            word = f"{SIGNS.get(cell.verdict or '', '')} {cell.verdict or MISSING}".strip()
            row.append(f"**{word}**" if cell.family == "primary" else word)
        rows.append([*row, _md(cell.reason)])
    headings = ["metric", "level", "baseline", "candidate", "ratio, > 1 is better", "blocks"]
    return _md_table([*headings, *(["verdict"] if verdicts else []), "why"], rows)


def _md_details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def render_markdown(
    comparisons: Sequence[Comparison],
    record: Mapping[str, Any],
    points: pd.DataFrame,
    details: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A comment for a pull request: verdict and judged cells in sight, the rest folded. As `render_html`."""
    parts = []
    for each in comparisons:
        verdict = verdict_of(each)
        parts.append(f"### {SIGNS.get(verdict, '?')} {verdict}: {_md(label_of(each))}\n\n{_md(each.summary)}")
        parts.append(f"{_md('; '.join(judged(each)))}.")
        parts += ["\n".join(f"- ⚠ {_md(warning)}" for warning in each.warnings)] if each.warnings else []
        parts.append(_md_cells(family_of(each, "primary", "secondary"), verdicts=True))
        if others := family_of(each, "descriptive"):
            parts.append(
                _md_details(f"{len(others)} descriptive cells (no verdict)", _md_cells(others, verdicts=False))
            )
    found = findings(points, details)
    lines = [found["counts"], ""]
    for entry in found["entries"]:
        lines.append(f"- **{_md(entry['title'])}**: {entry['count']}")
        lines += [f"  - {item['block']}: {_md(item['code'])}: {_md(item['text'])}" for item in entry["items"]]
    lines += [f"- {_md(note)}" for note in found["notes"]]
    parts.append(_md_details("Validity", "\n".join(lines)))
    for group in grouped_differences(comparisons):
        rows = [
            [
                _md(title.split(":")[0]),
                _md(each.key),
                _md(each.baseline),
                _md(each.candidate),
                "" if each.allowed else "⚠ no",
            ]
            for title, differences in group["parts"]
            for each in differences
        ]
        body = (
            _md_table(["where", "key", "baseline", "candidate", "part of the treatment"], rows)
            if rows
            else "None found."
        )
        flag = f", {group['num_unallowed']} NOT part of the treatment" if group["num_unallowed"] else ""
        parts.append(_md_details(f"What differed{flag}", f"{_md('; '.join(group['labels']))}\n\n{body}"))
    facts = dict(provenance(comparisons, record, {}))
    packages = ((record.get("provenance") or {}).get("packages")) or {}
    shown = [("run", facts.get("Run")), ("Ray", packages.get("ray")), ("commit", facts.get("Orchestrator commit"))]
    shown += [("seed", facts.get("Seed")), ("host", facts.get("Client host"))]
    parts.append(f"<sub>{' · '.join(f'{name} {_md(value)}' for name, value in shown if value)}</sub>")
    return "\n\n".join(parts) + "\n"


# ---- Terminal, JSON, JUnit ----

# Shown beside the judged cells where replies are streamed; described, not judged.
OF_STREAMS = ("output_throughput_tok_per_s", "ttft_p50_ms", "tpot_p50_ms")


@dataclass(frozen=True)
class _ForTerminal:
    """Rich asks it to draw itself, and says how wide: below 76 columns the table is folded by us.

    Rich would fold or cut where it likes, and half an interval on a line reads like a whole one.
    """

    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        comparison, narrow = self.comparison, options.max_width < 76
        verdict = verdict_of(comparison)
        sign = (f"{SIGNS.get(verdict, '?')} {verdict}", STYLES.get(verdict, "bold"))
        yield Text.assemble(sign, "  ", comparison.summary)
        yield Text("; ".join(judged(comparison)) + ".\n", "dim")
        yield _terminal_table(comparison, narrow, gap=2 if options.max_width >= 88 else 1)
        for cell in family_of(comparison, "secondary"):
            if cell.reason:
                what = f"{level_text(cell.level, short=True)} {metric_text(cell.metric)}"
                yield Text(f"{what}: {cell.reason}", "dim")
        yield Text("Figures are geometric means over the blocks in which both arms are VALID.", "dim")
        for warning in comparison.warnings:
            yield Text(f"warning: {warning}", "yellow")
        if others := len(family_of(comparison, "descriptive")):
            yield Text(f"{others} more cells are descriptive: no verdict, see --format json or the report.", "dim")


def render_terminal(comparison: Comparison) -> _ForTerminal:
    """Sentence and judged cells, to be printed with rich; fits 60 columns and more."""
    return _ForTerminal(comparison)


def _terminal_table(comparison: Comparison, narrow: bool, gap: int) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, gap, 0, 0), title=escape(label_of(comparison)), title_justify="left"
    )
    if not narrow:
        table.add_column("level", no_wrap=True)
    table.add_column("metric", overflow="fold")
    for heading in ("baseline", "candidate", "ratio", "verdict"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "verdict" else "right")
    primary = comparison.primary
    tokens = [
        cell
        for cell in family_of(comparison, "descriptive")
        if primary and cell.metric in OF_STREAMS and cell.level == primary.level
    ]
    for cell in [*family_of(comparison, "primary", "secondary"), *tokens]:
        metric, level = metric_text(cell.metric).replace("(", "").replace(")", ""), level_text(cell.level, short=True)
        ratio, interval = ratio_texts(cell)
        table.add_row(
            *([f"{metric}, {level}"] if narrow else [level, metric]),
            number(cell.baseline_value),
            number(cell.candidate_value),
            (f"{ratio}\n{interval}" if narrow else f"{ratio} ({interval})") if interval else ratio,
            Text(cell.verdict or MISSING, STYLES.get(cell.verdict or "", "")),
        )
    return table


def _jsonable(value: Any) -> Any:
    """NaN and infinity are not JSON, numpy's scalars neither: null and plain numbers."""
    if isinstance(value, Mapping):
        return {key: _jsonable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    return None if is_missing(value) else value


def cells_json(comparison: Comparison) -> dict[str, Any]:
    """`{"summary": ..., "verdict": ..., "baseline": ..., "cells": [...]}`, fit for `json.dumps(allow_nan=False)`."""
    everything = asdict(comparison)
    everything["primary"] = (
        None if comparison.primary is None else f"{comparison.primary.metric}@{comparison.primary.level}"
    )
    return _jsonable({"summary": everything.pop("summary"), "verdict": verdict_of(comparison), **everything})


def junit_xml(comparison: Comparison, outcomes: Sequence[tuple[Cell, str]]) -> str:
    """The gate's answer for CI: one testcase a judged cell.

    `outcomes`: cells with "ok", "slower" (a failure), "inconclusive" (skipped) or "invalid" (an error).
    """
    suite = ET.Element("testsuite", name=_xml(f"serve-orchestrator: {label_of(comparison)}"), tests=str(len(outcomes)))
    for kind, counter in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(counter, str(sum(JUNIT_ELEMENTS[outcome] == kind for _, outcome in outcomes)))
    for cell, outcome in outcomes:
        name = f"{metric_text(cell.metric)} at {level_text(cell.level)}"
        case = ET.SubElement(suite, "testcase", classname=_xml(label_of(comparison)), name=_xml(name), time="0")
        text = _xml(f"{effect_text(cell)}. {cell.reason}".strip())
        if element := JUNIT_ELEMENTS[outcome]:
            ET.SubElement(case, element, message=text, type=outcome).text = text
        else:
            ET.SubElement(case, "system-out").text = text
    root = ET.Element("testsuites", {key: suite.get(key, "0") for key in ("tests", "failures", "errors", "skipped")})
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def junit_refusal(what: str, error: str) -> str:
    """A gate that could not be judged: one testcase with an error."""
    root = ET.Element("testsuites", tests="1", failures="0", errors="1", skipped="0")
    suite = ET.SubElement(root, "testsuite", name=_xml(f"serve-orchestrator: {what}"), tests="1", errors="1")
    case = ET.SubElement(suite, "testcase", classname=_xml(what), name="comparable", time="0")
    ET.SubElement(case, "error", message=_xml(error.splitlines()[0]), type="invalid").text = _xml(error)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def escaped(text: str) -> str:
    """Literal text in GitHub Markdown."""
    return _md(text)


def _xml(text: str) -> str:
    """ElementTree escapes markup, but writes control characters that no XML 1.0 reader takes."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)


# ---- The gate ----


def gate_line(cell: Cell, outcome: str, max_slowdown: float) -> Text:
    """One line a metric, to be printed with rich."""
    style = {"ok": "bold green", "slower": "bold red", "inconclusive": "bold yellow"}.get(outcome, "bold magenta")
    reason = f"; {cell.reason}" if cell.reason else ""
    limit = f"limit ×{number(1 / (1 + max_slowdown))}"
    what = f"  {metric_text(cell.metric)} at {level_text(cell.level)}: {effect_text(cell)}, {limit}{reason}"
    return Text.assemble((GATE_WORDS[outcome], style), what)


def gate_markdown(comparison: Comparison, outcomes: Sequence[tuple[Cell, str]], max_slowdown: float) -> str:
    """The gate's answer for a job summary or a comment."""
    rows = []
    for cell, outcome in outcomes:
        row = [f"**{GATE_WORDS[outcome]}**", _md(metric_text(cell.metric)), _md(level_text(cell.level))]
        rows.append([*row, effect_text(cell), f"{cell.num_blocks}/{cell.num_planned}", _md(cell.reason)])
    limit = f"Fails below ×{number(1 / (1 + max_slowdown))} (at most {100 * max_slowdown:g} % slower)."
    table = _md_table(["gate", "metric", "level", "ratio, > 1 is better", "blocks", "why"], rows)
    return f"### Gate: {_md(label_of(comparison))}\n\n{limit}\n\n{table}\n"
