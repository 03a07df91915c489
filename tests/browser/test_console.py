"""The console's page in a real Chromium: what an operator sees, and what strangers cannot do."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

import axe_core_python
import pytest
from conftest import PHONE, WIDE, Page
from harness import PROGRAM, Pair, Receiver, signal_payload
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

EVENT = "re.notifica.event."
HOSTILE = {
    "markup": "<script>window.taken = 1</script><img src=x onerror='window.taken = 2'>",
    "attribute": "\" autofocus onfocus='window.taken = 3' x=\"",
    "closing": "</td></table></script><style>* { display: none }</style>",
    "entity": "&lt;b&gt;",
    "right_to_left": "\u202egpj.exe\u202c and \u2066isolated\u2069",
    "control": "\u0000\u0007\u001b[31m\u007f\u0085\u2028",
    "surrogate": "\ud800",
    "url": "javascript:window.taken=4",
}


def post_all(receiver: Receiver, pair: Pair, payloads: list[bytes]) -> None:
    """Post them one after the other on one connection."""
    connection = receiver.connect()
    for payload in payloads:
        assert receiver.post(pair, payload, connection=connection).status == 200
    connection.close()


def numbered(first: int, beyond: int, **more: Any) -> list[bytes]:
    return [signal_payload(userID=f"user-{n:05}", **more) for n in range(first, beyond)]


def names(first: int, beyond: int) -> list[str]:
    """The users of `numbered`, in the order in which the page shows them."""
    return [f"user-{n:05}" for n in reversed(range(first, beyond))]


def test_signals_appear_newest_first_with_time_type_user_and_instance(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    post_all(watched, pair, numbered(0, 5))
    page.until(lambda: page.users() == names(0, 5))
    time_cell, type_cell, user, instance = page.rows()[0]
    assert (type_cell, user, instance) == ("notification.Open", "user-00004", "my-app")
    local = page.run(
        "return new Date(arguments[0]).toTimeString().slice(0, 8)",
        watched.lines("my-app")[-1]["received_at"],
    )
    assert re.fullmatch(re.escape(local) + r"\.\d{3}", time_cell)
    assert page.find("#rows button").get_attribute("title") == EVENT + "notification.Open"


def test_a_signal_without_a_user_shows_its_device(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    watched.post(pair, signal_payload(deviceID="09260d8b1de06f3a948c516a"))
    page.until(lambda: page.users() == ["device 09260d8b1de06f3a948c516a"])


def test_an_encrypted_signal_appears_in_clear_and_a_repeat_does_not_appear_again(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    payload = signal_payload(userID="first")
    watched.post_encrypted(pair, payload)
    watched.post(pair, payload)
    watched.post(pair, signal_payload(userID="second"))
    page.until(lambda: page.users() == ["second", "first"])


def test_a_page_opened_late_starts_with_the_last_hundred(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    post_all(watched, pair, numbered(0, 130))
    page.until(lambda: len(page.rows()) == 130)
    page.open()
    page.until(lambda: page.users() == names(30, 130))


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("jörg", ["JÖRG@example.com"]),
        ("jörg zürich", ["JÖRG@example.com"]),
        ("application", ["ana@example.com"]),
        ("9c516a", ["ana@example.com"]),
        ("https://shop", ["ana@example.com"]),
        ("my-app", ["ana@example.com", "JÖRG@example.com"]),
        ("no such text", []),
    ],
)
def test_the_filter_finds_any_text_of_the_line_as_it_is_typed(
    page: Page, watched: Receiver, pair: Pair, typed: str, found: list[str]
) -> None:
    post_all(
        watched,
        pair,
        [
            b'{"type":"re.notifica.event.email.Bounce","data":{"userID":"J\\u00d6RG@example.com",'
            b'"city":"Z\\u00fcrich"}}',
            b'{"type":"re.notifica.event.application.Open","data":{"userID":"ana@example.com",'
            b'"deviceID":"0c9c516a","from":"https:\\/\\/shop.example"}}',
        ],
    )
    page.until(lambda: len(page.rows()) == 2)
    page.filter(typed)
    page.until(lambda: page.users() == found)
    page.filter("")
    page.until(lambda: len(page.rows()) == 2)


def test_new_signals_pass_through_the_filter_too(page: Page, watched: Receiver, pair: Pair) -> None:
    page.filter("blue")
    post_all(watched, pair, [signal_payload(userID=name) for name in ("blue 1", "red", "blue 2")])
    page.until(lambda: page.users() == ["blue 2", "blue 1"])


def test_pause_holds_the_view_and_loses_nothing(page: Page, watched: Receiver, pair: Pair) -> None:
    post_all(watched, pair, numbered(0, 3))
    page.until(lambda: len(page.rows()) == 3)
    page.find("#pause").click()
    post_all(watched, pair, numbered(3, 40))
    page.until(lambda: page.text("pause") == "Resume (37 new)")
    assert page.users() == names(0, 3)
    page.filter("user-0000")  # a filter changes what is shown of the time before the pause
    assert page.users() == names(0, 3)
    page.filter("")
    page.find("#pause").click()
    page.until(lambda: page.users() == names(0, 40))
    assert page.text("pause") == "Pause"


def test_a_click_shows_the_whole_signal_token_for_token(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    payload = (
        b'{"type":"re.notifica.event.custom.x","data":{"big":12345678901234567890,"e":1e400,'
        b'"price":0.10,"twice":1,"twice":2,"list":[],"more":[1,{"a":"say \\"{[,]}\\" \\\\"}]}}'
    )
    watched.post(pair, payload)
    page.until(page.rows)
    page.find("#rows td:nth-child(3)").click()
    shown = page.text("whole")
    outside_strings = r'("(?:[^"\\]|\\.)*")|\s+'
    again = re.sub(outside_strings, lambda match: match[1] or "", shown)
    assert again.encode() == watched.raw("my-app").strip()
    assert '\n    "data": {\n      "big": 12345678901234567890,\n' in shown
    assert page.text("title") == EVENT + "custom.x"
    page.find("#close").click()
    assert not page.find("#detail").is_displayed()


def test_everything_can_be_done_with_the_keyboard(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    post_all(watched, pair, numbered(0, 3))
    page.until(lambda: len(page.rows()) == 3)

    def press(*keys: str) -> str:
        ActionChains(page.driver).send_keys(*keys).perform()
        return page.run("return document.activeElement.id || document.activeElement.tagName")

    page.find("#filter").click()
    assert press(Keys.TAB) == "pause"
    press(Keys.SPACE)
    assert page.find("#pause").get_attribute("aria-pressed") == "true"
    press(Keys.SPACE)
    press(Keys.TAB)
    press(Keys.ARROW_DOWN, Keys.ENTER)
    page.until(page.find("#detail").is_displayed)
    assert '"user-00001"' in page.text("whole")
    press(Keys.ESCAPE)
    assert not page.find("#detail").is_displayed()
    assert page.run("return document.activeElement.closest('tr').cells[2].textContent") == (
        "user-00001"
    )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_after_a_restart_it_reconnects_by_itself_and_fills_the_gap(
    page: Page,
    watched: Receiver,
    pair: Pair,
    start: Callable[..., Receiver],
    console_port: int,
    how: signal.Signals,
) -> None:
    page.excused = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED", "ERR_CONNECTION_RESET",
                    "ERR_EMPTY_RESPONSE")  # fmt: skip
    post_all(watched, pair, numbered(0, 10))
    page.until(lambda: len(page.rows()) == 10)
    watched.stop(how)
    page.until(lambda: page.text("state") == "No connection, trying again")
    assert page.driver.title.startswith("(!)")
    unwatched = start(port=watched.port)  # the page cannot reach this one
    post_all(unwatched, pair, numbered(10, 160))
    unwatched.stop()
    again = start("--console", f"127.0.0.1:{console_port}", port=watched.port)
    page.until(lambda: page.text("state") == "Receiving")
    post_all(again, pair, numbered(160, 165))
    page.until(lambda: page.users() == names(0, 165))


def test_a_hostile_signal_is_shown_as_text(page: Page, watched: Receiver, pair: Pair) -> None:
    for text in HOSTILE.values():
        body = {"type": text, "data": {"userID": text, "deviceID": text, text: [text]}}
        assert watched.post(pair, json.dumps(body).encode()).status == 200
    page.until(lambda: len(page.rows()) == len(HOSTILE))
    for index, text in enumerate(reversed(HOSTILE.values())):
        page.run("document.querySelectorAll('#rows tr')[arguments[0]].click()", index)
        shown = page.text("whole")
        page.run("document.getElementById('close').click()")
        if text.isascii() and text.isprintable():
            assert page.rows()[index][1:3] == [text, text]
        assert json.dumps(text) in shown
    page.until(
        lambda: (
            len(page.run("return [...document.querySelectorAll('#types button')]")) == len(HOSTILE)
        )
    )
    # The page's own row: four cells and a button, and nothing in any of them but text.
    row = ["TD", "TD", "BUTTON", "TD", "TD"]
    inside = "[...document.querySelectorAll(arguments[0])].map(made => made.tagName)"
    assert page.run(f"return {inside}", "#rows tr *") == row * len(HOSTILE)
    assert page.run(f"return {inside}", "#types *") == ["BUTTON", "SPAN", "SPAN"] * len(HOSTILE)
    assert page.run(f"return {inside}", "#whole *") == []
    assert page.run("return window.taken === undefined")
    assert page.run("return document.querySelectorAll('img, iframe, script[src]').length") == 0
    assert page.driver.title == "Live API receiver"


def test_direction_and_control_characters_sent_raw_are_shown_as_escapes(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    watched.post(pair, signal_payload(userID=HOSTILE["right_to_left"] + "\u0085\u2028\u200f"))
    page.until(page.rows)
    escaped = r"\u202egpj.exe\u202c and \u2066isolated\u2069\u0085\u2028\u200f"
    assert page.users() == [escaped]
    page.find("#rows button").click()
    assert escaped in page.text("whole")


def test_giant_and_strange_signals_do_not_break_it(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    giant = "W" * 900_000
    strange = [
        b"{}",
        b'{"type":null,"data":null}',
        b'{"type":{"a":1},"data":["userID"]}',
        b'{"type":7,"data":{"userID":{"x":[1]},"deviceID":0}}',
        b'{"__proto__":{"type":"x"},"constructor":1,"data":{"__proto__":null}}',
        json.dumps({"type": "many", "data": list(range(100_000))}).encode(),
        json.dumps({"type": EVENT + "custom.giant", "data": {"userID": giant}}).encode(),
    ]
    post_all(watched, pair, strange)
    page.until(lambda: len(page.rows()) == len(strange))
    assert all(len(cell) < 300 for row in page.rows() for cell in row)
    for index in range(len(strange)):
        page.run("document.querySelectorAll('#rows tr')[arguments[0]].click()", index)
        assert page.find("#detail").is_displayed()
        if index == 0:
            assert giant in page.text("whole")
        page.run("document.getElementById('close').click()")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")


def test_ten_thousand_signals_do_not_make_it_slow(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    page.run(
        "window.gaps = []; let before = performance.now();"
        "requestAnimationFrame(function next(now) {"
        " gaps.push(now - before); before = now; requestAnimationFrame(next) })"
    )
    began = time.monotonic()
    with ThreadPoolExecutor(4) as posting:
        for first in range(0, 10_400, 800):  # no faster than a watcher is given them
            ends = time.monotonic() + 0.25
            each = [numbered(n, n + 200) for n in range(first, first + 800, 200)]
            list(posting.map(partial(post_all, watched, pair), each))
            time.sleep(max(0, ends - time.monotonic()))
    seconds = time.monotonic() - began
    page.until(lambda: page.text("shown") == "200 shown of the last 10,000 signals", 60)
    worst = page.run("return Math.max(...gaps)")
    elements = page.run("return document.querySelectorAll('*').length")
    took = page.run(
        "const began = performance.now(); filter.value = arguments[0];"
        "filter.dispatchEvent(new Event('input')); rows.offsetHeight;"
        "return performance.now() - began",
        "user-05123",
    )
    print(
        f"10,400 signals in {seconds:.1f} s; longest time between two frames {worst:.0f} ms;"
        f" {elements} elements; a filter over 10,000 took {took:.0f} ms"
    )
    assert page.users() == ["user-05123"]
    assert elements < 2000
    assert worst < 1000
    assert took < 500


def test_counts_by_type_are_kept_and_choose_the_filter(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    for kind, number in (("notification.Open", 3), ("application.Open", 2), ("custom.sale", 1)):
        post_all(watched, pair, numbered(0, number, type=EVENT + kind))
    counts = (
        "return [...document.querySelectorAll('#types button')].map(b => b.innerText.split(/\\s+/))"
    )
    wanted = [["notification.Open", "3"], ["application.Open", "2"], ["custom.sale", "1"]]
    page.until(lambda: page.run(counts) == wanted)
    page.find("#types button:nth-child(2)").click()
    page.until(lambda: [row[1] for row in page.rows()] == ["application.Open"] * 2)
    assert page.find("#types button:nth-child(2)").get_attribute("aria-pressed") == "true"
    page.find("#types button:nth-child(2)").click()
    page.until(lambda: len(page.rows()) == 6)


def test_the_rate_of_the_last_minutes_is_drawn(page: Page, watched: Receiver, pair: Pair) -> None:
    post_all(watched, pair, numbered(0, 20))
    page.until(lambda: page.text("rate").startswith("20 signals, peak "))
    assert page.run("return document.getElementById('bars').getBBox().height > 9")


def test_the_state_of_each_instance_is_shown_with_refusals_by_reason(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    assert "not since the start" in page.text("instances")
    watched.verify(pair)
    payload = signal_payload()
    for _ in range(3):
        watched.post(pair, payload)
    watched.post(pair, b"no JSON")
    watched.post(pair, b"{}", **{"x-notificare-signature": "AAAA"})
    watched.post(Pair("stranger"), b"{}")
    page.until(lambda: "invalid public key" in page.text("instances"))
    facts = page.run(
        "return Object.fromEntries([...document.querySelectorAll('#instances dt')]"
        ".map(dt => [dt.textContent, dt.nextSibling.textContent]))"
    )
    assert re.fullmatch(r"\d+ s ago", facts.pop("Verified"))
    assert re.fullmatch(r"\d+ s ago", facts.pop("Last signal"))
    assert re.fullmatch(r"my-app\.jsonl, \d+ KiB", facts.pop("Segment"))
    assert facts == {
        "Stored": "1",
        "Repeated": "2",
        "Set aside": "1",
        "invalid signature": "1",
        "invalid public key": "1",
    }
    assert pair.private not in page.driver.page_source
    assert pair.public not in page.driver.page_source


def test_a_receiver_that_cannot_store_is_shown_in_red(
    chromium: webdriver.Chrome, start: Callable[..., Receiver], pair: Pair, console_port: int
) -> None:
    full = start("--console", f"127.0.0.1:{console_port}", wrapper=("prlimit", "--fsize=2000"))
    shown = Page(chromium, f"http://127.0.0.1:{console_port}/").open()
    shown.until(lambda: shown.text("state") == "Receiving")
    assert full.post(pair, signal_payload(text="x" * 3000)).status == 503
    shown.until(lambda: shown.text("state") == "Signals cannot be stored")
    assert shown.find("#state").get_attribute("class") == "bad"
    assert shown.driver.title.startswith("(!)")
    assert shown.rows() == []


def test_a_watcher_that_was_skipped_ahead_is_told_so(chromium: webdriver.Chrome) -> None:
    html = PROGRAM.read_text().partition('CONSOLE_PAGE = r"""')[2].partition('"""')[0]
    line = '{"received_at":"2026-11-23T18:00:0%d.000000Z","instance":"a","id":"%d","signal":{}}'
    events = f'id: 1\ndata: {line % (1, 1)}\n\nevent: skipped\ndata: {{"skipped": 1234}}\n\n'
    events += f"id: 2\ndata: {line % (2, 2)}\n\n: kept open\n\n"
    over = threading.Event()

    class Stub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            stream = self.path == "/signals"
            self.send_header("content-type", "text/event-stream" if stream else "text/html")
            self.end_headers()
            self.wfile.write((events if stream else html).encode())
            if stream:
                self.wfile.flush()
                over.wait(20)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        shown = Page(chromium, f"http://127.0.0.1:{server.server_port}/").open()
        shown.until(lambda: len(shown.rows()) == 3)
        assert shown.rows()[1] == ["1,234 signals skipped: this page was too slow for them"]
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def fill(receiver: Receiver, pair: Pair) -> None:
    """Signals of many kinds, some refusals and a repeat, spread over some seconds."""
    receiver.verify(pair)
    users = ("ana@example.com", "joris@example.com", "li.wei@example.com", None, "noor@example.com")
    kinds = (
        "application.Open", "notification.Sent", "notification.Receive", "notification.Open",
        "region.Session", "inappmessage.View", "notification.Open", "email.LinkTracked",
        "product.Buy", "custom.checkout", "scannable.Scan", "pass.Add", "sms.Incoming",
        "notification.Influenced", "link.Click",
    )  # fmt: skip
    for n in range(90):
        data: dict[str, Any] = {"deviceID": f"{n * 0x9E3779B97F4A7C15 + 7:024x}"[-24:]}
        if users[n * 7 % 5]:
            data["userID"] = users[n * 7 % 5]
        data["data"] = {"campaign": "autumn", "amount": n / 4}
        payload = signal_payload(type=EVENT + kinds[n * 11 % len(kinds)], **data)
        assert receiver.post(pair, payload).status == 200
        time.sleep(0.02 + 0.12 * (n % 7 == 3))
    receiver.post(pair, payload)
    receiver.post(pair, payload, **{"x-notificare-signature": "AAAA"})
    receiver.post(Pair("stranger"), payload)


def test_it_is_readable_wide_and_narrow_light_and_dark(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    """No sideways scrolling, no fault that axe finds; the screenshots are for people."""
    fill(watched, pair)
    source = resources.files(axe_core_python).joinpath("axe.min.js").read_text()
    for size, width in ((WIDE, "wide"), (PHONE, "narrow"), ((320, 600), "smallest")):
        for dark in (False, True):
            page.shape(size, dark=dark)
            page.open()
            page.until(lambda: len(page.rows()) == 90 and page.text("state") == "Receiving")
            page.until(lambda: "invalid public key" in page.text("instances"))
            name = f"{width}-{'dark' if dark else 'light'}"
            page.screenshot(name)
            assert page.run("return document.documentElement.scrollWidth <= innerWidth"), name
            page.run(source)
            check = "axe.run().then(r => arguments[0](r.violations))"
            assert [(v["id"], v["nodes"][0]["html"], v["nodes"][0]["failureSummary"])
                    for v in page.driver.execute_async_script(check)] == []  # fmt: skip
            page.find("#rows button").click()
            page.screenshot(f"{name}-detail")
            page.run(source)
            assert page.driver.execute_async_script(check) == []


def test_a_screen_reader_is_told_of_new_signals_now_and_then(
    page: Page, watched: Receiver, pair: Pair
) -> None:
    page.run(
        "window.told = []; new MutationObserver(() => told.push(said.textContent))"
        ".observe(said, {childList: true})"
    )
    for _ in range(5):
        post_all(watched, pair, numbered(0, 20))
        time.sleep(0.3)
    page.until(lambda: page.run("return told"), 20)
    assert page.run("return told") == ["100 new signals"]
    assert page.find("#said").get_attribute("role") == "status"


def test_the_page_may_run_its_own_script_alone(
    page: Page, watched: Receiver, pair: Pair, console_port: int
) -> None:
    connection = watched.connect()
    connection.port = console_port
    answer = watched.request("GET", "/", connection=connection)
    policy = dict(each.strip().split(" ", 1) for each in
                  answer.headers["content-security-policy"].split(";"))  # fmt: skip
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    page.excused = ("Content Security Policy",)
    page.run(
        "const made = document.createElement('script'); made.textContent = 'window.taken = 1';"
        "document.body.append(made); document.body.insertAdjacentHTML('beforeend',"
        " '<img src=x onerror=\"window.taken = 2\">');"
    )
    time.sleep(0.3)
    assert page.run("return window.taken === undefined")
