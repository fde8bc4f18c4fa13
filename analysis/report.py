"""What does a person need to read to believe, or doubt, a verdict?

Turns `Comparison`s into a self-contained HTML page, Markdown for a pull request, a terminal table, JSON and JUnit XML.
It computes no statistics: every figure comes from `analysis/compare.py` or from the records of the run. A figure that
is not there is shown as "–" with its reason, never as 0. What came from outside (names, errors, flags) is escaped for
the format it goes into.
"""

import base64
import json
import math
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from analysis import compare, load, published
from analysis.compare import Cell, Comparison
from analysis.differences import Difference
from analysis.load import Run
from orchestrator.results import INVALID_REASONS, read_json

MISSING = "–"
# A sign beside the word, so that neither colour nor a small screen hides which it is.
SIGNS = {"FASTER": "▲", "SLOWER": "▼", "EQUIVALENT": "=", "INCONCLUSIVE": "?"}
STYLES = {"FASTER": "bold green", "SLOWER": "bold red", "EQUIVALENT": "bold blue", "INCONCLUSIVE": "bold yellow"}
UNITS = {"rps": "req/s", "ms": "ms", "tok_per_s": "tok/s", "ratio": ""}
NOTES = published.NOTES | {
    "colocated_client": "The load client shared the machine with the service: they compete for cores. Ratios between "
    "arms hold better than absolute figures.",
    "coordinated_omission": "Closed loop: each client waits for its reply before it sends again. While the service "
    "stalls nobody sends, so tail latencies are lower than arrivals independent of replies would see.",
}
WHERE = {
    "declared": "Declared in the configs",
    "effective": "Read back from the live services",
    "consequence": "Consequences: constants that Ray computed from the flags",
}
# What the gate made of a cell -> how it says so, and the element that CI shows for it.
GATE_WORDS = {"ok": "PASS", "slower": "FAIL: SLOWER", "inconclusive": "INCONCLUSIVE", "invalid": "INVALID"}
JUNIT_ELEMENTS = {"ok": None, "slower": "failure", "inconclusive": "skipped", "invalid": "error"}


# ---- Figures and names as text ----


def _missing(value: Any) -> bool:
    return value is None or value is pd.NaT or (isinstance(value, float) and not math.isfinite(value))


def number(value: Any, digits: int = 3) -> str:
    """Three significant digits, thousands separated: 3.94, 0.0121, 12,300."""
    if _missing(value):
        return MISSING
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def ratio_texts(cell: Cell) -> tuple[str, str]:
    """("×3.94", "3.71 to 4.18"), of equally many decimals; the interval is "" where there is none.

    A bound never rounds to 1.00 when it is not 1: FASTER with "1.00 to 1.08" would look like a contradiction.
    """
    if _missing(cell.ratio):
        return MISSING, ""
    low, high = cell.ci_low_ratio, cell.ci_high_ratio
    if cell.ratio is None or low is None or high is None or _missing(low) or _missing(high):
        return f"×{number(cell.ratio)}", ""
    if max(high, cell.ratio) >= 100 or min(low, cell.ratio) < 0.1:
        return f"×{number(cell.ratio)}", f"{number(low)} to {number(high)}"
    decimals = 1 if max(high, cell.ratio) >= 10 else 2
    while decimals < 4 and any(bound != 1 and round(bound, decimals) == 1 for bound in (low, high)):
        decimals += 1
    return f"×{cell.ratio:.{decimals}f}", f"{low:.{decimals}f} to {high:.{decimals}f}"


def confidence_text(confidence: float | None) -> str:
    """ "95 %"; never rounded up to 100 %."""
    if confidence is None or _missing(confidence):
        return ""
    return f"{min(100 * confidence, 99.99):.4g} %"


def effect_text(cell: Cell) -> str:
    """×3.94 (95 % interval 3.71 to 4.18)"""
    ratio, interval = ratio_texts(cell)
    return f"{ratio} ({confidence_text(cell.confidence)} interval {interval})" if interval else ratio


def metric_text(metric: str) -> str:
    """latency_p99_ms -> "latency p99 (ms)"; an unknown unit stays part of the name."""
    for suffix, unit in UNITS.items():
        if metric.endswith(f"_{suffix}"):
            name = metric.removesuffix(f"_{suffix}").replace("p999", "p99.9").replace("_", " ")
            name = name.replace("ttft", "TTFT").replace("tpot", "TPOT")
            return f"{name} ({unit})" if unit else name
    return metric.replace("_", " ")


