"""Ray Serve LLM and bare vLLM, real ones, with the tiny model: as a user of a machine without a GPU runs them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from orchestrator.results.samples import read_samples
from tests.e2e.command import CALM, below, finish, nothing_is_left, only_run, read, start, wait_for

__all__ = ["nothing_is_left"]  # a fixture that every test here uses

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.llm,
    pytest.mark.serial,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make test-llm"),
]

NUM_PROMPTS = 400
TINY = ["model=tiny", "sweep=quick", "sweep.repeats=1", "sweep.cooldown_s=0"]
ARMS = {"vllm", "llm,baseline", "llm,optimized", "llm,direct_streaming"}


KILLED = ("vllm", "llm,baseline")  # the arms whose engine dies, and
LATE = "c0002-r0"  # the trial in which it does, the last one of its service


def under_measured_load(outputs: Path, arms: set[str]) -> list[str]:
    """Those of these arms whose client measures the late trial: its own warm-up is over."""
    logs = {arm: outputs.glob(f"*/{arm}/trials/{LATE}/client.log") for arm in arms}
    return [arm for arm, found in logs.items() if any("measured] Starting main" in log.read_text() for log in found)]


@pytest.fixture(scope="module")
def overhead(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """vLLM alone, and Ray Serve LLM in three arrangements. Two of the four lose their engine when all else is measured.

    A service is minutes here, so one run serves all: without it nobody would notice that an arm is not what it is
    called, that our figures are not the client's, or that errors of a dead engine are measured as a service.
    """
    outputs = tmp_path_factory.mktemp("overhead")
    chosen = ["sweep.concurrency=[4,2]", f"client.num_prompts={NUM_PROMPTS}"]
    chosen += ["seed=5"]  # whatever is killed is not the last service, so that something comes after it
    process = start(outputs, "+experiment=llm_overhead", *TINY, *CALM, *chosen)
    alive = set(KILLED)
    while alive:
        (arm,) = wait_for(lambda: under_measured_load(outputs, alive), process, timeout_s=900)
        for engine in below(process, "VLLM::Eng"):
            engine.kill()
        alive.remove(arm)
    output = finish(process)
    return only_run(outputs), output, process.returncode


def test_every_arm_is_measured(overhead: tuple[Path, str, int]) -> None:
    run, output, _ = overhead
    rows = pq.read_table(run / "summary.parquet").to_pylist()
    assert {row["arm"] for row in rows} == ARMS  # the flags of a profile do not multiply what has no Ray
    for row in rows:
        if row["trial_id"] == LATE and row["arm"] in KILLED:
            continue
        assert row["state"] == "complete"
        assert row["num_failed"] == 0
        assert row["output_throughput_tok_per_s"] == pytest.approx(16 * row["throughput_rps"])
        assert row["ttft_p50_ms"] < row["latency_p50_ms"]
        trial_dir = run / row["arm"] / "trials" / row["trial_id"]
        trial, samples = read(trial_dir / "trial.json"), read_samples(trial_dir / "samples.parquet")
        assert samples.num_rows == NUM_PROMPTS == trial["client"]["num_requests"]
        assert trial["duration_s"] < trial["whole_run"]["duration_s"]  # the ramp and the tail are not in the window
        assert trial["client"]["cpu_ratio"] > 0
        raw = read(trial_dir / "raw" / "bench.0.json")
        assert len(raw["start_times"]) == NUM_PROMPTS
        assert "generated_texts" not in raw
    for arm in ARMS - {"vllm"}:
        assert f"{arm} against vllm" in output


@pytest.mark.parametrize("arm", KILLED)
def test_a_killed_engine_fails_the_trial_and_the_run_goes_on(overhead: tuple[Path, str, int], arm: str) -> None:
    run, output, code = overhead
    assert code == 1, output
    failure: dict[str, Any] = read(run / arm / "trials" / LATE / "failure.json")
    assert failure["stage"] == "trial"
    assert "died under load" in failure["error"]
    log = failure["error"].split("log: ")[1].split(" (")[0]
    assert Path(log).exists()
    assert "died under load" in " ".join(output.split())
    died_at = (run / arm / "trials" / LATE / "failure.json").stat().st_mtime
    assert any(trial.stat().st_mtime > died_at for trial in run.glob("*/trials/*/trial.json"))


def test_the_whole_run_is_what_the_client_printed(overhead: tuple[Path, str, int]) -> None:
    run, _, _ = overhead
    for arm in ARMS:
        path = run / arm / "trials" / "c0004-r0" / "trial.json"
        whole = read(path)["whole_run"]
        printed = whole["client"]
        for key in ("throughput_rps", "output_throughput_tok_per_s", "ttft_mean_ms", "ttft_p99_ms", "tpot_mean_ms"):
            assert whole[key] == pytest.approx(printed[key], rel=0.005), (arm, key)
        log = (path.parent / "client.log").read_text()
        told = float(log.rsplit("Request throughput (req/s):", 1)[1].split()[0])
        assert whole["throughput_rps"] == pytest.approx(told, rel=0.005)


def test_all_arms_run_the_declared_engine(overhead: tuple[Path, str, int]) -> None:
    run, _, _ = overhead
    engines = {arm: read(run / "services" / arm / "r0" / "effective.json")["engine"] for arm in ARMS}
    assert len({json.dumps(engine, sort_keys=True) for engine in engines.values()}) == 1, engines
    assert engines["vllm"]["max_num_seqs"] == 256
    assert engines["vllm"]["load_format"] == "dummy"
    direct = yaml.safe_load((run / "services" / "llm,direct_streaming" / "r0" / "service.yaml").read_text())
    assert direct["applications"][0]["args"]["ingress_deployment_config"] is None
    flags = read(run / "services" / "llm,direct_streaming" / "r0" / "effective.json")["flag_effects"]
    assert flags["RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"]


def test_locust_agrees(tmp_path: Path) -> None:
    """Two clients that share no code, one after the other, at one and the same service.

    Without it a wrong clock, or a wrong way of counting tokens, in one of them would pass for the service's.
    """
    process = start(
        tmp_path,
        *("workload=vllm", *TINY, *CALM, "sweep.concurrency=[4]"),
        *("sweep.warmup_s=15", "sweep.duration_s=10"),
        *("client=vllm_bench,locust", "-m"),
    )
    output = finish(process)
    assert process.returncode in (0, 3), output
    run = only_run(tmp_path)
    rows = {row["arm"]: row for row in pq.read_table(run / "summary.parquet").to_pylist()}
    locusts, vllms = rows["locust"], rows["vllm_bench"]
    assert len(list((run / "services").iterdir())) == 1
    # As wide as a shared machine moves from one quarter of a minute to the next; a TTFT that is in fact the latency, or
    # the time to the headers, would be further off.
    for key in ("throughput_rps", "output_throughput_tok_per_s", "ttft_p50_ms"):
        assert 1 / 2.5 < locusts[key] / vllms[key] < 2.5, key
