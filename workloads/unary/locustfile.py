"""One client of the echo chain: does the reply carry back what was sent, and how soon?

Options: `payload_bytes` (0 sends an empty message), `headers`.
"""

import json

from locust import FastHttpUser, task


class EchoUser(FastHttpUser):
    def on_start(self) -> None:
        options = self.environment.parsed_options
        message = "x" * options.payload_bytes
        self.path = f"/echo?message={message}"
        self.headers = dict(options.headers)
        self.reply = {"message": message}
        self.expected = json.dumps(self.reply, separators=(",", ":")).encode()

    @task
    def echo(self) -> None:
        with self.client.get(self.path, name="/echo", headers=self.headers, catch_response=True) as response:
            if response.request_meta["exception"] is None and response.content != self.expected:
                if is_json(response.content, self.reply):
                    self.expected = response.content  # the same in another spelling: compare bytes from now on
                else:
                    response.failure(f"wrong_body: {response.content[:80]!r}")


def is_json(content: bytes, value: object) -> bool:
    try:
        return bool(json.loads(content) == value)
    except ValueError:
        return False
