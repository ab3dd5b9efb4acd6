"""Random clients of a server of a tiny model for some seconds; `python -m tests.server_soak` runs them for longer."""

import random
import time

from runtime.server.running.served_model import open_served_model
from runtime.server.settings import ServerSettings
from tests.helpers.artifacts import CACHE_LEN
from tests.helpers.server_soak import ACTS, Soak, check_answers, check_idle, run_clients
from tests.helpers.serving import NAME, running

SECONDS, CLIENTS, SEED = 8, 8, 5
CHECKED = 60  # answers that are asked for again


def test_no_slot_is_lost_and_whole_answers_are_those_of_the_same_requests_alone(compile_case):
    folder = compile_case("int8").artifact
    with running(lambda: open_served_model(folder, 1, 0), ServerSettings(max_queued=16)) as server:
        soak = Soak(server.port, NAME, CACHE_LEN, time.monotonic() + SECONDS)
        run_clients(soak, CLIENTS, SEED)
        check_idle(soak)
        check_answers(soak, CHECKED, random.Random(SEED))
        check_idle(soak)
    assert soak.failures == []
    assert soak.counts.keys() == {act.__name__ for act in ACTS}
    assert len(soak.complete) >= 20, soak.counts
