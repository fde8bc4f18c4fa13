"""Children that speak lines of JSON, real ones: that die, are silent, say garbage or will not go."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.child import Child, receive_any
from orchestrator.process import Interrupted, interruptible
from tests.conftest import ROOT

ECHO = """
    for line in sys.stdin:
        say(channel, "echo", said=json.loads(line))
"""
SILENT = "time.sleep(60)"
STUBBORN = """
    say(channel, "here")
    sys.stdin.read()
    time.sleep(60)
"""


class GoneError(Exception):
    """What these children raise."""


Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(code)`: a child that runs this code after the usual beginning."""
    with contextlib.ExitStack() as stack:

        def run(code: str, name: str = "speaker") -> Child:
            child = make(tmp_path, code, name)
            stack.callback(child.close)
            child.start()
            return child

        yield run


def make(directory: Path, code: str, name: str = "speaker") -> Child:
    head = "import json, os, sys, time\nfrom orchestrator.child import protocol_channel, say\n"
    body = f"channel = protocol_channel()\n{textwrap.dedent(code)}"
    (directory / f"{name}.py").write_text(head + body)
    env = {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}", "PATH": os.environ["PATH"]}
    return Child(name, env, directory / f"{name}.log", f"the {name}", GoneError)


def soon(timeout_s: float = 20.0) -> float:
    return time.monotonic() + timeout_s


def test_asked_and_answered(start: Start) -> None:
    child = start(ECHO)
    child.send({"first": "é\n"})
    assert child.receive(soon(), "echo") == {"event": "echo", "said": {"first": "é\n"}}
    for number in range(3):
        assert child.ask({"call": number}, 20, "echo") == {"event": "echo", "said": {"call": number}}
    child.close(grace_s=20)
    assert child.wait(soon(0)) == 0


def test_lines_that_come_in_pieces_and_together(start: Start) -> None:
    child = start("""
        for piece in ('{"event":', '"a"}\\n{"event":"b"}\\n{"ev', 'ent":"c"}\\n'):
            channel.write(piece)
            channel.flush()
            time.sleep(0.1)
    """)
    assert [child.receive(soon(), "it") for _ in range(3)] == [{"event": name} for name in "abc"]


def test_what_it_prints_is_in_its_log(start: Start, tmp_path: Path) -> None:
    child = start("print('printed'); os.system('echo shouted'); say(channel, 'done')")
    assert child.receive(soon(), "done") == {"event": "done"}
    assert child.wait(soon()) == 0
    assert sorted((tmp_path / "speaker.log").read_text().split()) == ["printed", "shouted"]


def test_one_that_dies_is_told_with_the_end_of_its_log(start: Start, tmp_path: Path) -> None:
    child = start("print(*range(100), sep='\\n', file=sys.stderr); raise ValueError('kaputt-4711')")
    with pytest.raises(GoneError) as gone:
        child.receive(soon(), "ready")
    text = str(gone.value)
    assert text.startswith(
        f"the speaker ended with exit code 1 before 'ready'; see {tmp_path}/speaker.log, which ends with:\n"
    )
    assert text.endswith("ValueError: kaputt-4711")
    assert len(text.splitlines()) == 16
    with pytest.raises(GoneError, match="exit code 1 before it could be told"):
        child.send({})


def test_one_that_is_killed_while_it_is_asked(start: Start) -> None:
    child = start("os.kill(os.getpid(), 9)")
    with pytest.raises(GoneError, match=r"exit code -9 before 'answer'; see .*speaker\.log$"):
        child.ask({"call": "x"}, 20, "answer")


def test_its_last_words_are_heard_before_its_end(start: Start) -> None:
    child = start("say(channel, 'last')")
    assert child.wait(soon()) == 0
    assert child.receive(soon(0), "last") == {"event": "last"}
    with pytest.raises(GoneError, match="exit code 0 before 'more'"):
        child.receive(soon(0), "more")


@pytest.mark.parametrize("line", ["hello", "[1]", '{"type": "ready"}', "\\xff"])
def test_garbage_is_quoted(start: Start, line: str) -> None:
    child = start(f"channel.buffer.write(b'{line}\\n'); channel.flush(); time.sleep(60)")
    with pytest.raises(GoneError, match="the speaker said what is no message: b'") as gone:
        child.receive(soon(), "ready")
    assert line in str(gone.value)


