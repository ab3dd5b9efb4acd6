"""The page's chat: sending, streaming, stopping, changing what was said, and what goes wrong."""

import json
import threading
import time

import pytest
from selenium.webdriver import Keys

from tests.helpers.scripted_server import DONE, MODEL, Reply, ScriptedServer, chunk, refuses, says, serving, usage

SLOW = 0.05  # seconds before each piece
MANY_WORDS = [f"word{number} " for number in range(400)]


def test_an_answer_streams_and_is_counted(page, server):
    seen = threading.Event()
    server.replies.append(says("One, ", seen, "two, ", "three.", pause=0.2))
    began = time.monotonic()
    page.send("Count")
    page.wait(lambda: page.answers() == ["One,"] and page.streaming())
    seen.set()
    page.finished()
    passed = time.monotonic() - began
    assert page.answers() == ["One, two, three."]
    figures = page.texts(".figures span")
    assert figures[0] == "3 tokens"
    assert figures[1].endswith(" tok/s")
    rounding = 0.05
    assert 2 / passed - rounding <= float(figures[1].split()[0]) <= 2 / 0.6 + rounding  # two tokens after three pauses
    assert figures[2].startswith("first token ")
    assert figures[3] == "24 prompt tokens, 16 cached"
    assert server.requests == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Count"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_a_stream_may_be_cut_anywhere(page, server):
    """One byte at a time, with comments and both kinds of line ends: no character is lost or broken."""
    stream = chunk(role="assistant") + b": ping\n\n" + chunk(content="Grüße, 世界 ") + b":\r\n\r\n"
    stream += chunk(content="😀 é").replace(b"\n", b"\r\n") + b": ping\n\n" + chunk("stop") + DONE
    stream = stream.replace(rb"\u00fc", "ü".encode()).replace(rb"\ud83d\ude00", "😀".encode())
    assert "😀".encode() in stream
    server.replies.append(Reply([stream[at : at + 1] for at in range(len(stream))], 0.0005))
    assert page.ask("Hello") == "Grüße, 世界 😀 é"


def test_events_are_the_same_whatever_the_pieces(page):
    events = ['{"a": "é😀"}', "two\nlines", "", "[DONE]"]
    stream = (
        ": ping\n\ndata: "
        + events[0]
        + "\n\r\ndata: two\r\ndata:lines\r\revent: x\n\ndata\n\ndata:\n\ndata: [DONE]\n\n"
    )
    found = page.script(
        """
        const bytes = new TextEncoder().encode(arguments[0]);
        const read = (...cuts) => {
            const reader = new EventStreamReader();
            const ends = [0, ...cuts, bytes.length];
            const parts = ends.slice(1).map((end, at) => bytes.slice(ends[at], end));
            return JSON.stringify(parts.flatMap((part) => reader.read(part)));
        };
        const found = new Set();
        for (let one = 0; one <= bytes.length; one++) {
            for (let two = one; two <= bytes.length; two++) found.add(read(one, two));
        }
        return [...found];
        """,
        stream,
    )
    assert [json.loads(each) for each in found] == [events]


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_came(page, server, way):
    server.replies.append(says(*MANY_WORDS, pause=SLOW))
    page.send("Write much")
    page.wait(lambda: "word1 " in "".join(page.answers()))
    if way == "button":
        page.click("#stop-button")
    else:
        page.press(Keys.ESCAPE)
    page.finished()
    page.wait(lambda: server.cut == [True])
    (answer,) = page.answers()
    assert answer.startswith("word0 word1")
    assert "Stopped" in page.texts(".figures span")
    assert page.ask("Go on") == "You said: Go on"
    sent = server.requests[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"].strip() == answer


def test_a_conversation_survives_a_reload(page, server):
    page.ask("First")
    page.ask("Second")
    page.one("#prompt").send_keys("a draft")
    page.reload()
    assert page.questions() == ["First", "Second"]
    assert page.answers() == ["You said: First", "You said: Second"]
    assert page.one("#prompt").get_attribute("value") == "a draft"
    page.one("#prompt").clear()
    page.ask("Third")
    assert [message["content"] for message in server.requests[-1]["messages"]][::2] == ["First", "Second", "Third"]


def test_a_reload_in_the_middle_keeps_what_came(page, server):
    server.replies.append(says(*MANY_WORDS, pause=SLOW))
    page.send("Write much")
    page.wait(lambda: "word1 " in "".join(page.answers()))
    page.reload()
    page.wait(lambda: server.cut == [True])
    (answer,) = page.answers()
    assert answer.startswith("word0 word1")
    assert "Cut off when the page was closed" in page.texts(".figures span")


def test_an_edited_message_is_sent_again_without_what_followed(page, server):
    page.ask("First")
    page.ask("Second")
    page.script("document.querySelectorAll('[aria-label=Edit]')[0].focus()")
    page.press(Keys.ENTER)
    page.press(" and more", Keys.ESCAPE)
    assert page.questions() == ["First", "Second"]
    page.press(Keys.ENTER)  # the focus is on the button again
    page.press(" and more", Keys.ENTER)
    page.wait(lambda: page.answers() == ["You said: First and more"])
    assert page.questions() == ["First and more"]
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "First and more"}]


