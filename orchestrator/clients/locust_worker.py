"""One process of load: an ordinary locustfile, run by Locust, with every request of it on record.

Started by `orchestrator.clients.locust`, which talks to it in lines of JSON. On stdin come the spec, then the
start time on the monotonic clock, then nothing: end of file means that the parent is gone, and this process
ends itself. On stdout go `ready`, one `progress` a second, `facts`; the locustfile prints to the log.

Why not `locust --headless`: its histogram is too coarse for a percentile, its master needs a fixed port, and
at the end it kills requests in flight without a trace. Here each request that was sent becomes one sample:
from Locust's `request` event, from a task that raised while its request was in flight, or as `unfinished`.
Nothing is sent twice and no redirect is followed, so that what the server sees is what is recorded.

Not covered: `Expect: 100-continue` (geventhttpclient's resend for it has no switch), and locustfiles that
read a `stream=True` response without putting in their own `response_time` (Locust's ends at the headers).
"""

import ctypes
import gc
import importlib.util
import json
import logging
import os
import select
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from orchestrator.results.samples import SAMPLES_SCHEMA, UNFINISHED

import locust  # isort: skip  # patches the standard library for gevent: before all that might use sockets
import gevent
import gevent.monkey
import geventhttpclient.client
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from geventhttpclient.connectionpool import ConnectionPool
from locust.argument_parser import get_parser
from locust.contrib.fasthttp import FastHttpSession, FastHttpUser, LocustUserAgent
from locust.env import Environment
from locust.exception import CatchResponseError
from locust.util.load_locustfile import load_locustfile

from orchestrator.child import Message, protocol_channel, say
from orchestrator.clients.locust import TOKEN_VARIABLE
from orchestrator.secrets import Secret, redact

MAX_ERROR_CHARS = 200
MAX_LOG_RECORDS = 1000  # a task that raises at once is tried again at once, and Locust logs each traceback
LAG_INTERVAL_S = 0.01
TEARDOWN_S = 5.0  # for `on_stop` and the like; the samples are safe by then

_sleep = gevent.monkey.get_original("time", "sleep")
_poll = gevent.monkey.get_original("select", "poll")
_start_thread = gevent.monkey.get_original("_thread", "start_new_thread")