def level_text(level: str, short: bool = False) -> str:
    """c0064 -> "64 clients" ("c=64" if short); r000250.00 -> "250 req/s" ("250/s")."""
    match = re.fullmatch(r"([cr])(\d+(?:\.\d+)?)", level)
    if not match:
        return level
    amount = f"{float(match[2]):,g}"
    if match[1] == "r":
        return f"{amount}/s" if short else f"{amount} req/s"
    return f"c={amount}" if short else f"{amount} client{'' if amount == '1' else 's'}"


def _verdict(comparison: Comparison) -> str:
    return (comparison.primary.verdict if comparison.primary else None) or "NO VERDICT"


def _label(comparison: Comparison) -> str:
    axes = f" ({comparison.axes})" if comparison.axes else ""
    return f"{comparison.candidate} against {comparison.baseline}{axes}"


def _family(comparison: Comparison, *families: str) -> list[Cell]:
    return [cell for family in families for cell in comparison.cells if cell.family == family]


def _time(text: Any) -> str:
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S %Z}"
    except (TypeError, ValueError):  # null while running; whatever an importer was given
        return str(text or MISSING)


def judged(comparison: Comparison) -> list[str]:
    """How the verdict came about, as short facts."""
    cell, margin = comparison.primary, comparison.margin
    if cell is None:
        return ["No primary cell: nothing was fixed before the run to be judged on"]
    floor = "no noise floor given" if _missing(cell.floor_ratio) else f"noise floor ×{number(cell.floor_ratio)}"
    return [
        f"Judged on {metric_text(cell.metric)} at {level_text(cell.level)}",
        f"{cell.num_blocks} of {cell.num_planned} blocks usable, each with fresh deployments",
        f"equivalent means within ×{number(1 / (1 + margin))} to ×{number(1 + margin)} (margin {100 * margin:g} %)",
        f"look {comparison.look}",
        f"{confidence_text(cell.confidence)} confidence" if not _missing(cell.confidence) else "no interval",
        floor,
    ]


# ---- What may be doubted ----


