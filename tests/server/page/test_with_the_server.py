"""The page in front of the real server, whose model is a script."""

import time
from types import SimpleNamespace

import pytest

from runtime.text.instruct import InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.page_driver import PageDriver
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, VOCAB, ScriptedEngine, write_tokenizer
from tests.helpers.serving import NAME, running, served

LONG = " ".join(f"word{number}" for number in range(1000))


@pytest.fixture
def start(chrome, tmp_path):
    """Starts a server whose model gives these replies, a token each hundredth of a second."""
    write_tokenizer(tmp_path)
    tokenizer = open_tokenizer(SPEC, tmp_path)

    def server(*replies):
        engine = ScriptedEngine(
            [[*PIECES.encode(reply), EOS] for reply in replies], cache_len=8192, on_step=lambda _step: time.sleep(0.01)
        )
        engine.manifest = SimpleNamespace(
            model=SimpleNamespace(generates=True, head="causal_lm", vocab_size=VOCAB), tokenizer=SPEC
        )
        return running(lambda: served(engine, tokenizer, InstructEncoder("v3", tokenizer)))

    return server


def opened(chrome, server):
    """The page with temperature 0, since the script's model is not sure of itself."""
    page = PageDriver(chrome, server.address)
    page.forget()
    page.open()
    page.click("#settings-button")
    page.one("[name=temperature]").send_keys("0")
    page.click("#settings-panel [data-close]")
    return page


def test_a_conversation(chrome, start):
    with start("Grüße, **世界** 😀", "And more.") as server:
        page = opened(chrome, server)
        assert page.ask("Hello") == "Grüße, 世界 😀"
        assert page.texts(".text strong") == ["世界"]
        figures = page.texts(".figures span")
        assert figures[0] == f"{len(PIECES.encode('Grüße, **世界** 😀')) + 1} tokens"  # with the end
        assert page.ask("Go on") == "And more."
        assert " cached" in page.texts(".figures span")[-1]
        assert page.unexpected_log() == []


def test_stop_frees_the_slot_and_the_view_shows_it(chrome, start):
    with start(LONG, "Short.") as server:
        page = opened(chrome, server)
        page.send("Hello")
        page.wait(lambda: "word5 " in page.answers()[0])
        page.click("#tab-server")
        page.wait(lambda: "Generating" in "".join(page.texts(".slot")))
        assert page.texts("#server-model, #health") == [NAME, "Accepting requests"]
        page.click("#tab-chat")
        page.click("#stop-button")
        assert page.ask("Again") == "Short."  # the only slot was free
        page.click("#tab-server")
        page.wait(lambda: "Idle" in "".join(page.texts(".slot")))
        assert page.unexpected_log() == []


def test_a_servers_end_is_seen(chrome, start):
    with start(LONG) as server:
        page = opened(chrome, server)
        page.failures += [
            "ERR_CONNECTION_REFUSED",
            "ERR_CONNECTION_RESET",
            "ERR_EMPTY_RESPONSE",
            "ERR_INCOMPLETE_CHUNKED",
        ]
        page.send("Hello")
        page.wait(lambda: "word5 " in page.answers()[0])
        page.click("#tab-server")
        server.end()
        page.wait(lambda: page.texts("#health")[0].startswith("Shutting down"))
        page.click("#tab-chat")
        page.click("#stop-button")
        page.click("#tab-server")
        page.wait(lambda: page.texts("#health")[0].startswith("The server cannot be reached."))
        assert page.unexpected_log() == []
