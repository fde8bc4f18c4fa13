"""The command as a user types it, up to the first deployment: refusals, dry runs, help. Starts no Ray."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from orchestrator import __main__ as orchestrator_main
from orchestrator.config import Config, register
from orchestrator.process import claim, members
from tests.conftest import ROOT

BROKEN = {
    "missing.py": None,
    "syntax.py": "def build(args:\n",
    "raises.py": "raise RuntimeError('kaputt-4711')\ndef build(args): ...\n",
    "nameless.py": "def other(args): ...\n",
}


AT = ["cluster=endpoint", "cluster.url=http://127.0.0.1:9"]


def orchestrator(outputs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", f"outputs={outputs}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(outputs: Path, *arguments: str) -> str:
    """What is printed; asserts exit 2 in words, with nothing left."""
    done = orchestrator(outputs, *arguments)
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert "Traceback" not in printed
    assert not outputs.exists()
    assert members(outputs) == []
    return printed


def test_each_job_is_composed_once_and_as_hydra_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each file is read: once for all jobs."""
    arguments = ["workload=streaming,recsys", "profile=baseline,optimized", "++sweep.repeats=2", "-m"]
    monkeypatch.setattr(sys, "argv", ["orchestrator", *arguments])
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # as python -m has it: conf/ is found beside the file
    composed: list[list[str]] = []
    load_sweep_config = ConfigLoaderImpl.load_sweep_config

    def counted(loader: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        composed.append(sweep_overrides)
        return load_sweep_config(loader, master_config, sweep_overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    register()

    def jobs(scratch: Path) -> list[tuple[Config, dict[str, Any]]]:
        monkeypatch.setenv(orchestrator_main.SCRATCH, str(scratch))
        return [
            (
                job.config,
                {path.name: path.read_text().replace(str(scratch), "") for path in job.hydra_dir.iterdir()},
            )
            for job in orchestrator_main._compose(arguments)
            if job.hydra_dir
        ]

    ours = jobs(tmp_path / "ours")
    assert [job[:2] for job in composed] == [
        [f"workload={workload}", f"profile={profile}"]
        for workload in ("streaming", "recsys")
        for profile in ("baseline", "optimized")
    ]
    assert {name for _, files in ours for name in files} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    monkeypatch.setattr(orchestrator_main, "once_a_job", contextlib.nullcontext)
    assert jobs(tmp_path / "hydras") == ours
    assert len(composed) == 3 * len(ours)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["profile=optimised"], "optimized"),  # among the available options
        (["profile=[baseline,optimized]"], "profile is one choice; profile=baseline,optimized"),
        (["workload.payload_byte=3"], "payload_byte"),
        (["sweep.concurency=3"], "concurency"),
        (["sweep.concurrency=-1"], "whole number above 0"),
        (["sweep.concurrency=[]"], "empty"),
        (
            ["profile=haproxy", "profile.env.RAY_SERVE_ENABLE_HA_PROXY=1"],
            "'++profile.env.RAY_SERVE_ENABLE_HA_PROXY=\"1\"'",
        ),
        (['+profile.env.RAY_SERVE_ENABLE_HAPROXY="1"'], "nearest known: RAY_SERVE_ENABLE_HA_PROXY"),
        (["workload.num_replicas=40"], "asks for 80 CPU"),
        (["+experiment=grpc,haproxy", "-m"], "cannot be swept"),
        (["workload.application.import_path=workloads.unary.app"], "module:attribute"),
        (["profile=baseline,grpc", "workload=unery"], "unary"),  # not the comma is what is wrong
        (
            [*AT, "+workload.options.headers.accept=text/html,application/json"],
            "'+workload.options.headers.accept=\"text/html,application/json\"'",
        ),
        ([*AT, "cluster.url=http://a,http://b"], "'cluster.url=choice(http://a,http://b)'"),
        (["cluster.redeploy=never,per_repeat"], "'cluster.redeploy=choice(never,per_repeat)'"),
    ],
)
def test_bad_request_is_refused(tmp_path: Path, arguments: list[str], says: str) -> None:
    assert says in refused(tmp_path / "outputs", *arguments)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "no such module"),
        ("syntax", "does not parse"),
        ("raises", "kaputt-4711"),
        ("nameless", "it has other"),
    ],
)
def test_workload_that_does_not_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    for file, source in BROKEN.items():
        if source is not None:
            (package / file).write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    printed = refused(tmp_path / "outputs", f"workload.application.import_path=mine.{name}:build")
    assert says in printed


