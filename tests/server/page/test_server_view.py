"""The page's view of the server: live figures each second, and what it says when there are none."""

import time

import pytest

from tests.helpers.scripted_server import CONTEXT, IDLE, MODEL, ScriptedServer, serving

BUSY = {
    **IDLE,
    "slots": [
        {"id": 0, "state": "decoding", "tokens": 512, "request_id": "req-1"},
        {"id": 1, "state": "prompt", "tokens": 1024, "request_id": "req-2"},
        {"id": 2, "state": "idle", "tokens": 0, "request_id": None},
    ],
    "waiting": 3,
    "queued_tokens": 2210,
    "generated_tokens_per_second": 61.25,
    "prompt_tokens_per_second": 900.0,
    "ttft_seconds": {"p50": 0.0834, "p99": 1.42},
    "prefix_cache": {"queries": 18000, "hits": 4500},
    "requests": {"running": 2, "finished": 1482},
}


def tiles(page):
    """The tiles' texts by their titles."""
    return dict(text.split("\n", 1) for text in page.texts(".tile"))


def test_the_figures_are_shown(page, server):
    server.live = BUSY
    page.click("#tab-server")
    page.wait(lambda: tiles(page).get("Waiting", "").startswith("3"))
    assert tiles(page) == {
        "Generated tokens": "61.3 tok/s\npeak 61.3 in two minutes",
        "Prompt tokens": "900 tok/s\npeak 900 in two minutes",
        "Time to first token": "83 ms median\np99 1.42 s",
        "Prefix cache hits": "25.0 %\n4,500 of 18,000 tokens",
        "Waiting": "3\n2,210 queued tokens",
        "Running": "2\n1,482 finished",
    }
    assert page.texts("#server-model, #health, #uptime") == [MODEL, "Accepting requests", "Up for 2 h 14 min"]
    assert page.texts(".slot") == [
        f"Slot 0 · Generating\n512 of {CONTEXT:,}\nreq-1",
        f"Slot 1 · Reading prompt\n1,024 of {CONTEXT:,}\nreq-2",
        f"Slot 2 · Idle\n0 of {CONTEXT:,}",
    ]
    widths = page.script("return [...document.querySelectorAll('.fill')].map((found) => found.style.width)")
    assert widths == ["25%", "50%", "0%"]


def test_figures_without_a_value(page, server):
    page.open("#server")
    page.wait(lambda: page.texts("#health") == ["Accepting requests"])
    assert tiles(page)["Time to first token"] == "\u2013 median\np99 \u2013"
    assert tiles(page)["Prefix cache hits"].startswith("\u2013\n")


def test_the_figures_follow_the_server(page, server):
    page.open("#server")
    for waiting in (5, 9):
        server.live = {**BUSY, "waiting": waiting, "slots": BUSY["slots"] * waiting}
        page.wait(lambda: tiles(page)["Waiting"].startswith(str(waiting)))
        assert len(page.texts(".slot")) == 3 * waiting
    server.live = {**server.live, "generated_tokens_per_second": 10.0}
    page.wait(lambda: tiles(page)["Generated tokens"] == "10.0 tok/s\npeak 61.3 in two minutes")
    label = page.one(".spark svg[aria-label*='10.0']").get_attribute("aria-label")
    assert label == "The last two minutes: now 10.0, peak 61.3"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("loading", "Loading the model; no requests are accepted yet"),
        ("draining", "Shutting down: running requests finish, new ones are refused"),
        ("failed", "The engine has failed; the server's log says why"),
    ],
)
def test_a_server_that_takes_no_requests_says_so(page, server, status, said):
    server.live = {**BUSY, "status": status}
    page.open("#server")
    page.wait(lambda: page.texts("#health") == [said])


def test_a_server_that_went_away_is_told(page):
    page.failures += ["ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET"]
    with serving(ScriptedServer()) as address:
        page.visit(f"{address}/#server")
        page.wait(lambda: page.texts("#health") == ["Accepting requests"])
    page.wait(lambda: page.one("#health").text.startswith("The server cannot be reached. These figures are "))
    assert page.one("#health").get_attribute("data-health") == "unreachable"


def test_nothing_is_asked_while_the_view_is_not_seen(page, server):
    page.open("#server")
    page.wait(lambda: server.asked >= 2)
    page.click("#tab-chat")
    before = server.asked
    time.sleep(2.5)
    assert server.asked <= before + 1  # one question may have been on its way
    page.click("#tab-server")
    page.wait(lambda: server.asked > before + 1)


def test_an_answer_goes_on_while_the_server_is_looked_at(page, server):
    page.send("Hello")
    page.click("#tab-server")
    page.wait(lambda: page.texts("#health") == ["Accepting requests"])
    page.click("#tab-chat")
    page.wait(lambda: page.answers() == ["You said: Hello"])


def test_settings_lead_back_to_the_chat(page):
    page.open("#server")
    page.click("#settings-button")
    page.one("#settings-panel")
    assert page.script("return location.hash") == "#chat"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (86399, "23 h 59 min"), (100000, "1 d 3 h")],
)
def test_durations(page, seconds, said):
    assert page.script("return duration(arguments[0])", seconds) == said
