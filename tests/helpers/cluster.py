"""What tests of a cluster ask, and the models that they ask."""

from cluster.bench.paced_model import Pace

MODEL = "paced"
PACE = Pace(slots=2, step_seconds=0.02, token_seconds=0.0001)
SLOW = Pace(slots=1, step_seconds=0.1, token_seconds=0.0001)
SECONDS = 30.0  # within which Ray surely does what it is to do


def port_of(address):
    return int(address.rpartition(":")[2])


def chat(client, text="Hello", model=MODEL, **fields):
    messages = [{"role": "user", "content": text}]
    return client.ask("/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 4, **fields})


def completion(tokens, **fields):
    """The body of a request for exactly so many tokens."""
    return {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": True, **fields}
