"""`python -m orchestrator [overrides]`: compose with Hydra, then plan, check and run.

The only caller of `hydra.main`. Hydra composes; its task only collects the composed jobs. What has to be undone
(services) is planned and run after Hydra has returned, where no launcher or callback stands in between.
"""

import os
import random
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from orchestrator.composition import check_commas, check_lists, once_a_job
from orchestrator.config import parse, register
from orchestrator.errors import EXIT_BAD_CONFIG, EXIT_OK, ConfigError, ServiceError
from orchestrator.paths import RunPaths, create_run_dir
from orchestrator.process import SCRATCH_PREFIX, Interrupted, claim, interruptible

# What only a run needs (numpy, pyarrow, rich) is imported in the functions that need it: --help and --cfg do not.
if TYPE_CHECKING:
    from orchestrator import execute
    from orchestrator.arms import Job
    from orchestrator.plan import Plan

SCRATCH = "SERVE_ORCHESTRATOR_SCRATCH"  # where conf/config.yaml lets Hydra write


def main() -> int:
    """Exit code as documented in README.md."""
    register()
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
    _claim = claim(scratch)
    os.environ[SCRATCH] = str(scratch)
    try:
        with interruptible():
            jobs = _compose(sys.argv[1:])
            return _execute(jobs, sys.argv[1:]) if jobs else EXIT_OK
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except Interrupted as interrupted:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # what is left to do is to end with the right exit code
        return 128 + interrupted.signum
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compose(arguments: list[str]) -> "list[Job]":
    """The jobs that Hydra composes; none for `--help`, `--cfg` and the like. Raises ConfigError."""
    for argument in arguments:
        if re.match(r"\+*experiment=.*,", argument):
            raise ConfigError(
                f"{argument!r}: an experiment is a whole comparison and cannot be swept (Hydra would ignore its "
                "own sweep); run one after the other"
            )
    found: list[tuple[DictConfig, dict[str, str], str, Path]] = []
    choices: dict[str, str] = {}  # config group -> option
    ignored: set[str] = set()  # keys of hydra.sweeper.params

    @hydra.main(version_base="1.3", config_path="../conf", config_name="config")
    def collect(composed: DictConfig) -> None:
        record = HydraConfig.get()
        pairs = (override.lstrip("+~").partition("=") for override in record.overrides.task)
        overrides = {key: value for key, _, value in pairs}
        ignored.update((record.sweeper.get("params") or {}).keys() - overrides.keys())
        choices.update(record.runtime.choices)
        hydra_dir = Path(record.runtime.output_dir) / (record.output_subdir or "")
        found.append((composed, overrides, str(record.runtime.choices.get("profile")), hydra_dir))

    try:
        with once_a_job():
            collect()
    except ValueError as error:  # Hydra's own, for flags that exclude each other
        raise ConfigError(str(error)) from None
    except SystemExit as stop:
        if stop.code:
            of_model = any(argument.startswith(("model=", "+model=")) for argument in arguments)
            hint = " (model= goes with one workload=llm or =vllm, or with an +experiment of theirs)" if of_model else ""
            raise ConfigError(f"the config does not compose, see above; nothing was deployed{hint}") from None
    if not found:
        return []
    if ignored:
        raise ConfigError(
            f"hydra.sweeper.params of {', '.join(sorted(ignored))}: Hydra ignores them in a file of a config group "
            "that is itself swept; they belong into conf/experiment/"
        )
    asked = get_args_parser().parse_args(arguments)
    check_lists(asked.overrides)
    if not asked.multirun:
        check_commas(asked.overrides, choices)
    from orchestrator.arms import Job

    return [Job(parse(composed), overrides, profile, folder) for composed, overrides, profile, folder in found]