def test_retry_asks_again_for_the_last_answer_alone(page, server):
    page.ask("First")
    server.replies.extend([says("bad"), says("good")])
    assert page.ask("Second") == "bad"
    assert len(page.all("[aria-label='Try again']")) == 1
    page.button("Try again").click()
    page.wait(lambda: page.answers() == ["You said: First", "good"])
    assert server.requests[-1] == server.requests[-2]


def test_deleting_can_be_undone(page):
    page.ask("First")
    page.ask("Second")
    page.button("Delete", ".message.assistant").click()
    assert page.answers() == ["You said: First"]
    page.script("document.querySelector('.message.user [aria-label=Delete]').click()")
    assert page.questions() == ["Second"]
    assert page.answers() == []  # the first question's answer went with it
    page.button("Undo").click()
    assert page.questions() == ["First", "Second"]
    assert page.answers() == ["You said: First"]
    page.reload()
    assert page.questions() == ["First", "Second"]


def test_what_is_older_than_an_answer_is_not_brought_back(page):
    page.ask("First")
    page.ask("Second")
    page.button("Delete", ".message.assistant").click()
    page.one("#toast")
    page.ask("Third")
    assert not page.all("#toast")


def test_another_model_is_asked_for_after_a_restart(page, server):
    page.failures.append("status of 404")
    page.wait(lambda: page.script("return model"))
    page.script("model.id = 'an older model'")
    server.replies.append(refuses(404, "the model 'an older model' is not here"))
    page.ask("Hello")
    page.button("Try again", ".failure").click()
    page.wait(lambda: page.answers() == ["You said: Hello"])
    assert [body["model"] for body in server.requests] == ["an older model", MODEL]


def test_questions_without_an_answer_are_sent_as_one(page, server):
    """Templates of the family refuse two questions in a row."""
    page.failures.append("status of 500")
    server.replies.append(refuses(500, "It broke."))
    page.ask("First")
    page.ask("Second")
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "First\n\nSecond"}]


def test_an_error_is_shown_in_place_and_can_be_retried(page, server):
    page.failures.append("status of 429")
    server.replies.append(refuses(429, "the queue is full", Retry_After="5", x_request_id="req-12"))
    page.ask("Hello")
    assert page.texts(".failure p") == ["the queue is full\nThe server asks to wait 5 s. Status 429. Request req-12."]
    assert page.one(".failure").get_attribute("role") == "alert"
    page.reload()
    assert len(page.texts(".failure")) == 1
    page.button("Try again", ".failure").click()
    page.wait(lambda: page.answers() == ["You said: Hello"])
    assert page.texts(".failure") == []


def test_an_error_in_a_stream_keeps_what_came(page, server):
    error = (
        b'data: {"error": {"message": "the engine stopped", "type": "server_error", "param": null, "code": null}}\n\n'
    )
    server.replies.append(Reply([chunk(content="Half"), error]))
    assert page.ask("Hello") == "Half"
    assert page.texts(".failure p") == ["the engine stopped"]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([chunk(content="Half")], "The connection ended before the answer was complete."),
        ([chunk(content="Half"), b"data: {oops\n\n"], "The server sent something that is not JSON."),
    ],
)
def test_a_broken_stream_is_told(page, server, pieces, said):
    server.replies.append(Reply(pieces))
    assert page.ask("Hello") == "Half"
    assert page.texts(".failure p") == [said]


def test_a_server_that_went_away_is_told(page):
    page.failures.append("ERR_CONNECTION_REFUSED")
    with serving(ScriptedServer()) as address:
        page.visit(address)
        page.ask("Hello")
    page.ask("Are you there?")
    assert page.texts(".failure p") == ["The server cannot be reached."]


