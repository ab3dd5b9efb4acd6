"""How the page looks and is reached: light and dark, a phone's width, the keyboard, scrolling."""

import threading

import pytest
from selenium.webdriver import Keys

from tests.helpers.scripted_server import Reply, chunk, refuses, says

WIDE = (
    """A line with averyveryverylongword"""
    + "x" * 300
    + f"""

```
{"code " * 60}
```

| {" | ".join(f"column{number}" for number in range(12))} |
|{"---|" * 12}
| {" | ".join("cell" for _ in range(12))} |

1. - > `{"y" * 200}`
"""
)
PHONE = {"height": 640, "deviceScaleFactor": 2, "mobile": True}
# Elements that stick out on the right of the window, but for those inside something that scrolls or is cut off.
STICKING_OUT = """
return [...document.body.querySelectorAll("*")].filter((found) => {
    const box = found.getBoundingClientRect();
    if (!found.checkVisibility() || (box.right <= innerWidth + 0.5 && box.left >= -0.5)) return false;
    for (let outer = found.parentElement; outer !== document.body; outer = outer.parentElement) {
        if (getComputedStyle(outer).overflowX !== "visible") return false;
    }
    return true;
}).map((found) => `${found.tagName} ${found.className} ${found.id}`);
"""


def emulate(page, **features):
    listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})


def background(page):
    """The brightest part of the page's background colour."""
    colour = page.script("return getComputedStyle(document.body).backgroundColor")
    return max(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_the_theme_is_the_systems_until_one_is_chosen(page):
    emulate(page, prefers_color_scheme="light")
    assert background(page) > 200
    emulate(page, prefers_color_scheme="dark")
    assert background(page) < 50
    assert page.one("#theme-button").get_attribute("aria-pressed") == "true"
    page.click("#theme-button")
    assert background(page) > 200
    page.reload()
    assert background(page) > 200
    assert page.one("#theme-button").get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("width", [360, 320])
def test_nothing_scrolls_sideways_on_a_phone(page, server, width):
    """The narrower one is that of WCAG 2.2, 1.4.10."""
    page.failures.append("status of 400")
    server.replies.extend([says(WIDE), refuses(400, "z" * 200)])
    server.live = {**server.live, "model": "m" * 100, "waiting": 10**9, "queued_tokens": 10**12}
    page.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**PHONE, "width": width})
    page.ask("u" * 200)
    page.ask("w " * 200)
    for step in (
        "#settings-button",
        "#settings-panel [data-close]",
        "#chats-button",
        "#chats-panel [data-close]",
        "#tab-server",
    ):
        page.click(step)
        page.wait(lambda: page.script("return document.fonts.status") == "loaded")
        assert page.script("return document.documentElement.scrollWidth <= innerWidth")
        assert page.script("return scroller.scrollWidth <= scroller.clientWidth")
        assert page.script(STICKING_OUT) == []
    page.wait(lambda: page.texts("#server-model") == ["m" * 100])
    assert page.script("return byId('view-server').scrollWidth <= byId('view-server').clientWidth")


def test_code_scrolls_inside_its_block(page, server):
    server.replies.append(says(WIDE))
    page.ask("Hello")
    inner, outer = page.script("const pre = document.querySelector('pre'); return [pre.scrollWidth, pre.clientWidth]")
    assert inner > outer
    page.one("pre").send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.script("return document.querySelector('pre').scrollLeft") > 0)


def test_everything_is_reached_by_keyboard(page):
    """Tab visits every control that is seen, in the order of the page, and shows where it is."""
    page.ask("Hello")
    page.click("#settings-button")
    page.click("#chats-button")
    page.script("document.activeElement.blur(); getSelection().removeAllRanges()")
    page.script("const skip = document.querySelector('.skip'); skip.focus(); skip.blur()")
    page.press(*[Keys.TAB] * 5)
    expected = page.script(
        """
        window.controls = [...document.querySelectorAll("a, button, input, textarea, summary, [tabindex='0']")]
            .filter((found) => found.checkVisibility({ visibilityProperty: true }) && !found.disabled);
        return controls.length;
        """
    )
    seen = []
    for _ in range(expected + 2):
        page.press(Keys.TAB)
        at, marked = page.script(
            """
            const found = document.activeElement;
            const style = getComputedStyle(found), outer = getComputedStyle(found.parentElement);
            return [controls.indexOf(found), style.outlineStyle !== "none" || outer.boxShadow !== "none"];
            """
        )
        if at >= 0:
            seen.append(at)
            assert marked, at
    assert set(seen) == set(range(expected))


