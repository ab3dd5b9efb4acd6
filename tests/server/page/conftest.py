"""The page in a headless browser, in front of a server whose replies are written in the test."""

from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome

from tests.helpers.browser import browser
from tests.helpers.page_driver import PageDriver
from tests.helpers.scripted_server import ScriptedServer, serving


@pytest.fixture(scope="session")
def chrome() -> Iterator[Chrome]:
    with browser() as started:
        yield started


@pytest.fixture(scope="session")
def started() -> Iterator[tuple[ScriptedServer, str]]:
    server = ScriptedServer()
    with serving(server) as address:
        yield server, address


@pytest.fixture
def server(started: tuple[ScriptedServer, str]) -> ScriptedServer:
    server, _ = started
    server.reset()
    return server


@pytest.fixture
def page(chrome: Chrome, server: ScriptedServer, started: tuple[ScriptedServer, str]) -> Iterator[PageDriver]:
    """The page, opened for the first time, on a wide screen; its console must stay empty."""
    driver = PageDriver(chrome, started[1])
    driver.forget()
    driver.open()
    yield driver
    chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert driver.unexpected_log() == []