def findings(points: pd.DataFrame, details: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Counts, what went wrong at which arm and level, and caveats. `details` as in `render_html`."""
    if points.empty:
        return {"counts": "No trial was planned.", "entries": [], "notes": []}
    records = {(record.get("run_dir"), record["arm"], record["trial_id"]): record for record in details}
    several = "run_dir" in points and points["run_dir"].nunique() > 1
    # `valid` may hold None or NaN: only a real False is INVALID, and only in a complete trial.
    complete = points["state"] == "complete"
    invalid = complete & (points["valid"] == False)  # noqa: E712
    bad = points[invalid | (points["state"] == "failed")]
    entries = []
    for (arm, level), group in bad.groupby(["arm", "level"], sort=False):
        planned = points[(points["arm"] == arm) & (points["level"] == level)]
        items = [item for row in load.records(group) for item in _problems(row, records, several)]
        num_valid = int((planned["valid"] == True).sum())  # noqa: E712
        title = f"{arm}, {level_text(str(level))}"
        entries.append({"title": title, "count": f"{num_valid} of {len(planned)} blocks VALID", "items": items})
    num_failed = int((points["state"] == "failed").sum())
    others = [
        f"{count} {what}"
        for count, what in (
            (int(invalid.sum()), "INVALID"),
            (num_failed, "failed"),
            (int(len(points) - complete.sum() - num_failed), "not run"),
        )
        if count
    ]
    num_valid = int((points["valid"] == True).sum())  # noqa: E712
    counts = f"{num_valid} of {len(points)} planned trials are VALID{''.join(f', {each}' for each in others)}."
    if invalid.any():
        counts += " An INVALID point never enters a ratio."
    return {"counts": counts, "entries": entries, "notes": _caveats(points[complete])}


def _problems(row: Mapping[str, Any], records: Mapping[Any, Mapping[str, Any]], several: bool) -> list[dict[str, str]]:
    record = records.get((row.get("run_dir"), row["arm"], row["trial_id"]), {})
    block = f"block {row['repeat'] + 1}{' of ' + row['run_id'] if several else ''}"
    if row["state"] == "failed":
        log = f" (log: {record['log']})" if record.get("log") else ""
        what = {"service": "the service never came up", "trial": "the measurement failed"}.get(record.get("stage", ""))
        text = str(record.get("error", "see failure.json")).strip()
        return [{"block": block, "code": f"FAILED ({what})" if what else "FAILED", "text": text + log}]
    sentences = record.get("invalid_details", {})
    codes = [code for code in str(row["invalid_reasons"] or "").split(";") if code]
    return [
        {"block": block, "code": f"INVALID {code}", "text": sentences.get(code, INVALID_REASONS.get(code, ""))}
        for code in codes
    ] or [{"block": block, "code": "INVALID", "text": "no reason was recorded"}]


def _caveats(complete: pd.DataFrame) -> list[str]:
    """Notes in words, with how many of the complete trials each is about."""
    found: dict[str, int] = {}
    for row in load.records(complete):
        codes = {code for code in str(row["notes"] if not _missing(row["notes"]) else "").split(";") if code}
        for code in sorted(codes | ({"coordinated_omission"} if row["load_mode"] == "closed" else set())):
            found[code] = found.get(code, 0) + 1
    texts = []
    for code, count in found.items():
        about = "" if count == len(complete) else f" (in {count} of {len(complete)} complete trials)"
        kind, _, rule = code.partition(":")
        if kind == "unchecked":
            text = f"Not checked, which is not passed: {rule} ({INVALID_REASONS.get(rule, 'unknown rule')})."
        else:
            text = NOTES.get(code, code.replace("_", " "))
            text = f"{text[0].upper()}{text[1:].removesuffix('.')}."
        texts.append(text + about)
    return texts


def _differences(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons of one run mostly differ in the same flags: each set of differences is shown once."""
    groups: dict[tuple[Difference, ...], list[str]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.differences, []).append(_label(comparison))
    return [
        {
            "labels": labels,
            "num_unallowed": sum(not each.allowed for each in differences),
            "parts": [
                (title, [each for each in differences if each.where == where])
                for where, title in WHERE.items()
                if any(each.where == where for each in differences)
            ],
        }
        for differences, labels in groups.items()
    ]


def _provenance(
    comparisons: Sequence[Comparison], record: Mapping[str, Any], services: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str]]:
    provenance = record.get("provenance") or {}
    git, host = provenance.get("git") or {}, provenance.get("host") or {}
    dirty = (
        "" if git.get("dirty") is False else " with uncommitted changes" if git.get("dirty") else " (changes unknown)"
    )
    runs = dict.fromkeys(run for each in comparisons for run in (each.baseline_run, each.candidate_run))
    rows = [
        ("Run", record.get("run_id")),
        ("Compared directories", ", ".join(runs) if len(runs) > 1 else None),
        ("Status", record.get("status")),
        ("Started", _time(record.get("started_at"))),
        ("Finished", _time(record.get("finished_at"))),
        ("Command", shlex.join(["python", "-m", "orchestrator", *map(str, record.get("command") or [])])),
        ("Seed", record.get("seed")),
        ("Orchestrator commit", f"{git['commit']}{dirty}" if git.get("commit") else None),
        ("Client host", _versions(host)),
        ("Client packages", _versions({"python": provenance.get("python"), **(provenance.get("packages") or {})})),
    ]
    for arm, service in services.items():
        rows.append((f"Service of {arm}", _versions(service.get("versions") or {})))
        rows.append((f"Hardware of {arm}", json.dumps(service["hardware"]) if service.get("hardware") else None))
    rows += [("Error outside any trial", error) for error in record.get("errors") or []]
    return [
        (label, MISSING if value in (None, "") else str(value)) for label, value in rows if value or label == "Seed"
    ]


def _versions(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value not in (None, []))


# ---- HTML ----


def _bar(cell: Cell, span: float, margin: float) -> dict[str, float] | None:
    """Positions in per cent on a log axis whose middle is a ratio of 1; what lies beyond `span` is cut at the edge."""
    if _missing(cell.ratio) or _missing(cell.ci_low_ratio) or _missing(cell.ci_high_ratio):
        return None
    ratios = {"low": cell.ci_low_ratio, "point": cell.ratio, "high": cell.ci_high_ratio}
    ratios |= {"margin_low": 1 / (1 + margin), "margin_high": 1 + margin}
    return {
        name: round(50 + 48 * max(-1.0, min(1.0, math.log(max(value or 0, 1e-9)) / span)), 2)
        for name, value in ratios.items()
    }


def _span(cells: Iterable[Cell], margin: float) -> float:
    """Half the axis: holds every estimate, but not every bound, for one of two blocks would flatten all others."""
    effects = [abs(math.log(cell.ratio)) for cell in cells if cell.ratio is not None and not _missing(cell.ratio)]
    return max([2.5 * math.log(1 + margin), *(1.3 * effect for effect in effects)])


