"""What do composing and planning cost? CPU seconds of a dry run by jobs, and --help against a bare Hydra app.

    python benchmarks/composition.py            # of this checkout
    python benchmarks/composition.py ../other   # of another one, with the environment in its .venv if it has one

CPU time of the process and its children, the least of `REPEATS` runs, so that other work on the machine matters
little. Deploys nothing.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

JOBS = (2, 20, 200)
REPEATS = {2: 3, 20: 3, 200: 1}
REPEATS_OF_HELP = 5
BARE = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config): ...

main()
"""


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else __file__ + "/../..").resolve()
    own = root / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    with tempfile.TemporaryDirectory() as directory:
        measure(root, python, Path(directory))


def measure(root: Path, python: str, directory: Path) -> None:
    """Print the figures of one checkout."""
    command = [python, "-m", "orchestrator"]
    print(f"{root}\n{'jobs':>5} {'CPU s':>7} {'ms a further job':>17}")
    before: tuple[int, float] | None = None
    for jobs in JOBS:
        swept = ["profile=baseline,optimized", f"workload.max_ongoing_requests=range(1,{jobs // 2 + 1})"]
        dry_run = [
            *command,
            f"outputs={directory}",
            "dry_run=true",
            "sweep=quick",
            *swept,
            "-m",
        ]  # which older checkouts need
        cpu_s = min(cpu_of(dry_run, root) for _ in range(REPEATS[jobs]))
        further = f"{1000 * (cpu_s - before[1]) / (jobs - before[0]):17.0f}" if before else ""
        print(f"{jobs:>5} {cpu_s:>7.2f} {further}", flush=True)
        before = jobs, cpu_s
    (directory / "conf").mkdir()
    (directory / "conf" / "config.yaml").write_text("a: 1\n")
    (directory / "app.py").write_text(BARE)
    bare_s, help_s = [], []
    for _ in range(REPEATS_OF_HELP):  # in turn: both see the same machine
        bare_s.append(cpu_of([python, "app.py", "--help"], directory))
        help_s.append(cpu_of([*command, "--help"], root))
    print(
        f"--help: {min(help_s):.2f} s, a bare Hydra app's: {min(bare_s):.2f} s, ratio {min(help_s) / min(bare_s):.2f}"
    )


def cpu_of(command: list[str], cwd: Path) -> float:
    """User and system CPU seconds of the command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
