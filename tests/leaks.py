"""Looking for secrets, in what was written, printed or given as an argument, and for processes left behind."""

import os
import secrets
import threading
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, quote_plus

import psutil
import pyarrow.parquet as pq


def canary() -> str:
    """A token whose URL-encoded form is another."""
    return f"sss_canary+{secrets.token_hex(8)}/{secrets.token_hex(8)}="


def forms(secret: str) -> set[bytes]:
    """As it stands, URL-encoded, and in base64 wherever in a longer text it began."""
    found = {secret.encode(), quote(secret).encode(), quote(secret, safe="").encode(), quote_plus(secret).encode()}
    for shift in range(3):
        padded = bytes(shift) + secret.encode()
        own = slice(-(-shift * 8 // 6), len(padded) * 8 // 6)  # the digits that no neighbour has a part in
        found |= {b64encode(padded)[own], urlsafe_b64encode(padded)[own]}
    return found


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file, its name and, of a Parquet file, the values that it holds compressed."""
    for path in folder.rglob("*"):
        yield f"name of {path}", str(path.relative_to(folder)).encode()
        if path.is_file():
            yield str(path), path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield f"values of {path}", f"{table.schema.metadata} {table.to_pydict()}".encode()


def leaks(secret: str, folder: Path, **said: bytes) -> list[str]:
    """Where it can be read: below the folder, or in what was said."""
    return [
        where for where, content in [*contents(folder), *said.items()] if any(form in content for form in forms(secret))
    ]


@contextmanager
def seen_arguments() -> Iterator[set[bytes]]:
    """The arguments of every process of this machine, looked at every 50 ms."""
    seen: set[bytes] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with suppress(OSError):
                    seen.add(Path(f"/proc/{pid}/cmdline").read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def processes_with(name: str, value: str) -> list[str]:
    """Command lines of live processes that have this variable: what a command left behind can be told by one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found
