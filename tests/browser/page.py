"""The console as a person has it before them, in a real Chromium."""

import json
from collections.abc import Callable
from typing import Any

from disks import store
from harness import Pair, Receiver, eventually
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

WIDE, PHONE, SMALLEST = (1280, 800), (390, 844), (320, 600)


class Page:
    """One tab that shows the console of a receiver."""

    def __init__(self, driver: webdriver.Chrome, receiver: Receiver, pair: Pair) -> None:
        self.driver, self.run = driver, driver.execute_script
        self.receiver, self.pair = receiver, pair
        self.url = f"http://127.0.0.1:{receiver.console_port()}/"
        self.excused: tuple[str, ...] = ()  # what may stand in the browser's console

    def open(self, size: tuple[int, int] = WIDE, dark: bool = False, zone: str = "UTC") -> "Page":
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        for command, options in (
            ("setDeviceMetricsOverride", {**metrics, "mobile": size[0] < 600}),
            ("setEmulatedMedia", {"features": [scheme]}),
            ("setTimezoneOverride", {"timezoneId": zone}),
        ):
            self.driver.execute_cdp_cmd(f"Emulation.{command}", options)
        self.driver.get(self.url)
        self.says("state", "Receiving")
        return self

    def post(self, *payloads: bytes) -> None:
        store(self.receiver, self.pair, *payloads)

    def until(self, check: Callable[[], Any], seconds: float = 20) -> Any:
        return eventually(check, seconds, 0.05)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, identifier: str) -> str:
        return self.run("return document.getElementById(arguments[0]).textContent", identifier)

    def says(self, identifier: str, text: str) -> None:
        self.until(lambda: self.text(identifier) == text)

    def column(self, number: int) -> list[str]:
        """Of the rows that are shown, the top one first: received, instance, type, or user."""
        cells = "[...document.querySelectorAll('#rows > :not([hidden]) summary')]"
        return self.run(f"return {cells}.map(row => row.children[{number}].textContent)")

    def users(self) -> list[str]:
        return self.column(3)

    def shows(self, users: list[str], seconds: float = 20) -> None:
        """Wait until these users, and no other, are shown."""
        self.until(lambda: self.users() == users, seconds)

    def facts(self) -> list[dict[str, str]]:
        """The figures: of the receiver, then of each instance."""
        return self.run(
            "return [...document.querySelectorAll('dl')].map(dl => Object.fromEntries("
            "[...dl.children].map(each => [...each.children].map(it => it.textContent.trim()))))"
        )

    def polled(self, times: int) -> None:
        """Wait until the figures have been asked for so many times more."""
        asked = "return performance.getEntriesByName(location + 'status').length"
        enough = self.run(asked) + times
        self.until(lambda: self.run(asked) >= enough)

    def whole(self, row: int) -> list[str]:
        """The delay and the line of a row, as a click on it shows them; it is closed again."""
        click, inside = f"rows.children[{row}].firstChild.click()", "#rows > [open] > :not(summary)"
        self.run(click)
        shown = [e.get_property("textContent") for e in self.all(inside) if e.is_displayed()]
        self.run(click)
        return shown

    def filter(self, text: str) -> None:
        self.find("#filter").send_keys(Keys.CONTROL + "a" + Keys.NULL + Keys.DELETE + text)

    def complaints(self) -> list[str]:
        """What the browser's console holds and the test did not expect."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        return [text for text in said if not any(each in text for each in self.excused)]

    def requested(self) -> list[str]:
        """The address of every request that the browser was asked to make."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]
