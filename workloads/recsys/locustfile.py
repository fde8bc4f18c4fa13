"""One client of the recommender: are the candidates scored, all of them, and how soon?

Options: `num_candidates`, `headers`.
"""

import json

from locust import FastHttpUser, task


class RankUser(FastHttpUser):
    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.num_candidates = options.num_candidates
        self.headers = dict(options.headers)

    @task
    def rank(self) -> None:
        with self.client.get("/rank", name="/rank", headers=self.headers, catch_response=True) as response:
            if response.request_meta["exception"] is None and not self.is_ranking(response.content):
                response.failure(f"wrong_body: {response.content[:80]!r}")

    def is_ranking(self, content: bytes) -> bool:
        try:
            scores = json.loads(content)["scores"]
            # NaN and the infinities, which Python's JSON lets through, fail the comparison.
            return len(scores) == self.num_candidates and all(0.0 <= score <= 1.0 for score in scores)
        except (ValueError, LookupError, TypeError):
            return False
