"""Would a secret that got out be found? The search that other tests rely on."""

import json
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from tests.leaks import canary, leaks, seen_arguments


def test_a_secret_would_be_found(tmp_path: Path) -> None:
    secret = canary()
    places = {
        "plain": secret,
        "url": f"https://x/?token={quote(secret, safe='')}&y",
        **{f"header{shift}": b64encode(f"{'u' * shift}:{secret}:end".encode()).decode() for shift in range(3)},
    }
    for name, text in places.items():
        (tmp_path / name).write_text(json.dumps({"log": text}))
    (tmp_path / secret.replace("/", "")).touch()
    pq.write_table(pa.table({"error": [secret] * 1000}), tmp_path / "s.parquet", compression="gzip")
    (tmp_path / "innocent").write_text(json.dumps({"token": "***", "text": secret[:-4]}))
    assert {Path(where).name for where in leaks(secret, tmp_path)} == {*places, "s.parquet"}
    assert leaks(secret.replace("/", ""), tmp_path) == [f"name of {tmp_path / secret.replace('/', '')}"]
    with (
        seen_arguments() as seen,
        subprocess.Popen([sys.executable, "-c", "input()", f"--token={secret}"], stdin=subprocess.PIPE) as child,
    ):
        deadline_s = time.monotonic() + 30
        while not leaks(secret, tmp_path / "none", arguments=b"\n".join(seen)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        child.kill()
    assert leaks(secret, tmp_path / "none", arguments=b"\n".join(seen)) == ["arguments"]
