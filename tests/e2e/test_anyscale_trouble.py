"""The whole command on Anyscale when the control plane misbehaves, which is a stand-in that answers at once."""

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.anyscale_standin import Fault, Instant, StandIn, healthy
from tests.e2e.anyscale_run import IMPATIENT, SHORT, calls, start, still_there
from tests.e2e.command import finish, only_run, read
from tests.leaks import canary, leaks, seen_arguments

pytestmark = pytest.mark.e2e

STUCK, SICK, ENDLESS, KEPT = 6, 7, 8, 9
MET: list[tuple[str, Fault, float, str | None]] = [
    # verb, what happens, how often, what the user is told; None: the service is measured all the same
    ("apply", Fault(delay_s=2), 1, None),
    ("apply", Fault(drop="after"), 1, None),
    ("apply", Fault(status=401, detail="Unauthorized."), inf, "wrong token: Unauthorized."),
    ("apply", Fault(status=404, detail="No such compute config."), inf, "No such compute config."),
    ("apply", Fault(status=429, detail="Too many requests."), inf, "Too many requests."),
    ("apply", Fault(status=500, detail="Out of order."), inf, "the control plane answered 500"),
    ("apply", Fault(state="STARTING"), 1, "not ready after 20 s (cluster.startup_timeout_s): STARTING"),
    ("apply", Fault(state="UNHEALTHY"), 1, "not healthy for 1 s: UNHEALTHY"),
    ("terminate", Fault(state="TERMINATING"), inf, None),
    ("terminate", Fault(status=403, detail="You do not have permission."), inf, None),
    ("apply", Fault(status=409, detail="The name is taken."), inf, "The name is taken."),
    ("apply", Fault(status=403, detail="Not for {token} or {encoded}."), inf, "Not for *** or ***."),
]


def quoting(cloud: StandIn, fault: Fault) -> Fault:
    """The same, whose words hold the token that it was sent, where they say so."""
    return replace(fault, detail=fault.detail.format(token=cloud.token, encoded=quote(cloud.token, safe="")))


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, Path, str, int]]:
    """One run of many services, side by side: their time-outs pass together.

    Without it one service's trouble could end the others' measurements, or be told without its reason.
    """
    folder = tmp_path_factory.mktemp("met")
    with StandIn(folder / "bucket", Instant(healthy)) as cloud:
        cloud.token = canary()
        for number, (verb, fault, times, _) in enumerate(MET):
            cloud.misbehave(verb, quoting(cloud, fault), times=times, service=f"-{number:04d}")
        overrides = [f"sweep.repeats={len(MET)}", f"cluster.max_live_services={len(MET)}", "sweep.concurrency=[2]"]
        overrides += ["cluster.startup_timeout_s=20", "cluster.terminate_timeout_s=15", "workload.payload_bytes=100"]
        process = start(IMPATIENT, folder, *SHORT, *overrides, cloud=cloud)
        output = finish(process)
        assert still_there(folder) == []
        yield cloud, only_run(folder / "outputs"), output, process.returncode


@pytest.mark.parametrize("number", range(len(MET)))
def test_a_service_that_fails_is_told_and_the_others_are_measured(
    met: tuple[StandIn, Path, str, int], number: int
) -> None:
    cloud, run, output, _ = met
    name = f"so-{run.name}-{number:04d}"
    told = MET[number][-1]
    trial = run / f"baseline/trials/c0002-r{number}"
    if told is None:
        assert read(trial / "trial.json")["metrics"]["num_failed"] == 0
    else:
        text = f"service baseline r{number} failed\n{name}: {told}"
        assert text in output
        assert told in read(trial / "failure.json")["error"]
        assert f"Log: {run}/services/baseline/r{number}" in output
    assert (f"anyscale service terminate --name {name}" in output) is (number in (ENDLESS, KEPT))
    if number in (ENDLESS, KEPT):
        assert cloud.services[name].state == ("TERMINATING" if number == ENDLESS else "RUNNING")
    else:
        assert name not in cloud.services or cloud.services[name].state == "TERMINATED"


def test_a_run_with_failures_ends_in_order(met: tuple[StandIn, Path, str, int]) -> None:
    cloud, run, output, code = met
    assert code == 1, output
    assert "Traceback" not in output
    assert f"teardown failed so-{run.name}-{ENDLESS:04d} may still run and cost money" in output
    assert "last seen TERMINATING" in output
    assert "not allowed: You do not have permission." in output
    record = read(run / "run.json")
    assert record["status"] == "failed"
    assert len(record["errors"]) == 2  # what still runs, and nothing else
    assert leaks(cloud.token, run.parent.parent, output=output.encode()) == []  # though the control plane repeated it


@pytest.mark.parametrize(
    ("verb", "fault", "said"),
    [
        ("userinfo", Fault(status=401), "wrong token"),
        ("find_service", Fault(status=403, detail="Not for {token} or {encoded}."), "Not for *** or ***."),
        ("find_service", Fault(status=500, detail="Out of order."), "the control plane answered 500"),
    ],
    ids=("wrong token", "echoed token", "out of order"),
)
def test_refused_before_anything_is_deployed(tmp_path: Path, verb: str, fault: Fault, said: str) -> None:
    with StandIn(tmp_path / "bucket", Instant(healthy)) as cloud, seen_arguments() as arguments:
        cloud.token = canary()
        cloud.misbehave(verb, quoting(cloud, fault), times=inf)
        process = start(IMPATIENT, tmp_path, *SHORT, cloud=cloud)
        output = finish(process)
    assert process.returncode == 2, output
    assert said in output
    assert "Traceback" not in output
    assert calls(cloud) == []
    assert not (tmp_path / "outputs").exists()
    assert leaks(cloud.token, tmp_path, output=output.encode(), arguments=b"\n".join(arguments)) == []
    assert still_there(tmp_path) == []
