"""One client that fetches one address, whatever answers there: 2xx is a success.

Options: `path`, `headers`.
"""

from locust import FastHttpUser, task


class HttpUser(FastHttpUser):
    @task
    def get(self) -> None:
        options = self.environment.parsed_options
        self.client.get(options.path, headers=dict(options.headers))
