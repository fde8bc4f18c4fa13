"""`python -m analysis`: compare, report, gate, list, import. Exit codes as documented in README.md."""

import json
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from analysis import compare as comparing
from analysis import contrasts, load
from analysis.contrasts import IncomparableError
from analysis.figures import FIGURES
from analysis.load import LoadError

EXIT_SLOWER, EXIT_USAGE, EXIT_INCONCLUSIVE, EXIT_INCOMPARABLE, EXIT_BUG = 1, 2, 3, 4, 70

app = typer.Typer(
    help="Did it get faster, by how much, and can I trust it? Reads run directories of outputs/.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
# Rich takes a pipe to be 80 columns wide and folds what is then cut by grep.
console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)

_AN_ARM = "outputs/RUN:ARM, or outputs/RUN if it has one arm"
Baseline = Annotated[str, typer.Argument(metavar="BASELINE", help=_AN_ARM)]
Candidate = Annotated[str, typer.Argument(metavar="CANDIDATE", help=_AN_ARM)]
Add = Annotated[
    list[Path], typer.Option("--add", metavar="RUN", help="a further run of the same arms, whose blocks are added")
]
Floor = Annotated[
    Path | None, typer.Option(metavar="RUN", help="an A/A run; a difference below what it can detect is no win")
]
AllowDiff = Annotated[
    str, typer.Option(metavar="KEY,...", help="compare although the arms differ in these keys, and say so")
]
Format = StrEnum("Format", ["table", "json", "markdown"])
Kind = StrEnum("Kind", {"locust": "locust", "vllm": "vllm", "streaming_csv": "streaming-csv"})


def _below_one(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"{value:g} is not a fraction from 0 to 1; 3 % is 0.03")
    return value


@app.command()
def compare(
    baseline: Baseline,
    candidate: Candidate,
    margin: Annotated[
        float | None, typer.Option(callback=_below_one, help="EQUIVALENT within this, 0.05 = 5 % (as declared)")
    ] = None,
    floor: Floor = None,
    add: Add = [],  # noqa: B006 (typer's way)
    allow_diff: AllowDiff = "",
    format: Format = Format.table,
) -> None:
    """Compare two arms: ratio, interval and verdict at each level. Exit 4: invalid or incomparable."""
    from analysis import formats, report

    pair, family = _pair(baseline, candidate, add)
    wanted = pair.declaration.margin if margin is None else margin
    [found] = comparing.compare_pairs([pair], family, wanted, _floor(floor), _keys(allow_diff), record=True)
    if format is Format.json:
        print(json.dumps(formats.cells_json(found), indent=2, allow_nan=False))
    elif format is Format.markdown:
        run = pair.runs[0]
        print(formats.render_markdown([found], run.record, report.points_of(pair.runs), report.trial_details(run)))
    else:
        console.print(formats.render_terminal(found))
    if found.primary is None or found.primary.num_blocks == 0:
        why = found.primary.reason if found.primary else "no level in common"
        raise IncomparableError(f"nothing VALID to compare at the primary level: {why}")


@app.command("report")
def make_report(
    directory: Annotated[Path, typer.Argument(metavar="RUN")],
    floor: Floor = None,
    add: Add = [],  # noqa: B006
    allow_diff: AllowDiff = "",
) -> None:
    """Write comparison.csv, plots/ and report.html of a run with two or more arms."""
    from analysis import formats, report

    run = load.load_run(directory)
    more = [load.load_run(path) for path in add]
    for comparison in report.write(run, _floor(floor), more, _keys(allow_diff)):
        console.print(formats.render_terminal(comparison))
    console.print(str(run.paths.report_html), soft_wrap=True)