def test_a_conversation_by_keyboard_alone(page, server):
    page.press("One")
    page.press_with_shift(Keys.ENTER)
    page.press("two", Keys.ENTER)
    page.wait(lambda: page.questions() == ["One\ntwo"])
    page.finished()
    page.press_with_shift(Keys.TAB)  # back to the last button of the answer: try again
    page.press(Keys.ENTER)
    page.wait(lambda: len(server.requests) == 2)
    page.finished()
    assert page.script("return document.activeElement.id") == "prompt"


def test_enter_of_an_input_method_does_not_send(page, server):
    page.one("#prompt").send_keys("にほん")
    page.script(
        "promptField.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    page.send("ご")
    page.finished()
    assert [body["messages"][-1]["content"] for body in server.requests] == ["にほんご"]


def test_escape_closes_a_panel_and_returns_to_its_button(page):
    page.click("#settings-button")
    page.press(Keys.ESCAPE)
    assert not page.all("#settings-panel")
    assert page.script("return document.activeElement.id") == "settings-button"


def test_the_end_stays_in_view_until_one_scrolls_up(page, server):
    lines = [f"line {number}\n\n" for number in range(150)]
    server.replies.append(says(*lines, pause=0.02))
    page.send("Write")
    page.wait(lambda: "line 60" in page.answers()[0])
    from_end = "return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"
    assert page.script(from_end) < 100
    assert not page.all("#latest-button")
    page.one("#scroller").send_keys(Keys.PAGE_UP)
    page.one("#latest-button")
    top = page.wait(lambda: (first := page.script("return scroller.scrollTop")) and _still(page, first))
    page.wait(lambda: "line 120" in page.answers()[0])
    assert page.script("return scroller.scrollTop") == top
    page.click("#latest-button")
    page.finished()
    assert page.script(from_end) <= 1


def test_the_place_is_kept_while_the_server_is_looked_at(page, server):
    server.replies.append(says(*[f"line {number}\n\n" for number in range(100)]))
    page.ask("Write")
    top = "return scroller.scrollTop"
    page.script("scroller.scrollTop = 500")
    page.one("#latest-button")
    _look_at_the_server(page)
    assert page.script(top) == 500
    page.click("#latest-button")
    end = page.script(top)
    _look_at_the_server(page)
    assert page.script(top) == end > 1000


def _look_at_the_server(page):
    """Go to the other view and come back; a view changes some time after the click."""
    page.click("#tab-server")
    page.one("#view-server")
    page.click("#tab-chat")
    page.one("#scroller")


def _still(page, top):
    """The position, once smooth scrolling has come to rest there."""
    page.script("return new Promise((resolve) => setTimeout(resolve, 200))")
    return top if page.script("return scroller.scrollTop") == top else None


def test_nothing_jumps_while_an_answer_comes(page, server):
    """The sum of layout shifts stays under 0.1, which https://web.dev/articles/cls calls good."""
    page.script(
        """
        window.shifts = 0;
        new PerformanceObserver((list) => { for (const entry of list.getEntries()) shifts += entry.value; })
            .observe({ type: "layout-shift" });
        """
    )
    server.replies.append(Reply([chunk(content=f"word{number} ") for number in range(100)] + says().pieces[1:], 0.01))
    page.ask("Write")
    page.ask("And again")
    assert page.script("return shifts") < 0.1


def test_a_screen_reader_is_told(page, server):
    told = threading.Event()
    server.replies.append(says("One", told))
    page.send("Hello")
    page.wait(lambda: page.script("return byId('announcement').textContent") == "The answer is being written")
    assert page.one(".message.assistant").get_attribute("aria-busy") == "true"
    told.set()
    page.finished()
    assert page.script("return byId('announcement').textContent") == "The answer is complete"
    assert page.one(".message.assistant").get_attribute("aria-busy") == "false"


def test_copy_puts_the_markdown_on_the_clipboard(page, server):
    """Also where the newer interface is refused, as on plain HTTP from another machine."""
    page.chrome.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite"], "origin": page.address}
    )
    server.replies.append(says("Some **bold** text\n\n```py\nx = 1\n```"))
    page.ask("Hello")
    read = "return navigator.clipboard.readText()"
    page.button("Copy", ".message.assistant .row").click()
    page.wait(lambda: page.script(read) == "Some **bold** text\n\n```py\nx = 1\n```")
    page.script("navigator.clipboard.writeText = () => Promise.reject(new Error())")
    page.button("Copy", ".code").click()
    page.wait(lambda: page.script(read) == "x = 1")
