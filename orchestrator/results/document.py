"""The tables of outputs/README.md, made of the types in `records` and the rules in `validity`.

    python -m orchestrator.results.document outputs/README.md

replaces the table under each heading of `TABLES`; what stands around them is written by hand.
"""

import dataclasses
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from orchestrator.observe.host import CpuSeconds, HostFacts
from orchestrator.results.records import (
    Actor,
    ClientFacts,
    ComparisonRow,
    Declaration,
    Effective,
    Failure,
    LookRecord,
    PlannedArm,
    PlanRecord,
    PrimaryCell,
    Resume,
    RunRecord,
    Sample,
    ServerFacts,
    Span,
    SummaryRow,
    TrialRecord,
    WholeRun,
    keys,
)
from orchestrator.results.validity import RULES

TABLES: dict[str, type] = {
    "samples.parquet": Sample,
    "summary.parquet, summary.csv": SummaryRow,
    "comparison.csv": ComparisonRow,
    "run.json": RunRecord,
    "plan in run.json": PlanRecord,
    "arms in plan": PlannedArm,
    "compare in run.json": Declaration,
    "primary_cells in run.json": PrimaryCell,
    "resumed in run.json": Resume,
    "timeline in run.json": Span,
    "trial.json": TrialRecord,
    "client in trial.json": ClientFacts,
    "whole_run in trial.json": WholeRun,
    "server in trial.json": ServerFacts,
    "host in observed": HostFacts,
    "cpu_s in host": CpuSeconds,
    "failure.json": Failure,
    "effective.json": Effective,
    "actors in effective.json": Actor,
    "looks.jsonl": LookRecord,
}
_COLUMNS = (Sample, SummaryRow, ComparisonRow)  # the tables; all others are objects of JSON
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def with_tables(text: str) -> str:
    """The page with every table as the types have it. Raises ValueError for a heading without a table."""
    tables = {heading: _of(record) for heading, record in TABLES.items()}
    rules = [
        (f"`{rule.code}`", rule.kind, f"`{rule.limit}`" if rule.limit else "fixed", rule.meaning) for rule in RULES
    ]
    tables["Invalid reasons"] = _table(("code", "kind", "limit", "meaning"), rules)
    for heading, table in tables.items():
        pattern = rf"^#+ {re.escape(heading)}\n(?:(?!#|\|).*\n)*"
        found = list(re.finditer(rf"{pattern}((?:\|.*\n)+)", text, re.MULTILINE))
        if len(found) != 1:
            raise ValueError(f"no table under {heading!r}, or several such headings")
        text = text[: found[0].start(1)] + table + text[found[0].end(1) :]
    return text


def _of(record: type) -> str:
    is_table = record in _COLUMNS
    rows = [
        (f"`{key.name}`", key.arrow_name if is_table else _type_text(key.type), key.meaning)
        for key in keys(record).values()
    ]
    return _table(("column" if is_table else "key", "type", "meaning"), rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(header)}", *lines[1:]]) + "\n"


def _type_text(kind: Any) -> str:
    """The name that JSON has for this type."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if member is type(None) else _type_text(member) for member in get_args(kind))
    if get_origin(kind) is Sequence:
        first, *rest = _type_text(get_args(kind)[0]).split(" ", 1)
        return " ".join(["list of", f"{first}s", *rest])
    if get_origin(kind) is Mapping or dataclasses.is_dataclass(kind):
        return "object"
    return _PLAIN[kind]


def main() -> None:
    """Rewrite the files given."""
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