def _execute(jobs: "list[Job]", command: list[str]) -> int:
    from orchestrator import execute
    from orchestrator.clusters.base import SharedCluster
    from orchestrator.journal import keep_hydra_record
    from orchestrator.plan import make_plan
    from orchestrator.progress import line, print_plan

    first = jobs[0].config
    if first.resume is not None:
        if not all(argument.startswith(("resume=", "trust=")) for argument in command):
            raise ConfigError("resume=outputs/<run> stands alone, but for trust=: the run's own configs are used")
        paths = RunPaths(Path(first.resume))
        plan = _reload(paths, (first.trust or "").split(","))
        execute.preflight(plan, live=True)
        return _go(execute.Run(plan, paths, command), paths)

    if first.trust is not None:
        raise ConfigError("trust goes with resume=outputs/<run>: what you name yourself is trusted")
    plan = make_plan(jobs, random.SystemRandom().randrange(2**31) if first.seed is None else first.seed)
    execute.preflight(plan, live=not first.dry_run)
    outputs = Path(first.outputs) / "dry_runs" if first.dry_run else Path(first.outputs)
    # Services are called after the run: where those of other machines stand beside them, the second is not enough.
    is_shared = any(isinstance(arm.config.cluster, SharedCluster) for arm in plan.arms)
    try:
        paths = create_run_dir(outputs, datetime.now(), f"_{secrets.token_hex(3)}" if is_shared else "")
    except OSError as error:
        raise ConfigError(f"no run directory can be made in outputs={outputs}: {error}") from error
    if first.dry_run:
        execute.write_service_files(plan, paths)
        print_plan(plan)
        line(f"Rendered service files: {paths.root}/services")
        return EXIT_OK
    keep_hydra_record(plan, paths)
    return _go(execute.Run(plan, paths, command), paths)


def _reload(paths: RunPaths, trusted: Collection[str]) -> "Plan":
    """The plan of an earlier run, whose records may name modules that are `trusted`.

    Raises ConfigError when it cannot be taken up again.
    """
    from orchestrator.application import service_key
    from orchestrator.cleanup import left_elsewhere
    from orchestrator.journal import recorded_plan

    try:
        plan = recorded_plan(paths, trusted)
    except ConfigError as error:
        raise ConfigError(f"resume={paths.root}: not a run that can be taken up again: {error}") from error
    try:
        left = [what for what, _ in left_elsewhere(paths, trusted)]
    except ServiceError as error:
        raise ConfigError(f"resume={paths.root}: what it left running cannot be found out: {error}") from error
    if left:
        advice = "end what it left first: python -m orchestrator.cleanup"
        raise ConfigError("\n".join([f"resume={paths.root}: {advice}", *left]))
    for arm in plan.arms:
        if service_key(arm.config, arm.config.cluster) != arm.key:
            raise ConfigError(
                f"resume={paths.root}: arm {arm.name} would not be the same service any more (its workload's "
                "source or the Ray version has changed); start a new run"
            )
    return plan


def _go(run: "execute.Run", paths: RunPaths) -> int:
    from orchestrator.progress import line, print_results

    again = f"python -m orchestrator {shlex.quote(f'resume={paths.root}')}"
    try:
        code = run.go()
    except Interrupted:
        print_results(run.plan, run.journal.rows)
        stopped = "not everything is stopped, see above" if run.journal.errors else "everything is stopped"
        line(f"Interrupted; {stopped}. Go on: {again}")
        raise
    print_results(run.plan, run.journal.rows)
    if len(run.plan.arms) > 1:
        _report(paths)
    if code:
        line(f"Run again what failed or is INVALID: {again}")
    line(str(paths.root))
    return code


def _report(paths: RunPaths) -> None:
    """Verdicts, pictures and report.html."""
    from rich.markup import escape

    from orchestrator.progress import console, line

    line("\nComparing ...")
    from analysis import contrasts, formats, load, report  # seconds, which only a complete run need wait for

    try:
        comparisons = report.write(load.load_run(paths.root))
    except Interrupted:
        line(f"Interrupted; the run is complete: python -m analysis report {shlex.quote(str(paths.root))}")
        raise
    except (contrasts.IncomparableError, load.LoadError) as error:
        line(f"[red]not compared[/red] {escape(str(error))}")
        return
    for comparison in comparisons:
        console.print(formats.render_terminal(comparison))
        line("")
    line(f"Report: {paths.report_html}")


if __name__ == "__main__":
    sys.exit(main())