def test_a_silent_one(start: Start) -> None:
    child = start(SILENT)
    assert child.receive(soon(0.2), "anything") is None
    assert child.wait(soon(0)) is None  # whoever waits decides what follows


def test_a_late_answer_is_not_taken_for_the_next_ones(start: Start) -> None:
    child = start("""
        for line in sys.stdin:
            time.sleep(json.loads(line)["sleep_s"])
            say(channel, "answer", to=line)
    """)
    assert child.ask({"sleep_s": 0}, 20, "answer") is not None
    assert child.ask({"sleep_s": 0.5}, 0.1, "answer") is None
    time.sleep(1)
    with pytest.raises(GoneError, match="exit code -9"):
        child.ask({"sleep_s": 0}, 20, "answer")


def test_an_interrupt_while_it_is_asked_kills_it(start: Start) -> None:
    child = start(SILENT)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted), interruptible():
        child.ask({"call": "x"}, 20, "answer")
    assert child.wait(soon(0)) == -signal.SIGKILL


def test_closing_is_enough_and_can_be_repeated(start: Start) -> None:
    child = start(ECHO)
    process = psutil.Process(child.pid)
    child.hang_up()
    child.hang_up()
    child.close(grace_s=20)
    child.close()
    child.kill()
    assert child.wait(soon(0)) == 0
    assert not process.is_running()


def test_one_that_will_not_go_is_killed(start: Start) -> None:
    child = start(STUBBORN)
    assert child.receive(soon(), "here")
    began_s = time.monotonic()
    child.close(grace_s=0.5)
    assert 0.5 <= time.monotonic() - began_s < 10
    assert child.wait(soon(0)) == -signal.SIGKILL


def test_closing_what_was_never_started(tmp_path: Path) -> None:
    child = make(tmp_path, ECHO)
    child.hang_up()
    child.kill()
    child.close(grace_s=10)


def test_an_interrupt_while_it_is_forked_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, forked = subprocess.Popen, []

    def interrupted(*args: object, **settings: object) -> subprocess.Popen[bytes]:
        forked.append(popen(*args, **settings))  # type: ignore[call-overload]
        os.kill(os.getpid(), signal.SIGINT)  # between the fork and the return
        time.sleep(0.05)
        return forked[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    child = make(tmp_path, STUBBORN)
    with pytest.raises(Interrupted), interruptible(), contextlib.closing(child):
        child.start()
    assert forked[0].poll() == -signal.SIGKILL
    assert forked[0].stdin.closed
    assert forked[0].stdout.closed


def test_several_are_waited_for_together(start: Start) -> None:
    slow = start("time.sleep(0.5); say(channel, 'slow'); sys.stdin.read()", "slow")
    fast = start("say(channel, 'fast'); say(channel, 'again'); sys.stdin.read()", "fast")
    heard = [receive_any([slow, fast], soon(), "it") for _ in range(3)]
    assert heard == [(fast, {"event": "fast"}), (fast, {"event": "again"}), (slow, {"event": "slow"})]
    assert receive_any([slow, fast], soon(0.1), "it") is None
    fast.kill()
    with pytest.raises(GoneError, match="the fast ended with exit code -9 before 'it'"):
        receive_any([slow, fast], soon(), "it")


def test_ctrl_c_on_the_terminal_and_a_killed_parent(tmp_path: Path) -> None:
    """The first reaches the group of the orchestrator, in which no child is; after the second none is left."""
    code = f"""
        import signal, sys, time
        from pathlib import Path
        from tests.test_child import SILENT, ECHO, make
        signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
        child = make(Path({str(tmp_path)!r}), ECHO)
        child.start()
        print(child.pid, flush=True)
        while True:
            time.sleep(0.1)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stdout.readline() == b"interrupted\n"
        time.sleep(0.5)
        assert child.is_running()
        assert "KeyboardInterrupt" not in (tmp_path / "speaker.log").read_text()
        parent.kill()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
