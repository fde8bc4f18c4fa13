"""`python -m orchestrator [overrides] [-m]`: compose with Hydra, then plan, check and run.

The only caller of `hydra.main`. Hydra composes; its task only collects the composed jobs. What has to be undone
(services) is planned and run after Hydra has returned, where no launcher or callback stands in between.
"""

import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape

from orchestrator.config import Config, parse, register
from orchestrator.errors import EXIT_BAD_CONFIG, EXIT_OK, ConfigError
from orchestrator.process import Interrupted, interruptible

if TYPE_CHECKING:
    from orchestrator.execute import Run
    from orchestrator.paths import RunPaths
    from orchestrator.plan import Job, Plan

SCRATCH = "SERVE_ORCHESTRATOR_SCRATCH"  # where conf/config.yaml lets Hydra write


def main() -> int:
    """Exit code as documented in README.md."""
    register()
    scratch = Path(tempfile.mkdtemp(prefix="serve-orchestrator-"))
    os.environ[SCRATCH] = str(scratch)
    try:
        with interruptible():
            jobs = _compose(sys.argv[1:])
            return _execute(jobs, sys.argv[1:]) if jobs else EXIT_OK
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except Interrupted as interrupted:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)  # what is left to do is to end with the right exit code
        return 128 + interrupted.signum
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compose(arguments: list[str]) -> list["Job"]:
    """The jobs that Hydra composes; none for `--help`, `--cfg` and the like. Raises ConfigError."""
    from orchestrator.plan import Job

    for argument in arguments:
        if re.match(r"\+*experiment=.*,", argument):
            raise ConfigError(
                f"{argument!r}: an experiment is a whole comparison and cannot be swept (Hydra would ignore its "
                "own sweep); run one after the other"
            )
    found: list[tuple[DictConfig, dict[str, str], str, Path]] = []

    @hydra.main(version_base="1.3", config_path="../conf", config_name="config")
    def collect(composed: DictConfig) -> None:
        record = HydraConfig.get()
        overrides: dict[str, str] = {}
        for override in record.overrides.task:
            key, _, value = override.lstrip("+~").partition("=")
            overrides[key] = value
        hydra_dir = Path(record.runtime.output_dir) / (record.output_subdir or "")
        found.append((composed, overrides, str(record.runtime.choices.get("profile")), hydra_dir))

    try:
        collect()
    except ValueError as error:  # Hydra's own, for flags that exclude each other
        raise ConfigError(str(error)) from None
    except SystemExit as stop:
        if stop.code:
            hint = ""
            if any(argument.startswith(("model=", "+model=")) for argument in arguments):
                hint = " (model= goes with one workload=llm or =vllm, or with an +experiment of theirs)"
            raise ConfigError(f"the config does not compose, see above; nothing was deployed{hint}") from None
    return [Job(parse(composed), overrides, profile, folder) for composed, overrides, profile, folder in found]


def _execute(jobs: list["Job"], command: list[str]) -> int:
    from orchestrator import execute, paths, plan, progress

    first = jobs[0].config
    if first.resume is not None:
        if len(command) != 1:
            raise ConfigError("resume=outputs/<run> stands alone: the run's own configs are used")
        run_paths = paths.RunPaths(Path(first.resume))
        the_plan = _reload(run_paths)
        execute.preflight(the_plan, live=True)
        return _go(execute.Run(the_plan, run_paths, command), run_paths)

    seed = first.seed if first.seed is not None else random.SystemRandom().randrange(2**31)
    the_plan = plan.make_plan(jobs, seed)
    execute.preflight(the_plan, live=not first.dry_run)
    outputs = Path(first.outputs)
    if first.dry_run:
        run_paths = _create(outputs / "dry_runs")
        execute.write_service_files(the_plan, run_paths)
        progress.print_plan(the_plan)
        progress.line(f"Rendered service files: {run_paths.root}/services")
        return EXIT_OK
    run_paths = _create(outputs)
    execute.keep_hydra_record(the_plan, run_paths)
    return _go(execute.Run(the_plan, run_paths, command), run_paths)


def _create(outputs: Path) -> "RunPaths":
    from orchestrator import paths

    try:
        return paths.create_run_dir(outputs, datetime.now())
    except OSError as error:
        raise ConfigError(f"no run directory can be made in outputs={outputs}: {error}") from error


def _reload(run_paths: "RunPaths") -> "Plan":
    """The plan of an earlier run, from its own records. Raises ConfigError when it cannot be taken up again."""
    from orchestrator import plan, results

    try:
        record = results.read_json(run_paths.run_json)
        seed = record["seed"]
        arms = []
        for arm in record["plan"]["arms"]:
            saved = OmegaConf.load(run_paths.hydra_dir(arm["name"]) / "config.yaml")
            composed = OmegaConf.merge(OmegaConf.structured(Config), saved)
            assert isinstance(composed, DictConfig)
            arms.append(
                plan.Arm(
                    name=arm["name"],
                    axes=arm["axes"],
                    config=parse(composed),
                    levels=tuple(arm["levels"]),
                    key=arm["service_key"],
                    copy=arm["copy"],
                )
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        OmegaConfBaseException,
    ) as error:  # missing, or not as we write it
        raise ConfigError(f"resume={run_paths.root}: not a run that can be taken up again: {error!r}") from error
    for arm in arms:
        if plan.service_key(arm.config) != arm.key:
            raise ConfigError(
                f"resume={run_paths.root}: arm {arm.name} would not be the same service any more (its workload's "
                "source or the Ray version has changed); start a new run"
            )
    return plan.plan_arms(arms, seed)


def _go(run: "Run", run_paths: "RunPaths") -> int:
    from orchestrator import progress

    try:
        code = run.go()
    except Interrupted:
        progress.print_results(run.plan, run.rows)
        _say_again(run_paths, "Interrupted; everything is stopped. Go on")
        raise
    progress.print_results(run.plan, run.rows)
    if len(run.plan.arms) > 1:
        _report(run_paths)
    if code:
        _say_again(run_paths, "Run again what failed or is INVALID")
    progress.line(str(run_paths.root))
    return code


def _report(run_paths: "RunPaths") -> None:
    """Verdicts, pictures and report.html."""
    from orchestrator import progress

    progress.line("\nComparing ...")
    from analysis import compare, formats, load, report  # seconds, which only a complete run need wait for

    try:
        comparisons = report.write(load.load_run(run_paths.root))
    except Interrupted:
        progress.line(f"Interrupted; the run is complete: python -m analysis report {shlex.quote(str(run_paths.root))}")
        raise
    except (compare.IncomparableError, load.LoadError) as error:
        progress.line(f"[red]not compared[/red] {escape(str(error))}")
        return
    for comparison in comparisons:
        progress.console.print(formats.render_terminal(comparison))
        progress.line("")
    progress.line(f"Report: {run_paths.report_html}")


def _say_again(run_paths: "RunPaths", why: str) -> None:
    from orchestrator import progress

    progress.line(f"{why}: python -m orchestrator {shlex.quote(f'resume={run_paths.root}')}")


if __name__ == "__main__":
    sys.exit(main())
