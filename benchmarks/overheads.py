"""What does the orchestrator itself cost? Run as `python -m benchmarks.overheads [outputs/<run>]`.

Prints ratios measured in one run: `--help` against the `--help` of a bare Hydra app; planning 1,000 trials
against 250; and, of a finished run, the share of the wall time that was not measurement, and where it went.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hydra

from orchestrator.config import parse, register
from orchestrator.plan import Job, make_plan

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 7
BARE_APP = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config): ...

main()
"""


def seconds(command: list[str], cwd: Path) -> float:
    start_s = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)
    return time.perf_counter() - start_s


def help_ratio() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder)
        (bare / "app.py").write_text(BARE_APP)
        (bare / "conf").mkdir()
        (bare / "conf" / "config.yaml").write_text("a: 1\n")
        ours_s, bare_s = [], []
        for _ in range(ROUNDS):
            bare_s.append(seconds([sys.executable, "app.py", "--help"], bare))
            ours_s.append(seconds([sys.executable, "-m", "orchestrator", "--help"], ROOT))
    ours, base = statistics.median(ours_s), statistics.median(bare_s)
    print(f"--help: {ours:.2f} s, bare Hydra app {base:.2f} s: {ours / base:.2f}x (target <= 2x)")


def planning() -> None:
    """Arms that differ in their flags, 10 levels, 5 repeats: 50 trials an arm."""
    os.environ.setdefault("SERVE_ORCHESTRATOR_SCRATCH", "unused")
    register()
    per_trial_s = {}
    for num_arms in (5, 20):
        jobs = []
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            for number in range(num_arms):
                flag = f'+profile.env.NUMBER="{number}"'
                composed = hydra.compose("config", [flag, f"sweep.concurrency={list(range(1, 11))}"])
                jobs.append(Job(parse(composed), {"profile.env.NUMBER": str(number)}, "baseline"))
        rounds = []
        for _ in range(ROUNDS):
            start_s = time.perf_counter()
            plan = make_plan(jobs, seed=0)
            rounds.append((time.perf_counter() - start_s) / len(plan.trials))
        per_trial_s[len(plan.trials)] = statistics.median(rounds)
    (few, few_s), (many, many_s) = per_trial_s.items()
    print(
        f"planning: {many} trials {1e3 * many * many_s:.0f} ms, {few} trials {1e3 * few * few_s:.0f} ms; "
        f"a trial {many_s / few_s:.2f}x (linear = 1)"
    )


def wall_time(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    timeline = record["timeline"]
    if record["status"] != "complete" or record["resumed"]:
        sys.exit(f"{run}: needs a run that completed in one go, found {record['status']}, resumed {record['resumed']}")
    spent: dict[str, float] = {}

    def add(what: str, duration_s: float) -> None:
        spent[what] = spent.get(what, 0.0) + duration_s

    for entry in timeline:
        duration_s = entry["end_s"] - entry["start_s"]
        if entry["what"] == "trial":
            arm, _, trial_id = entry["name"].rpartition("/")
            trial = json.loads((run / arm / "trials" / trial_id / "trial.json").read_text())
            add("measurement windows", trial["duration_s"])
            add("ramp-up and warm-up", trial["ramp_up_s"] + trial["warmup_s"])
            add(
                "client start, drain, samples and metrics",
                duration_s - trial["duration_s"] - trial["ramp_up_s"] - trial["warmup_s"],
            )
        elif entry["what"] == "service":
            inside = [
                each for each in timeline if entry["start_s"] <= each["start_s"] and each["end_s"] <= entry["end_s"]
            ]
            add("tear-down", entry["end_s"] - max(each["end_s"] for each in inside if each is not entry))
        else:
            add({"bring_up": "bring-up", "cool_down": "cool-down"}[entry["what"]], duration_s)
    total_s = max(entry["end_s"] for entry in timeline)
    add("the rest", total_s - sum(spent.values()))
    print(f"wall time of {run.name}: {total_s:.0f} s, {1 - spent['measurement windows'] / total_s:.0%} not measurement")
    for what, duration_s in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {duration_s / total_s:6.1%}  {what}")


if __name__ == "__main__":
    help_ratio()
    planning()
    if len(sys.argv) > 1:
        wall_time(Path(sys.argv[1]))
