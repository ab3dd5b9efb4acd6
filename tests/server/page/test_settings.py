"""The page's settings, and what it does where the browser keeps nothing."""

import json

import pytest
from selenium.webdriver import Keys

EVERYTHING = {"temperature": "0.5", "max_tokens": "64", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "seed": "7"}


def fill(page, **values):
    for name, value in values.items():
        field = page.one(f"#settings-form [name={name}]")
        field.clear()
        field.send_keys(value)


def test_settings_are_sent_and_remembered(page, server):
    page.click("#settings-button")
    fill(page, **EVERYTHING, system="Be brief.", stop="END\n\\n\\n")
    page.reload()
    page.ask("Hello")
    expected = {name: json.loads(value) for name, value in EVERYTHING.items()} | {"stop": ["END", "\n\n"]}
    assert {name: server.requests[-1][name] for name in expected} == expected
    assert server.requests[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#settings-button")
    page.button("Clear all").click()
    page.ask("Hello")
    assert server.requests[-1].keys() == {"model", "messages", "stream", "stream_options"}


def test_defaults_are_shown(page):
    page.click("#settings-button")
    shown = {name: page.one(f"[name={name}]").get_attribute("placeholder") for name in EVERYTHING}
    assert shown == {
        "temperature": "1",
        "max_tokens": "What fits",
        "top_p": "1",
        "top_k": "Off",
        "min_p": "Off",
        "seed": "Random",
    }


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "-1"), ("top_p", "1.5"), ("top_k", "0"), ("max_tokens", "2.5")]
)
def test_a_value_that_no_server_takes_is_shown_and_not_sent(page, server, name, value):
    page.click("#settings-button")
    fill(page, **{name: value})
    page.click("[data-close]")
    page.send("Hello")
    assert page.script("return document.activeElement.name") == name
    assert server.requests == []
    assert page.one("#prompt").get_attribute("value") == "Hello"


BLOCKED = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('', 'SecurityError'); } });"
FULL = "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); };"


@pytest.mark.parametrize("script", [BLOCKED, FULL], ids=["blocked", "full"])
def test_the_page_works_where_nothing_is_kept(page, script):
    added = page.chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        page.open()
        assert page.ask("Hello") == "You said: Hello"
        assert "does not keep chats" in page.one("#notice").text
        page.click("#new-button")
        page.click("#chats-button")
        assert page.texts(".chat-list .title") == ["Hello"]
    finally:
        page.chrome.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_the_oldest_chats_make_room(page):
    """The browser keeps about five million characters."""
    page.script(
        """
        for (const [id, updated] of [["old", 1], ["new", 2]]) {
            const messages = [{ role: "user", content: id + "x".repeat(2.4e6) }];
            localStorage.setItem(`page.chat.${id}`, JSON.stringify({ id, updated, messages }));
        }
        """
    )
    page.script("promptField.value = 'y'.repeat(1e6)")
    page.one("#prompt").send_keys(Keys.ENTER)
    page.finished()
    page.click("#chats-button")
    assert [title[:3] for title in page.texts(".chat-list .title")] == ["yyy", "new"]
    assert not page.all("#notice")


def test_what_is_stored_in_another_form_is_passed_over(page):
    page.script(
        """
        for (const [at, text] of ["", "{", "7", "null", "{}", '{"messages": [null, 3, {"role": "user"}]}'].entries()) {
            localStorage.setItem(`page.chat.${at}`, text);
        }
        localStorage.setItem("page.settings", "[1]");
        localStorage.setItem("page.theme", "pink");
        """
    )
    page.reload()
    assert page.ask("Hello") == "You said: Hello"


def test_two_tabs_show_the_same_chat(page):
    page.ask("First")
    first = page.chrome.current_window_handle
    page.chrome.switch_to.new_window("tab")
    page.visit(page.address)
    assert page.answers() == ["You said: First"]
    page.ask("Second")
    page.chrome.close()
    page.chrome.switch_to.window(first)
    page.wait(lambda: page.questions() == ["First", "Second"])
