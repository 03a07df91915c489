"""A real Chromium, and the console of a real receiver in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Receiver, eventually, free_ports
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

SCREENSHOTS = ROOT / "build" / "screenshots"
WIDE, PHONE = (1280, 800), (390, 844)
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --lang=en-US"
).split()


class Page:
    """The console as a person has it before them."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        self.excused: tuple[str, ...] = ()  # what may stand in the browser's console
        self.shape()

    def shape(self, size: tuple[int, int] = WIDE, *, dark: bool = False, scale: float = 1) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": scale}
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": size[0] < 600}
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self) -> Page:
        self.driver.get(self.url)
        self.until(lambda: self.text("state") not in ("", "Connecting"))
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, check: Callable[[], Any], seconds: float = 15) -> Any:
        return eventually(check, seconds, 0.05)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, identifier: str) -> str:
        return self.run("return document.getElementById(arguments[0]).textContent", identifier)

    def rows(self) -> list[list[str]]:
        """The table's cells as text, the top row first."""
        script = "return [...rows.rows].map(r => [...r.cells].map(c => c.textContent))"
        return self.run(script)

    def users(self) -> list[str]:
        return [row[2] for row in self.rows() if len(row) == 4]

    def filter(self, text: str) -> None:
        field = self.find("#filter")
        field.send_keys(Keys.CONTROL + "a", Keys.DELETE)
        field.send_keys(text)

    def screenshot(self, name: str) -> Path:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        assert self.driver.save_screenshot(str(path))
        return path

    def complaints(self) -> list[str]:
        """What the browser's console holds and the test did not expect."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        return [text for text in said if not any(each in text for each in self.excused)]

    def requested(self) -> list[str]:
        """The address of every request that the browser was asked to make."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    with tempfile.TemporaryDirectory(prefix="liveapi-chromium-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for each in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(each)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        yield driver
        driver.quit()


@pytest.fixture
def console_port() -> int:
    return next(free_ports(1))


@pytest.fixture
def watched(start: Callable[..., Receiver], console_port: int) -> Receiver:
    """A receiver with its console on `console_port`."""
    return start("--console", f"127.0.0.1:{console_port}")


@pytest.fixture
def page(chromium: webdriver.Chrome, watched: Receiver, console_port: int) -> Iterator[Page]:
    """The console, open and connected. No test may end with an error in the browser's console,
    or with a request to anywhere but this console."""
    chromium.get("about:blank")
    chromium.get_log("browser")
    chromium.get_log("performance")
    shown = Page(chromium, f"http://127.0.0.1:{console_port}/").open()
    shown.until(lambda: shown.text("state") == "Receiving")
    yield shown
    complaints, requested = shown.complaints(), shown.requested()
    shown.shape()
    chromium.get("about:blank")
    assert complaints == []
    assert requested
    assert [u for u in requested if not u.startswith((shown.url, "data:", "about:"))] == []