def test_port_in_use_is_refused_with_its_holder(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        printed = refused(tmp_path / "outputs", f"cluster.http_port={port}")
    assert f"cluster.http_port={port} is in use by python" in printed


def test_resume_of_no_run_or_with_more_overrides_is_refused(tmp_path: Path) -> None:
    def resume(*more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", f"resume={tmp_path}", *more],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "not a run" in resume()
    assert "not a run" in resume("trust=mine")
    assert "stands alone" in resume("seed=3")
    (tmp_path / "run.json").write_text('{"plan": {"arms": []}}')  # not as we write it: no seed
    assert "not a run" in resume()


class Empty(BaseHTTPRequestHandler):
    """Answers every GET with nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def answering() -> Iterator[str]:
    """The address of a server that is ready."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


STRANGER = """
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import TrialError
from orchestrator.observe.base import Observer

(Path(__file__).parent / "was_imported").touch()


@dataclass
class Stranger(Observer):
    @contextmanager
    def during(self, service: object, directory: Path) -> Iterator[object]:
        raise TrialError("stranger-4711")
        yield
"""


def test_code_that_a_record_names_is_run_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answering: str
) -> None:
    """The run directory may be somebody else's. This observer lets nothing be measured."""
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    chosen = ["+observe.mine._target_=stranger.Stranger", "sweep=quick", "sweep.repeats=1", "sweep.cooldown_s=0"]
    assert "trust goes with resume" in refused(tmp_path / "refused", *AT, *chosen, "trust=stranger")
    done = orchestrator(tmp_path / "outputs", AT[0], f"cluster.url={answering}", *chosen)
    assert (done.returncode, "stranger-4711" in done.stdout) == (1, True), done.stdout + done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    mark = tmp_path / "was_imported"
    mark.unlink()

    def told(module: str, *arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    code, said = told("orchestrator", f"resume={run}")
    assert (code, "trust=stranger" in said) == (2, True), said
    refusal = "stranger.Stranger in the run's record is code that is not ours"
    code, said = told("orchestrator.cleanup", str(tmp_path / "outputs"))
    assert refusal in said
    assert "--trust=stranger" in said
    assert not mark.exists()
    code, said = told("orchestrator", f"resume={run}", 'trust="another,stranger"')
    assert (code, "stranger-4711" in said) == (1, True), said
    code, said = told("orchestrator.cleanup", str(tmp_path / "outputs"), "--trust=stranger")
    assert refusal not in said  # it may list what tests beside this one have just left


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")))
def test_every_experiment_plans(tmp_path: Path, experiment: str) -> None:
    cluster = "local_h100" if "llm" in experiment else "local"
    done = orchestrator(tmp_path / "outputs", f"+experiment={experiment}", f"cluster={cluster}", "dry_run=true")
    assert done.returncode == 0, done.stdout + done.stderr
    rendered = list((tmp_path / "outputs").rglob("service.yaml"))
    assert len(rendered) >= (1 if experiment == "vllm_baseline" else 2)
    assert f"{len(rendered)} arms" in done.stdout


@pytest.mark.parametrize("key", ["cluster.max_cost", "sweep.repeat", "compare.margine", "foo"])
def test_a_name_that_nobody_reads_is_refused(tmp_path: Path, key: str) -> None:
    """Hydra itself suggests the + for a misspelt name, and a limit that is not read would limit nothing."""
    assert f"error: {key} is no key of {key.rpartition('.')[0] or 'the config'}" in refused(
        tmp_path / "outputs", f"+{key}=1"
    )


def test_cleanup_removes_what_a_killed_composition_left(tmp_path: Path) -> None:
    left, held = tmp_path / "serve-orchestrator-left", tmp_path / "serve-orchestrator-held"
    left.mkdir()
    held.mkdir()
    claimed = claim(held)
    command = [sys.executable, "-m", "orchestrator.cleanup", "--yes", str(tmp_path)]
    told = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    os.close(claimed)
    assert (told.returncode, told.stdout) == (0, f"{left}: no process\n"), told.stderr
    assert (left.exists(), held.exists()) == (False, True)


def test_flags_never_vanish_where_nothing_is_deployed(tmp_path: Path) -> None:
    at = ["cluster=endpoint", "cluster.url=http://127.0.0.1:9"]
    for profile in ("optimized", "baseline,optimized"):
        said = refused(tmp_path / "outputs", *at, f"profile={profile}", "-m")
        assert "the flags of profile=optimized cannot" in " ".join(said.split())


def test_a_limit_of_cost_where_nothing_is_rented(tmp_path: Path) -> None:
    """It would limit nothing; only a cluster that rents machines has it."""
    assert "Could not override 'cluster.max_cost_usd'" in refused(tmp_path / "outputs", "cluster.max_cost_usd=5")
    for sign in ("+", "++"):
        said = refused(tmp_path / "outputs", f"{sign}cluster.max_cost_usd=5")
        assert "cluster.max_cost_usd is no key of cluster" in said


def test_cleanup_says_what_it_cannot_read(tmp_path: Path) -> None:
    """One broken record must not keep it from what the other runs left."""
    for name, text in (
        ("a", ""),
        ("b", "[]"),
        ("c", '{"status": "failed"}'),
        ("d", '{"status": "complete", "errors": []}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    cleanup = [sys.executable, "-m", "orchestrator.cleanup"]
    (tmp_path / "e" / "run.json").mkdir(parents=True)
    told = subprocess.run([*cleanup, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stderr) == (1, "")
    broken = [name for name in "abcde" if f"{tmp_path / name}: what it left cannot be found out" in told.stdout]
    assert "".join(broken) == "abce"
    assert f"cleanup {tmp_path} --yes" in told.stdout
    told = subprocess.run([*cleanup, str(tmp_path / "f")], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (told.returncode, "there is no directory" in told.stderr) == (2, True)


def test_services_that_stand_beside_those_of_other_machines_have_a_name_of_their_own(tmp_path: Path) -> None:
    """Another machine may begin a run in the same second: the time alone would let one update the other's."""
    done = orchestrator(tmp_path, "cluster=anyscale_1x", "sweep=quick", "dry_run=true")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "dry_runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{6}", run.name)
    (rendered,) = run.rglob("service.yaml")
    assert yaml.safe_load(rendered.read_text())["name"] == f"so-{run.name}-0000"


def arms_and_levels(output: str) -> dict[str, int]:
    """Of a dry run: arm -> number of levels."""
    rows = [
        line.split() for line in output.splitlines() if "," in line.split(" ")[0] or line.startswith(("base", "ha"))
    ]
    return {row[0]: sum(word.isdigit() for word in row[1:]) for row in rows}


def test_all_on_8x_dry_run(tmp_path: Path) -> None:
    done = orchestrator(tmp_path / "outputs", "+experiment=all_on_8x", "dry_run=true")
    assert arms_and_levels(done.stdout) == {
        "unary,baseline": 9,
        "unary,all_on": 9,
        "streaming,baseline": 8,
        "streaming,all_on": 8,
    }
    (rendered,) = (tmp_path / "outputs").rglob("unary,all_on/r0/service.yaml")
    assert rendered.read_text().count("num_replicas: 8") == 2


def test_later_override_wins_over_an_experiment(tmp_path: Path) -> None:
    done = orchestrator(tmp_path / "outputs", "+experiment=haproxy", "workload=unary", "sweep=quick", "dry_run=true")
    assert arms_and_levels(done.stdout) == {"baseline": 3, "haproxy": 3}
    done = orchestrator(tmp_path / "outputs", "+experiment=aa", "workload=streaming", "dry_run=true")
    assert arms_and_levels(done.stdout) == {"baseline": 8, "baseline~2": 8}


@pytest.mark.parametrize(
    ("arguments", "arms"),
    [
        (["workload=recsys", "profile=optimized", "-m"], 1),
        (["profile=optimized"], 1),
        (["profile=baseline,grpc", "sweep.concurrency=[1,8]"], 2),
        (["profile=baseline,grpc", "sweep.concurrency=1,8"], 2),
        (["workload.num_replicas=range(1,4)"], 3),
        ([*AT[:1], "cluster.url=choice(http://a,http://b)"], 2),
        ([*AT, '+workload.options.headers.accept="text/html,application/json"'], 1),
        ([*AT, "+workload.options.headers.accept=text/html,application/json", "-m"], 2),
        ([*AT, "~workload.options.headers", "workload.path='/a b?c={1,2}'"], 1),
    ],
)
def test_a_comma_sweeps_with_and_without_m(tmp_path: Path, arguments: list[str], arms: int) -> None:
    done = orchestrator(tmp_path / "outputs", *arguments, "dry_run=true")
    if arguments[-1] == "-m":  # Hydra's options go last
        done = orchestrator(tmp_path / "outputs", *arguments[:-1], "dry_run=true", "-m")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{arms} arms x" in done.stdout


def test_sweeper_params_that_hydra_would_ignore_are_refused(tmp_path: Path) -> None:
    """It reads them before it knows which file of a swept group a job takes."""
    (tmp_path / "conf" / "profile").mkdir(parents=True)
    (tmp_path / "conf" / "profile" / "mine.yaml").write_text(
        "# @package _global_\nprofile: {name: mine, env: {}, app: {}}\n"
        "hydra: {sweeper: {params: {workload.num_replicas: '1,2'}}}\n"
    )
    mine = ["dry_run=true", f"--config-dir={tmp_path / 'conf'}"]
    done = orchestrator(tmp_path / "outputs", "profile=mine", *mine)
    assert (done.returncode, "2 arms x" in done.stdout) == (0, True), done.stdout + done.stderr
    said = refused(tmp_path / "refused", "profile=baseline,mine", *mine)
    assert "hydra.sweeper.params of workload.num_replicas" in said


def test_help_and_cfg_exit_0_and_leave_nothing(tmp_path: Path) -> None:
    for argument, says in (("--help", "haproxy"), ("--cfg=job", "payload_bytes: 10240")):
        done = orchestrator(tmp_path / "outputs", argument)
        assert done.returncode == 0, done.stderr
        assert says in done.stdout
    assert not (tmp_path / "outputs").exists()


CHILDRENS = {"ray", "torch", "anyscale", "vllm", "locust", "gevent", "fastapi"}
RUNS = {"numpy", "pandas", "pyarrow", "scipy", "matplotlib", "rich"}


@pytest.mark.parametrize(
    ("arguments", "not_imported"),
    [
        (["--help"], CHILDRENS | RUNS),
        (["--cfg=job"], CHILDRENS | RUNS),
        (["+experiment=all_on_8x", "dry_run=true"], CHILDRENS),
    ],
)
def test_heavy_packages_are_not_imported(tmp_path: Path, arguments: list[str], not_imported: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "orchestrator", f"outputs={tmp_path}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "hydra" in imported
    assert imported.isdisjoint(not_imported)
