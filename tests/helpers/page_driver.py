"""What a person does on the page, and what it shows, through a browser."""

from collections.abc import Callable
from typing import Any

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

PATIENCE = 30.0  # seconds; only a test that fails waits for so long


class PageDriver:
    """The page in a browser. `failures` are texts of the network errors that a test expects in the console."""

    def __init__(self, chrome: Chrome, address: str) -> None:
        self.chrome = chrome
        self.address = address
        self.failures: list[str] = []

    def open(self, view: str = "") -> None:
        """Load the page anew."""
        self.chrome.get("about:blank")
        self.visit(f"{self.address}/{view}")

    def visit(self, address: str) -> None:
        """Load a page at any address."""
        self.chrome.get(address)
        self._drawn()

    def forget(self) -> None:
        """Empty the browser's storage for the page."""
        self.open()
        self.script("localStorage.clear(); sessionStorage.clear()")
        self.chrome.get("about:blank")  # the page might store what it holds as it closes
        self.chrome.get_log("browser")

    def reload(self) -> None:
        """Load the page again, as F5 does."""
        self.chrome.refresh()
        self._drawn()

    def _drawn(self) -> None:
        """Wait until the page has been drawn: the browser drops keys that come before."""
        self.script("return new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")

    def script(self, text: str, *arguments: object) -> Any:
        """The result of JavaScript in the page."""
        return self.chrome.execute_script(text, *arguments)

    def wait(self, condition: Callable[[], Any]) -> Any:
        """The condition's first true value."""
        redrawn = [StaleElementReferenceException]  # an element that went while it was looked at
        return WebDriverWait(self.chrome, PATIENCE, 0.02, redrawn).until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        """The elements of a selector that are seen, all at one moment."""
        return self.script(
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter((found) => found.checkVisibility({ visibilityProperty: true }))",
            selector,
        )

    def one(self, selector: str) -> WebElement:
        """The one seen element of a selector, once there is one."""
        (found,) = self.wait(lambda: self.all(selector))
        return found

    def click(self, selector: str) -> None:
        """Click the one seen element of a selector."""
        self.one(selector).click()

    def button(self, name: str, within: str = "body") -> WebElement:
        """The last button with an accessible name inside a selector."""
        return self.wait(lambda: [found for found in self.all(f"{within} button") if found.accessible_name == name])[-1]

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        ActionChains(self.chrome).send_keys(*keys).perform()

    def press_with_shift(self, key: str) -> None:
        """Press a key while Shift is held."""
        ActionChains(self.chrome).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def send(self, text: str) -> None:
        """Write a message and send it with Enter."""
        self.one("#prompt").send_keys(text, Keys.ENTER)

    def ask(self, text: str) -> str:
        """Send a message, and return the answer once it is complete."""
        before = len(self.answers())
        self.send(text)
        self.wait(lambda: len(self.answers()) > before and not self.streaming())
        return self.answers()[-1]

    def streaming(self) -> bool:
        """Whether an answer is being written."""
        return bool(self.all("#stop-button"))

    def finished(self) -> None:
        """Wait until no answer is being written."""
        self.wait(lambda: not self.streaming())

    def texts(self, selector: str) -> list[str]:
        """The texts of a selector's elements, read at one moment."""
        return self.script(
            "return [...document.querySelectorAll(arguments[0])].filter((found) => found.checkVisibility())"
            ".map((found) => found.innerText)",
            selector,
        )

    def answers(self) -> list[str]:
        """The answers' texts."""
        return self.script(
            "return [...document.querySelectorAll('.message.assistant > .text')].map((found) => found.innerText)"
        )

    def questions(self) -> list[str]:
        """The questions' texts."""
        return self.texts(".bubble")

    def unexpected_log(self) -> list[str]:
        """Lines of the console that no test expects; reading empties it."""
        lines = [entry["message"] for entry in self.chrome.get_log("browser")]
        return [line for line in lines if not any(failure in line for failure in self.failures)]
