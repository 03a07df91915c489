"""The console's stream and its guard, without a browser."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable

import pytest
from harness import Pair, Receiver, free_ports, signal_payload

from liveapi_server import ACCEPTED, FEED_LINES, Entry, Feed


@pytest.fixture
def console(start: Callable[..., Receiver]) -> tuple[Receiver, int]:
    (port,) = free_ports(1)
    return start("--console", str(port)), port


def events(port: int, count: int, last: str = "") -> list[str]:
    """The ids of the stream's first `count` events."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        resume = f"Last-Event-ID: {last}\r\n" if last else ""
        sock.sendall(f"GET /signals HTTP/1.1\r\nHost: localhost:{port}\r\n{resume}\r\n".encode())
        found: list[str] = []
        for line in sock.makefile("r", encoding="utf-8"):
            if line.startswith("id: "):
                found.append(line[4:].strip())
                if len(found) == count:
                    break
        return found


def test_the_stream_starts_with_the_last_hundred_and_resumes_after_an_id(
    console: tuple[Receiver, int], pair: Pair
) -> None:
    receiver, port = console
    for _ in range(120):
        assert receiver.post(pair, signal_payload()).status == 200
    ids = receiver.ids("my-app")
    assert events(port, 100) == ids[20:]
    assert events(port, 115, last=ids[4]) == ids[5:]


def test_a_watcher_that_falls_behind_is_skipped_ahead_and_told_how_far() -> None:
    feed = Feed()
    entries = [Entry(f"{n:032x}", b"{}\n", ACCEPTED, []) for n in range(FEED_LINES + 500)]
    feed.publish(entries)
    skipped, fresh = feed.since(0, 0)
    assert skipped == 500
    assert [identity for identity, _ in fresh] == [entry.identity for entry in entries[500:]]


@pytest.mark.parametrize("host", ["attacker.example", "attacker.example:{port}", "127.0.0.1"])
def test_the_console_answers_to_its_own_address_only(
    console: tuple[Receiver, int], host: str
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", console[1], timeout=10)
    connection.request("GET", "/status", headers={"Host": host.format(port=console[1])})
    assert connection.getresponse().status == 421
    connection.close()