class Recorder:
    """What was sent and what became of it. On the path of every request, hence no more than a tuple each."""

    def __init__(self) -> None:
        # sent (monotonic clock), latency, error, context
        self.rows: list[tuple[float, float, str | None, Mapping[str, Any] | None]] = []
        self.in_flight: dict[Any, float] = {}  # greenlet -> sent
        self.first_sent: dict[Any, float] = {}  # user -> its first request sent
        self.num_failed = 0
        self.num_task_errors = 0
        self.first_task_error: str | None = None

    def on_request(
        self,
        response_time: float,
        exception: BaseException | None = None,
        context: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        sent = self.in_flight.pop(gevent.getcurrent(), None)
        if sent is None:  # an event which the locustfile fires itself
            sent = time.monotonic() - response_time / 1000
        self.num_failed += exception is not None
        error = None if exception is None else error_code(exception)
        self.rows.append((sent, response_time, error, context or None))

    def on_user_error(self, exception: BaseException, **_: Any) -> None:
        error = redact(f"task_error: {type(exception).__name__}: {exception}")[:MAX_ERROR_CHARS]
        self.num_task_errors += 1
        self.first_task_error = self.first_task_error or error
        sent = self.in_flight.pop(gevent.getcurrent(), None)
        if sent is not None:
            self.num_failed += 1
            self.rows.append((sent, (time.monotonic() - sent) * 1000, error, None))

    def close(self) -> int:
        """Record what is still in flight as failed; returns how many requests that are."""
        now = time.monotonic()
        unfinished = [(sent, (now - sent) * 1000, UNFINISHED, None) for sent in self.in_flight.values()]
        self.in_flight.clear()
        self.num_failed += len(unfinished)
        self.rows.extend(unfinished)
        return len(unfinished)

    def install(self, environment: Environment) -> None:
        environment.events.request.add_listener(self.on_request)
        environment.events.user_error.add_listener(self.on_user_error)
        in_flight, first_sent = self.in_flight, self.first_sent
        token = os.environ.pop(TOKEN_VARIABLE, None)
        bearer = {"Authorization": f"Bearer {Secret(token).reveal()}"} if token else None
        original, getcurrent, monotonic = FastHttpSession.request, gevent.getcurrent, time.monotonic

        def request(session: FastHttpSession, *args: Any, **kwargs: Any) -> Any:
            in_flight[getcurrent()] = sent = monotonic()
            if session.user not in first_sent:
                first_sent[session.user] = sent
            if bearer:
                kwargs["headers"] = {**(kwargs.get("headers") or {}), **bearer}
            return original(session, *args, **kwargs)

        FastHttpSession.request = request  # type: ignore[method-assign, assignment]


def error_code(exception: BaseException) -> str:
    """A short stable code, fit for grouping: what the locustfile said, or what the connection did."""
    cause = getattr(exception, "original", None) or exception  # RetriesExceeded wraps the one that matters
    code = getattr(cause, "code", None)
    if isinstance(cause, CatchResponseError):
        error = str(cause)
    elif isinstance(code, int):
        error = f"http_{code}"
    elif isinstance(cause, geventhttpclient.response.HTTPConnectionClosed | ConnectionResetError | BrokenPipeError):
        error = "connection_closed"
    elif isinstance(cause, ConnectionRefusedError):
        error = "connection_refused"
    elif isinstance(cause, TimeoutError | gevent.Timeout):
        error = "timeout"
    elif isinstance(cause, geventhttpclient.response.HTTPParseError):
        error = f"bad_response: {cause}"
    else:
        error = f"{type(cause).__name__}: {cause}"
    return redact(error)[:MAX_ERROR_CHARS]  # what was answered may repeat the token


def send_once() -> None:
    """Make one call of the client one request on the wire, whatever happens to it."""
    # Up to pool size + 1 resends of an idempotent request whose connection dropped, even with max_retries=0.
    assert geventhttpclient.client.IDEMPOTENT_METHODS
    geventhttpclient.client.IDEMPOTENT_METHODS = frozenset()
    # A redirect which is not followed would count as a success.
    LocustUserAgent.valid_response_codes -= LocustUserAgent.redirect_response_codes

    # The pool's own check, gevent's select(), refuses file descriptors above 1,023: each such request would
    # open a connection. Ours yields as that one does: sends leave in batches, a fifth less CPU a request.
    def is_socket_alive(pool: Any, sock: Any) -> bool:
        if sock is None or sock.fileno() < 0:
            return False
        gevent.sleep(0)
        poll = _poll()
        poll.register(sock.fileno(), select.POLLIN)
        return not poll.poll(0)  # an idle connection with something to read is closed, or out of step

    assert hasattr(ConnectionPool, "_is_socket_alive")
    ConnectionPool._is_socket_alive = is_socket_alive  # type: ignore[method-assign, assignment]


def find_user_class(locustfile: str) -> type[FastHttpUser]:
    """The one user class of a locustfile: a dotted module, or a path that ends in .py. Exits when there is none."""
    if locustfile.endswith(".py"):
        path = str(Path(locustfile).resolve())
    else:
        module = importlib.util.find_spec(locustfile)
        path = module.origin if module and module.origin else sys.exit(f"{locustfile}: no such module")
    found, _ = load_locustfile(path)
    fast = [item for item in found.values() if issubclass(item, FastHttpUser)]
    if len(fast) != 1 or len(found) != 1:
        sys.exit(f"{locustfile}: one user class is needed, a FastHttpUser; found: {', '.join(found) or 'none'}")
    return fast[0]


def make_environment(spec: Message) -> Environment:
    user_class = find_user_class(spec["locustfile"])
    user_class.max_redirects = 0
    user_class.max_retries = 0
    user_class.insecure = False  # Locust would take any certificate, and a token may be sent
    options = get_parser(default_config_files=[]).parse_args([])  # Locust's own, and what the locustfile declares
    vars(options).update(host=spec["url"], headless=True, **spec["options"])
    environment = Environment(
        user_classes=[user_class],
        events=locust.events,
        host=spec["url"],
        stop_timeout=0.0,
        parsed_options=options,
    )
    user_class.host = spec["url"]
    runner = environment.create_local_runner()
    environment.events.init.fire(environment=environment, runner=runner, web_ui=None)
    return environment


def sleep_until(time_s: float) -> None:
    while (left_s := time_s - time.monotonic()) > 0:
        gevent.sleep(left_s)


def measure_lag(start_s: float, end_s: float, lags_ms: list[float]) -> None:
    """How late the event loop takes up what is due in the window: every reply waits for that before it is seen.

    A real thread keeps the time, since the loop's own timers are rounded up to whole milliseconds.
    """
    due: deque[float] = deque()

    def take_up() -> None:
        now = time.monotonic()
        while due:
            lags_ms.append((now - due.popleft()) * 1000)

    wake = gevent.get_hub().loop.async_()
    wake.start(take_up)

    def keep_time() -> None:
        pr_set_timerslack = 29
        ctypes.CDLL(None).prctl(pr_set_timerslack, 1)  # Linux otherwise adds 0.05 ms to every sleep of a thread
        tick = start_s
        while tick < end_s:
            _sleep(max(0.0, tick - time.monotonic()))
            due.append(tick)
            wake.send()
            tick += LAG_INTERVAL_S

    _start_thread(keep_time, ())
    sleep_until(end_s)
    take_up()
    wake.stop()


def report_progress(protocol: TextIO, recorder: Recorder, start_s: float, window_start_s: float) -> None:
    num_reported, tick = 0, start_s
    while True:
        tick += 1.0
        sleep_until(tick)
        latencies_ms = [row[1] for row in recorder.rows[num_reported:] if row[2] is None]
        num_reported = len(recorder.rows)
        say(
            protocol,
            "progress",
            elapsed_s=tick - window_start_s,
            throughput_rps=len(latencies_ms),
            num_failed=recorder.num_failed,
            latency_p99_ms=float(np.percentile(latencies_ms, 99)) if latencies_ms else None,
        )


def drive(
    environment: Environment, recorder: Recorder, spec: Message, start_s: float, protocol: TextIO
) -> Mapping[str, object]:
    """Ramp-up, warm-up, window, drain; returns this process's facts, times relative to the window."""
    window, concurrency = spec["window"], spec["concurrency"]
    window_start_s = start_s + window["ramp_up_s"] + window["warmup_s"]
    window_end_s = window_start_s + window["duration_s"]
    lags_ms: list[float] = []
    observers = [
        gevent.spawn(measure_lag, window_start_s, window_end_s, lags_ms),
        gevent.spawn(report_progress, protocol, recorder, start_s, window_start_s),
    ]
    runner, user_class = environment.runner, environment.user_classes[0]
    assert runner

    # Client k of all N starts at k/N of the ramp; Locust's own dispatcher would start them in steps of 1 s.
    environment.events.test_start.fire(environment=environment)
    users: list[Any] = []
    for client in range(spec["index"], concurrency, spec["num_processes"]):
        sleep_until(start_s + window["ramp_up_s"] * client / concurrency)
        users.append(user_class(environment))
        users[-1].start(runner.user_greenlets)
    environment.events.spawning_complete.fire(user_count=len(users))

    sleep_until(window_start_s)
    measured_start_s, cpu_start_s = time.monotonic(), time.process_time()
    sleep_until(window_end_s)
    measured_end_s, cpu_end_s = time.monotonic(), time.process_time()

    for user in users:
        user.stop()  # not before its request is done
    runner.user_greenlets.join(timeout=window["drain_s"])
    environment.events.request.remove_listener(recorder.on_request)
    environment.events.user_error.remove_listener(recorder.on_user_error)
    num_unfinished = recorder.close()
    gevent.killall(observers)

    window_s = measured_end_s - measured_start_s
    return {
        "window_s": window_s,
        "cpu_ratio": (cpu_end_s - cpu_start_s) / window_s,
        "lag_p50_ms": float(np.percentile(lags_ms, 50)) if lags_ms else None,
        "lag_p99_ms": float(np.percentile(lags_ms, 99)) if lags_ms else None,
        "num_clients_started": len(recorder.first_sent),
        "last_client_started_at_s": max(recorder.first_sent.values(), default=start_s) - window_start_s,
        "num_requests": len(recorder.rows),
        "num_unfinished": num_unfinished,
        "num_task_errors": recorder.num_task_errors,
        "first_task_error": recorder.first_task_error,
    }


def write_shard(path: str, recorder: Recorder, window_start_s: float, index: int) -> None:
    num = len(recorder.rows)
    sent, latencies_ms, errors, contexts = zip(*recorder.rows, strict=True) if num else ((), (), (), ())
    columns = {
        "sent_at_s": np.array(sent, dtype=float) - window_start_s,
        "intended_at_s": [None] * num,
        "latency_ms": latencies_ms,
        "ok": [error is None for error in errors],
        "error": errors,
        "client_process": [index] * num,
    }
    for name in ("ttft_ms", "tpot_ms", "num_input_tokens", "num_output_tokens"):
        columns[name] = [context and context.get(name) for context in contexts]
    pa.parquet.write_table(pa.table(columns, schema=SAMPLES_SCHEMA), path)


def exit_with_parent() -> None:
    """Exit when the parent is gone. Runs in a real thread, so that no busy greenlet can hold it up."""
    while os.read(0, 1024):
        pass
    os._exit(1)


class WithoutToken(logging.Formatter):
    """Redacts secrets: what a task raises may quote an answer, which may repeat the token."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class FirstRecords(logging.Filter):
    """Drops what follows the first MAX_LOG_RECORDS records, so that a repeated error does not fill the disk."""

    num_seen = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.num_seen += 1
        if self.num_seen == MAX_LOG_RECORDS:
            record.msg, record.args = "further log records are dropped", ()
        return self.num_seen <= MAX_LOG_RECORDS


def main() -> None:
    protocol = protocol_channel()
    spec = json.loads(sys.stdin.readline() or sys.exit(1))

    handler = logging.StreamHandler()
    handler.addFilter(FirstRecords())
    handler.setFormatter(
        WithoutToken(f"%(asctime)s client_process={spec['index']} %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    send_once()
    recorder = Recorder()
    environment = make_environment(spec)
    recorder.install(environment)
    gc.collect()
    gc.freeze()
    say(protocol, "ready")

    start_s = json.loads(sys.stdin.readline() or sys.exit(1))["start_s"]
    _start_thread(exit_with_parent, ())
    facts = drive(environment, recorder, spec, start_s, protocol)
    window_start_s = start_s + spec["window"]["ramp_up_s"] + spec["window"]["warmup_s"]
    write_shard(spec["shard"], recorder, window_start_s, spec["index"])
    say(protocol, "facts", **facts)

    assert environment.runner
    with gevent.Timeout(TEARDOWN_S, False):
        environment.runner.quit()
    sys.stdout.flush()
    os._exit(0)  # a user's leftover thread or greenlet must not hold up the next trial


if __name__ == "__main__":
    main()
