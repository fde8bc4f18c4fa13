"""One client of the streaming chain: when does the first chunk arrive, and how steadily do the rest?

Options: `num_chunks` (before `[DONE]`), `headers`.
"""

import time

from locust import FastHttpUser, task

from workloads.sse import read_stream


class StreamUser(FastHttpUser):
    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.num_chunks = options.num_chunks
        # Locust asks for gzip otherwise, and a compressed stream cannot be read line by line.
        self.headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", **options.headers}

    @task
    def stream(self) -> None:
        sent_s = time.perf_counter()
        with self.client.get(
            "/stream", name="/stream", headers=self.headers, stream=True, catch_response=True
        ) as response:
            if response.request_meta["exception"] is None:
                read_stream(response, sent_s, self.num_chunks).record(response)