def _data_uri(png: bytes, svg: bytes | str | None) -> str:
    """SVG where there is one: it stays sharp on paper and when zoomed. As an image it cannot run anything."""
    if svg:
        content = svg.encode() if isinstance(svg, str) else svg
        return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _breakable(text: str) -> Markup:
    """A long key may break after _ . / and, not in the middle of a word; copied, it is still the key."""
    return Markup("<wbr>").join(re.split(r"(?<=[_./,=])", text))


def render_html(
    comparisons: Sequence[Comparison],
    record: Mapping[str, Any],
    points: pd.DataFrame,
    figures: Mapping[str, tuple[bytes, str, bytes | str | None]],
    details: Sequence[Mapping[str, Any]] = (),
    services: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """One HTML file that needs nothing else: no script, no request.

    `record`: run.json. `points`: as in `load.Run`. `figures`: name -> (PNG, caption, SVG or None). `details`:
    trial.json of the INVALID trials and failure.json of the failed ones, as read. `services`: arm -> effective.json of
    one of its services.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "metric": metric_text, "level": level_text, "breakable": _breakable}
    environment.filters |= {"label": _label, "verdict": _verdict, "judged": judged, "confidence": confidence_text}
    environment.filters |= {"ratio_texts": ratio_texts, "family": _family, "bar": _bar}
    verdicts = [_verdict(each) for each in comparisons]
    return environment.get_template("report.html.jinja").render(
        comparisons=comparisons,
        tally=", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)),
        signs=SIGNS,
        span=_span,
        # One axis for all verdicts, so that their bars can be compared by eye.
        verdicts_span=max((_span([each.primary], each.margin) for each in comparisons if each.primary), default=1.0),
        figures=[
            {"id": re.sub(r"[^A-Za-z0-9_-]+", "-", name), "caption": caption, "uri": _data_uri(png, svg)}
            for name, (png, caption, svg) in figures.items()
        ],
        differences=_differences(comparisons),
        findings=findings(points, details),
        provenance=_provenance(comparisons, record, services or {}),
        run_id=str(record.get("run_id") or "run"),
        status=record.get("status"),
    )


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
        verdict = _verdict(each)
        parts.append(f"### {SIGNS.get(verdict, '?')} {verdict}: {_md(_label(each))}\n\n{_md(each.summary)}")
        parts.append(f"{_md('; '.join(judged(each)))}.")
        parts += ["\n".join(f"- ⚠ {_md(warning)}" for warning in each.warnings)] if each.warnings else []
        parts.append(_md_cells(_family(each, "primary", "secondary"), verdicts=True))
        if others := _family(each, "descriptive"):
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
    for group in _differences(comparisons):
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
    facts = dict(_provenance(comparisons, record, {}))
    packages = ((record.get("provenance") or {}).get("packages")) or {}
    shown = [("run", facts.get("Run")), ("Ray", packages.get("ray")), ("commit", facts.get("Orchestrator commit"))]
    shown += [("seed", facts.get("Seed")), ("host", facts.get("Client host"))]
    parts.append(f"<sub>{' · '.join(f'{name} {_md(value)}' for name, value in shown if value)}</sub>")
    return "\n\n".join(parts) + "\n"


# ---- Terminal, JSON, JUnit ----


@dataclass(frozen=True)
class _ForTerminal:
    """Rich asks it to draw itself, and says how wide: below 76 columns the table is folded by us.

    Rich would fold or cut where it likes, and half an interval on a line reads like a whole one.
    """

    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        comparison, narrow = self.comparison, options.max_width < 76
        verdict = _verdict(comparison)
        sign = (f"{SIGNS.get(verdict, '?')} {verdict}", STYLES.get(verdict, "bold"))
        yield Text.assemble(sign, "  ", comparison.summary)
        yield Text("; ".join(judged(comparison)) + ".\n", "dim")
        yield _terminal_table(comparison, narrow)
        for warning in comparison.warnings:
            yield Text(f"warning: {warning}", "yellow")
        if others := len(_family(comparison, "descriptive")):
            yield Text(f"{others} more cells are descriptive: no verdict, see --format json or the report.", "dim")


def render_terminal(comparison: Comparison) -> _ForTerminal:
    """Sentence and judged cells, to be printed with rich; fits 60 columns and more."""
    return _ForTerminal(comparison)


def _terminal_table(comparison: Comparison, narrow: bool) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), title=escape(_label(comparison)), title_justify="left"
    )
    if not narrow:
        table.add_column("level", no_wrap=True)
    table.add_column("metric", overflow="fold")
    for heading in ("baseline", "candidate", "ratio", "verdict"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "verdict" else "right")
    for cell in _family(comparison, "primary", "secondary"):
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
    return None if _missing(value) else value


def cells_json(comparison: Comparison) -> dict[str, Any]:
    """`{"summary": ..., "verdict": ..., "baseline": ..., "cells": [...]}`, fit for `json.dumps(allow_nan=False)`."""
    everything = asdict(comparison)
    everything["primary"] = (
        None if comparison.primary is None else f"{comparison.primary.metric}@{comparison.primary.level}"
    )
    return _jsonable({"summary": everything.pop("summary"), "verdict": _verdict(comparison), **everything})


def junit_xml(comparison: Comparison, outcomes: Sequence[tuple[Cell, str]]) -> str:
    """The gate's answer for CI: one testcase a judged cell.

    `outcomes`: cells with "ok", "slower" (a failure), "inconclusive" (skipped) or "invalid" (an error).
    """
    suite = ET.Element("testsuite", name=_xml(f"serve-orchestrator: {_label(comparison)}"), tests=str(len(outcomes)))
    for kind, counter in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(counter, str(sum(JUNIT_ELEMENTS[outcome] == kind for _, outcome in outcomes)))
    for cell, outcome in outcomes:
        name = f"{metric_text(cell.metric)} at {level_text(cell.level)}"
        case = ET.SubElement(suite, "testcase", classname=_xml(_label(comparison)), name=_xml(name), time="0")
        text = _xml(f"{effect_text(cell)}. {cell.reason}".strip())
        if element := JUNIT_ELEMENTS[outcome]:
            ET.SubElement(case, element, message=text, type=outcome).text = text
        else:
            ET.SubElement(case, "system-out").text = text
    root = ET.Element("testsuites", {key: suite.get(key, "0") for key in ("tests", "failures", "errors", "skipped")})
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


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
    return f"### Gate: {_md(_label(comparison))}\n\n{limit}\n\n{table}\n"


# ---- A whole run ----


def points_of(runs: Iterable[Run]) -> pd.DataFrame:
    return pd.concat([run.points for run in runs], ignore_index=True)


def trial_details(run: Run) -> list[dict[str, Any]]:
    """trial.json of the INVALID trials and failure.json of the failed ones, each with its `run_dir`."""
    found = []
    for row in load.records(run.points):
        where = (row["arm"], row["level"], row["repeat"])
        if row["state"] == "complete" and row["valid"] is False:
            found.append(dict(load.trial(run, row)))
        elif row["state"] == "failed" and (path := run.paths.failure_json(*where)).exists():
            found.append(dict(read_json(path)))
    return [{**each, "run_dir": str(run.paths.root)} for each in found]


def write(
    run: Run, floor: Run | None = None, more: Sequence[Run] = (), allow_diff: Sequence[str] = ()
) -> list[Comparison]:
    """Compare the arms of a run; write comparison.csv, plots/ and, last, report.html.

    Raises IncomparableError, LoadError.
    """
    from analysis import frames, plots  # matplotlib takes a second, which a gate need not wait for

    comparisons = compare.compare_run(run, floor, more, allow_diff)
    cells, requests = compare.cells_frame(comparisons), frames.all_requests(run)
    workloads = dict(zip(run.points["arm"], run.points["workload"], strict=True))
    drawn = plots.all_figures(
        frames.arm_points(run, requests),
        cells,
        frames.gain_by_slo(run),
        frames.distribution(requests),
        load.over_time(requests),
        frames.peak(comparisons, workloads),
        margin=comparisons[0].margin if comparisons else 0.05,
    )
    plots.save(drawn, run.paths.plots_dir)
    figures = {}
    for name, figure in drawn.items():
        png, svg = (run.paths.plots_dir / f"{name}.{kind}" for kind in ("png", "svg"))
        # The title is drawn into the picture, so it is what the picture is called for who cannot see it.
        figures[name] = (png.read_bytes(), " ".join(figure.texts[0].get_text().split()), svg.read_bytes())
    services = {arm: service for arm in run.arms if (service := load.effective(run, arm, 0))}
    runs = [run, *more]
    details = [each for one in runs for each in trial_details(one)]
    html = render_html(comparisons, run.record, points_of(runs), figures, details, services)
    cells.to_csv(run.paths.comparison_csv, index=False)
    partial = run.paths.report_html.with_suffix(".html.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(run.paths.report_html)
    return comparisons
