"""One client of an OpenAI server: when does the first token arrive, and how steadily do the rest?

The independent check of vLLM's own client: same lengths, same endpoint, other code. Options: `model`,
`num_input_tokens`, `num_output_tokens`, `temperature`, `headers`.
"""

import random
import time

from locust import FastHttpUser, task

from workloads.sse import read_stream

# Every vocabulary has these, and none of them is special: prompts are token ids, so their length is exact.
_TOKEN_IDS = range(100, 400)


class CompletionUser(FastHttpUser):
    def on_start(self) -> None:
        self.options = self.environment.parsed_options
        # Locust asks for gzip otherwise, and a compressed stream cannot be read line by line.
        self.headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", **self.options.headers}

    @task
    def complete(self) -> None:
        options = self.options
        body = {
            "model": options.model,
            "prompt": random.choices(_TOKEN_IDS, k=options.num_input_tokens),
            "max_tokens": options.num_output_tokens,
            "temperature": options.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_s = time.perf_counter()
        with self.client.post(
            "/v1/completions", json=body, headers=self.headers, stream=True, catch_response=True
        ) as response:
            if response.request_meta["exception"] is None:
                read_stream(response, sent_s, options.num_output_tokens).record(response)
