"""What a client of locust does, an independent load: whole chat answers, one after another (https://docs.locust.io)."""

import os

from locust import HttpUser, task

MODEL = os.environ["SERVED_MODEL"]
TOKENS = int(os.environ["ANSWER_TOKENS"])


class Chatter(HttpUser):
    """Asks, waits for the whole answer, and asks again."""

    @task
    def ask(self) -> None:
        """One request; anything but 200 with the asked-for tokens counts as a failure."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Tell me of the sea."}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
        }
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
            elif answer.json()["usage"]["completion_tokens"] != TOKENS:
                answer.failure("another number of tokens than was asked for")
