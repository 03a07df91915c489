"""A real Chromium, and the console of a real receiver in it."""

import tempfile
from collections.abc import Iterator

import pytest
from harness import Pair, Receiver, Start
from page import Page
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --lang=en-US"
).split()


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    with tempfile.TemporaryDirectory(prefix="liveapi-chromium-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for each in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(each)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        with webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver")) as driver:
            driver.get("about:blank")  # away from its own first page, which loads for long
            yield driver


@pytest.fixture
def watched(start: Start) -> Receiver:
    """A receiver with a console."""
    return start("--console", "0")


@pytest.fixture
def page(chromium: webdriver.Chrome, watched: Receiver, pair: Pair) -> Iterator[Page]:
    """The console, open and connected. No test may end with an error in the browser's console,
    or with a request to anywhere but this console."""
    shown = Page(chromium, f"http://127.0.0.1:{watched.console_port()}/", watched, pair)
    shown.complaints(), shown.requested()  # those of the test before
    yield shown.open()
    complaints, requested = shown.complaints(), shown.requested()
    chromium.get("about:blank")
    assert complaints == []
    assert requested
    assert [u for u in requested if not u.startswith((shown.url, "data:", "about:"))] == []