@app.command()
def gate(
    baseline: Baseline,
    candidate: Candidate,
    max_slowdown: Annotated[
        float, typer.Option(callback=_below_one, help="0.03: fail if the candidate is surely over 3 % slower")
    ],
    metric: Annotated[
        list[str],
        typer.Option(help="at the primary level; by default the run's own figure; several share the error of 5 %"),
    ] = [],  # noqa: B006
    add: Add = [],  # noqa: B006
    allow_diff: AllowDiff = "",
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="write the outcome as JUnit XML")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="append it as Markdown")] = None,
) -> None:
    """Exit 1: the whole interval is worse than MAX_SLOWDOWN; 0: it excludes it; 3: inconclusive; 4: invalid."""
    from analysis import formats

    if unknown := sorted(set(metric) - set(FIGURES)):
        raise typer.BadParameter(f"{', '.join(unknown)}; there is {', '.join(FIGURES)}", param_hint="--metric")
    try:
        pair, family = _pair(baseline, candidate, add)
        comparison, outcomes = comparing.gate(pair, family, max_slowdown, metric, _keys(allow_diff))
    except (IncomparableError, LoadError) as error:
        _write(junit, formats.junit_refusal(f"{candidate} against {baseline}", str(error)))
        _append(markdown, f"### Gate: INVALID\n\n{formats.escaped(str(error))}\n")
        raise
    for cell, outcome in outcomes:
        console.print(formats.gate_line(cell, outcome, max_slowdown), soft_wrap=True)
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    _write(junit, formats.junit_xml(comparison, outcomes))
    _append(markdown, formats.gate_markdown(comparison, outcomes, max_slowdown))
    codes = {"slower": EXIT_SLOWER, "invalid": EXIT_INCOMPARABLE, "inconclusive": EXIT_INCONCLUSIVE, "ok": 0}
    found = {outcome for _, outcome in outcomes}
    raise typer.Exit(next(code for outcome, code in codes.items() if outcome in found))


@app.command("list")
def list_runs(
    outputs: Annotated[Path, typer.Argument(metavar="[OUTPUTS]")] = Path("outputs"),
    last: Annotated[int, typer.Option(min=0, help="only the newest; 0 = all")] = 20,
) -> None:
    """Runs, oldest first: when, what, and how it ended."""
    if not outputs.is_dir():
        raise LoadError(f"{outputs} is not a directory")
    runs = load.find_runs(outputs)
    rows, broken = [], []
    for directory in runs[-last:] if last else runs:
        try:
            rows.append(load.overview(directory))
        except LoadError as error:
            broken.append(str(error))
    # Not a rich table: it would fold paths, which are there to be copied.
    print(pd.DataFrame(rows).to_string(index=False, justify="left") if rows else f"no runs in {outputs}")
    if last and len(runs) > last:
        console.print(f"{len(runs) - last} older runs are not shown (--last 0 shows all)")
    for why in broken:
        print(f"not listed: {why}", file=sys.stderr)


@app.command("import")
def import_results(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a file, or a directory with a file a level")],
    kind: Annotated[Kind, typer.Option(help="what wrote it")],
    workload: Annotated[str, typer.Option(help="what was served; vllm = the standalone baseline")],
    profile: Annotated[str, typer.Option(help="with which flags: names the arm")],
    concurrency: Annotated[int | None, typer.Option(min=1, help="where neither content nor file name tells")] = None,
    num_replicas: Annotated[int | None, typer.Option(min=1)] = None,
    outputs: Annotated[Path, typer.Option()] = Path("outputs"),
) -> None:
    """Published or older results as a run directory; what they cannot support is missing, and said."""
    from analysis import published

    try:
        paths = published.import_source(source, kind.value, workload, profile, outputs, concurrency, num_replicas)
    except ValueError as error:  # the source cannot be read as what it is said to be: nothing was written
        raise typer.BadParameter(str(error)) from None
    run = load.load_run(paths.root)
    console.print(f"{len(run.points)} points, arms {', '.join(run.arms)}")
    for code in load.codes(run.points.notes):
        if code in published.NOTES:
            console.print(f"  {code}: {published.NOTES[code]}", soft_wrap=True)
    console.print(str(paths.root), soft_wrap=True)


def _write(path: Path | None, text: str) -> None:
    if path:
        path.write_text(text, encoding="utf-8")


def _append(path: Path | None, text: str) -> None:
    if path:
        with path.open("a", encoding="utf-8") as file:  # as GITHUB_STEP_SUMMARY wants it
            file.write(text)


def _pair(baseline: str, candidate: str, add: list[Path]) -> tuple[contrasts.Pair, list[contrasts.Pair]]:
    more = [load.load_run(path) for path in add]
    return contrasts.pair_of(load.select(baseline), load.select(candidate), more)


def _floor(directory: Path | None) -> load.RunData | None:
    return load.load_run(directory) if directory else None


def _keys(text: str) -> list[str]:
    return [key.strip() for key in text.split(",") if key.strip()]


def main() -> int:
    """Exit code: as the command says, 2 for a command line that makes no sense, 4 for a refusal."""
    try:
        app(standalone_mode=True)
    except (IncomparableError, LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INCOMPARABLE
    except OSError as error:  # a file asked for that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Exception:  # a bug of ours must not look like "slower", which is 1
        traceback.print_exc()
        return EXIT_BUG
    return 0


if __name__ == "__main__":
    sys.exit(main())