def test_a_key_is_asked_for_only_if_the_server_wants_one(page, server):
    assert not page.all("#key-field")
    page.failures.append("status of 401")
    server.key = "secret"
    page.ask("Hello")
    page.one("#key-field").send_keys("wrong", Keys.ENTER)
    page.wait(lambda: "refused this key" in page.one("#key-form label").text)
    page.one("#key-field").send_keys("secret", Keys.ENTER)
    page.wait(lambda: page.answers() == ["You said: Hello"])
    assert not page.all("#key-field")
    assert page.script("return JSON.stringify(localStorage).includes('secret')") is False
    page.reload()
    assert page.ask("Again") == "You said: Again"


def test_reasoning_is_apart_and_closed(page, server):
    server.replies.append(
        Reply([chunk(reasoning_content="Let me "), chunk(reasoning_content="see."), chunk(content="42"), DONE])
    )
    assert page.ask("What?") == "42"
    assert page.texts(".reasoning .inside") == []
    page.click(".reasoning summary")
    assert page.texts(".reasoning .inside") == ["Let me see."]
    page.ask("More")
    assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": "42"}


def test_tool_calls_are_shown_as_calls(page, server):
    def part(index, **function):
        return chunk(tool_calls=[{"index": index, "id": "abcdefghi", "type": "function", "function": function}])

    pieces = [part(0, name="weather", arguments=""), part(0, arguments='{"city": '), part(0, arguments='"Paris"}')]
    server.replies.append(Reply([*pieces, part(1, name="time", arguments="{}"), chunk("tool_calls"), DONE]))
    page.ask("Weather?")
    assert page.texts(".tool-call .title") == ["Calls the tool weather", "Calls the tool time"]
    assert page.texts(".tool-call pre") == ['{\n  "city": "Paris"\n}', "{}"]


@pytest.mark.parametrize(("reason", "note"), [("length", "Ended at the token limit"), ("stop", None)])
def test_an_answer_that_was_cut_off_says_so(page, server, reason, note):
    server.replies.append(says("Text", finish=reason))
    page.ask("Hello")
    assert page.texts(".figures .note") == ([note] if note else [])


def test_chats_are_kept_apart(page):
    page.ask("About cats")
    page.click("#new-button")
    assert page.questions() == []
    page.ask("About dogs")
    page.click("#chats-button")
    assert page.texts(".chat-list .title") == ["About dogs", "About cats"]
    page.button("About cats").click()
    assert page.answers() == ["You said: About cats"]
    page.button("Delete the chat: About cats").click()
    assert page.texts(".chat-list .title") == ["About dogs"]
    assert page.questions() == []
    page.button("Undo").click()
    assert page.answers() == ["You said: About cats"]
    page.reload()
    assert page.answers() == ["You said: About cats"]


def test_the_open_chat_in_the_list_goes_on(page, server):
    server.replies.append(says(*MANY_WORDS[:40], pause=SLOW))
    page.send("Write much")
    page.click("#chats-button")
    page.button("Write much", ".chat-list").click()
    page.finished()
    assert page.answers()[0].endswith("word39")


def test_nothing_becomes_html(page, server):
    attack = "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script><b>bold</b>"
    page.failures.append("status of 400")
    fenced = f"```<b>\n{attack}\n```\n"
    server.replies.extend([says(attack, fenced, f"\n- {attack}\n"), refuses(400, attack)])
    server.replies.append(
        Reply(
            [
                chunk(reasoning_content=attack),
                chunk(tool_calls=[{"index": 0, "function": {"name": attack, "arguments": attack}}]),
                DONE,
            ]
        )
    )
    for _ in range(3):
        page.ask(attack)
    page.click("#chats-button")
    page.reload()
    assert page.script("return window.hit") is None
    assert page.script("return document.querySelectorAll('main img, main script, main b').length") == 0
    assert page.questions() == [attack] * 3
    assert attack in page.answers()[0]
    assert page.texts(".failure p")[0].startswith(attack)


def test_usage_without_choices_and_other_fields_are_taken(page, server):
    server.replies.append(
        Reply([b'data: {"choices": [], "prompt_filter_results": []}\n\n', chunk(content="Yes"), usage(1, 1), DONE])
    )
    assert page.ask("Hello") == "Yes"
    assert page.texts(".figures span")[-1] == "1 prompt token"
