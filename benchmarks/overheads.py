"""What does the orchestrator itself cost? Run as `python -m benchmarks.overheads [outputs/<run>]`.

Prints ratios measured in one run: planning 1,000 trials against 250; and, of a finished run, the share of the wall
time that was not measurement, and where it went. What composing costs is measured by `composition.py`.
"""

import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import hydra

from orchestrator.arms import Job
from orchestrator.config import parse, register
from orchestrator.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 7


def planning() -> None:
    """Arms that differ in their flags, 10 levels, 5 repeats: 50 trials an arm."""
    os.environ.setdefault("SERVE_ORCHESTRATOR_SCRATCH", "unused")
    register()
    jobs, levels = [], f"sweep.concurrency={list(range(1, 11))}"
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for number in range(20):
            composed = hydra.compose("config", [f'+profile.env.NUMBER="{number}"', levels])
            jobs.append(Job(parse(composed), {"profile.env.NUMBER": str(number)}, "baseline"))
    median_s = {}
    for num_arms in (5, 20):
        rounds_s = []
        for _ in range(ROUNDS):
            start_s = time.perf_counter()
            num_trials = len(make_plan(jobs[:num_arms], seed=0).trials)
            rounds_s.append(time.perf_counter() - start_s)
        median_s[num_trials] = statistics.median(rounds_s)
    (few, few_s), (many, many_s) = median_s.items()
    print(
        f"planning: {many} trials {1e3 * many_s:.0f} ms, {few} trials {1e3 * few_s:.0f} ms; "
        f"a trial {many_s / few_s * few / many:.2f}x (linear = 1)"
    )


def wall_time(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    if record["status"] != "complete" or record["resumed"]:
        sys.exit(f"{run}: needs a run that completed in one go, found {record['status']}, resumed {record['resumed']}")
    parts = {"trial": "client start, drain, samples and metrics", "bring_up": "bring-up", "cool_down": "cool-down"}
    spent = Counter[str]()
    for entry in record["timeline"]:
        duration_s = entry["end_s"] - entry["start_s"]
        if entry["what"] == "trial":
            arm, _, trial_id = entry["name"].rpartition("/")
            trial = json.loads((run / arm / "trials" / trial_id / "trial.json").read_text())
            before_s = trial["ramp_up_s"] + trial["warmup_s"]
            spent.update({"measurement windows": trial["duration_s"], "ramp-up and warm-up": before_s})
            duration_s -= trial["duration_s"] + before_s
        if entry["what"] in parts:
            spent[parts[entry["what"]]] += duration_s
    total_s = max(entry["end_s"] for entry in record["timeline"])
    spent["tear-down and the rest"] = total_s - spent.total()
    print(f"wall time of {run.name}: {total_s:.0f} s, {1 - spent['measurement windows'] / total_s:.0%} not measurement")
    for what, duration_s in spent.most_common():
        print(f"  {duration_s / total_s:6.1%}  {what}")


if __name__ == "__main__":
    planning()
    if len(sys.argv) > 1:
        wall_time(Path(sys.argv[1]))
