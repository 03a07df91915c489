"""The promise that matters most: what was acknowledged is on disk once, whatever ends the process.

LIVEAPI_TEST_KILLS and LIVEAPI_TEST_TERMS set how often it is ended (20 and 5 unless told
otherwise), LIVEAPI_TEST_SEED the moments at which it happens.
"""

from __future__ import annotations

import http.client
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import ACCEPTED, Pair, Receiver, free_ports, payload_id, signal_payload
from wire import Wire, post_bytes, request_bytes

KILLS = int(os.environ.get("LIVEAPI_TEST_KILLS", "20"))
TERMS = int(os.environ.get("LIVEAPI_TEST_TERMS", "5"))
SEED = int(os.environ.get("LIVEAPI_TEST_SEED", str(random.randrange(1 << 32))))
SENDERS = 8


@dataclass
class Traffic:
    """Senders that do as the Live API does: a message that got no 200 is sent again.

    One in eight is encrypted, one in eight can't be read and is set aside, and one in eight is
    sent a second time although it was acknowledged.
    """

    pair: Pair
    port: int
    acknowledged: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    unanswered: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        for number in range(SENDERS):
            thread = threading.Thread(target=self.send, args=(number,), daemon=True)
            self.threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No new messages; those that are under way are sent until they are answered."""
        self.stopping.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a message was never answered"

    def send(self, sender: int) -> None:
        connection: http.client.HTTPConnection | None = None
        for count in itertools.count():
            if self.stopping.is_set():
                return
            payload = signal_payload(sender=sender, count=count)
            body, kind, done = payload, "application/json", self.acknowledged
            if count % 8 == 3:
                body, kind = self.pair.encrypt(payload), "application/jose"
            elif count % 8 == 5:
                body = payload = b"[" + payload + b"]"
                done = self.set_aside
            for again in range(2 if count % 8 == 7 else 1):
                connection = self.until_answered(connection, body, kind)
                if not again:
                    done.append(payload_id(payload))

    def until_answered(
        self, connection: http.client.HTTPConnection | None, body: bytes, kind: str
    ) -> http.client.HTTPConnection:
        deadline = time.monotonic() + 50
        while time.monotonic() < deadline:
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            try:
                connection.request("POST", "/live", body, self.pair.headers(body, kind))
                response = connection.getresponse()
                text = response.read()
                if response.status == 200:
                    return connection
                if response.status != 503:
                    self.surprises.append(f"{response.status} {text!r}")
            except (OSError, http.client.HTTPException):
                self.unanswered += 1
                connection.close()
                connection = None
                time.sleep(0.02)
        self.surprises.append("a message was not answered in time")
        raise AssertionError(self.surprises[-1])


def exactly_once(receiver: Receiver, traffic: Traffic) -> None:
    """Every message acknowledged is in its log once, nothing else is, and every line is whole."""
    assert traffic.surprises == []
    assert len(set(traffic.acknowledged)) == len(traffic.acknowledged)
    assert Counter(receiver.ids("my-app")) == Counter(traffic.acknowledged)
    assert Counter(receiver.ids("my-app.rejected")) == Counter(traffic.set_aside)


@pytest.fixture
def port() -> Iterator[int]:
    yield from free_ports(1)


def ended_again_and_again(
    start: Callable[..., Receiver], pair: Pair, port: int, times: int, end: Callable[..., None]
) -> Traffic:
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    receiver = start("--segment-bytes", "300000", port=port)
    with Traffic(pair, port) as traffic:
        for _ in range(times):
            enough = len(traffic.acknowledged) + 20
            deadline = time.monotonic() + 10
            while len(traffic.acknowledged) < enough and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.15))
            end(receiver)
            receiver = start("--segment-bytes", "300000", port=port)
        traffic.stop()
        exactly_once(receiver, traffic)
    print(f"{len(traffic.acknowledged)} signals acknowledged, {len(traffic.set_aside)} set aside")
    print(f"{traffic.unanswered} requests cut off, {len(receiver.segments('my-app'))} segments")
    assert receiver.stop() == 0
    exactly_once(receiver, traffic)
    return traffic


def test_whatever_was_acknowledged_before_a_kill_9_is_in_the_log_exactly_once(
    start: Callable[..., Receiver], pair: Pair, port: int
) -> None:
    traffic = ended_again_and_again(start, pair, port, KILLS, Receiver.kill)
    assert len(traffic.acknowledged) > KILLS * 10
    assert traffic.unanswered > 0, "no kill hit anything"


def test_whatever_was_acknowledged_before_a_sigterm_is_in_the_log_exactly_once(
    start: Callable[..., Receiver], pair: Pair, port: int
) -> None:
    def end(receiver: Receiver) -> None:
        began = time.monotonic()
        assert receiver.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 10

    ended_again_and_again(start, pair, port, TERMS, end)


def test_a_kill_leaves_whole_lines_for_the_next_start(
    start: Callable[..., Receiver], pair: Pair, port: int
) -> None:
    receiver = start(port=port)
    with Traffic(pair, port) as traffic:
        while len(traffic.acknowledged) < 100:
            time.sleep(0.005)
        receiver.kill()
        acknowledged = list(traffic.acknowledged)
        raw = receiver.raw("my-app")
        again = start(port=port)
        # What a reader saw before the kill, up to its last whole line, is still there.
        assert again.raw("my-app").startswith(raw[: raw.rfind(b"\n") + 1])
        assert set(acknowledged) <= set(again.ids("my-app"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_ends_it_with_status_0(receiver: Receiver, number: int) -> None:
    began = time.monotonic()
    assert receiver.stop(number) == 0
    assert time.monotonic() - began < 3
    assert not [line for line in receiver.log if "Traceback" in line]


def test_idle_connections_are_closed_at_once_by_sigterm(receiver: Receiver) -> None:
    fresh, used = Wire(receiver.port), Wire(receiver.port)
    used.send(request_bytes("GET", "/status"))
    assert used.answer().status == 200
    began = time.monotonic()
    receiver.signal(signal.SIGTERM)
    assert used.ends()
    assert fresh.ends()
    assert receiver.process.wait(10) == 0
    assert time.monotonic() - began < 3


def test_no_new_connection_is_taken_after_sigterm(receiver: Receiver, pair: Pair) -> None:
    with Wire(receiver.port) as wire:
        wire.send(post_bytes(pair, signal_payload())[:-5])
        time.sleep(0.2)
        receiver.signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                Wire(receiver.port).close()
            except OSError:
                break
            time.sleep(0.02)
        else:
            pytest.fail("it still takes connections")


@pytest.mark.parametrize("cut", ["in the headers", "after the headers", "in the body"])
def test_a_half_received_request_is_finished_and_stored_after_sigterm(
    receiver: Receiver, pair: Pair, cut: str
) -> None:
    payload = signal_payload()
    request = post_bytes(pair, payload)
    at = {
        "in the headers": 40,
        "after the headers": len(request) - len(payload),
        "in the body": len(request) - 10,
    }[cut]
    with Wire(receiver.port) as wire:
        wire.send(request[:at])
        time.sleep(0.2)
        receiver.signal(signal.SIGTERM)
        time.sleep(0.5)
        wire.send(request[at:])
        assert wire.answer().json == ACCEPTED
        assert wire.ends()
    assert receiver.process.wait(10) == 0
    assert receiver.ids("my-app") == [payload_id(payload)]


def test_a_request_that_never_comes_to_its_end_does_not_keep_it_from_ending(
    receiver: Receiver, pair: Pair
) -> None:
    with Wire(receiver.port) as wire:
        wire.send(post_bytes(pair, signal_payload())[:-1])
        time.sleep(0.2)
        began = time.monotonic()
        receiver.signal(signal.SIGTERM)
        assert receiver.process.wait(15) == 0
        assert time.monotonic() - began < 10.5


def test_a_signal_that_comes_during_the_start_ends_it_too(
    tmp_path: Path, pair: Pair, port: int
) -> None:
    # One that arrives just before the main thread blocks must not be lost.
    for delay in (0.0, 0.002, 0.01, 0.03):
        receiver = Receiver(tmp_path, pairs=(pair,), port=port)
        try:
            time.sleep(delay)
            assert receiver.stop(signal.SIGTERM, within=5) == 0
        finally:
            if receiver.process.poll() is None:
                receiver.kill()


def test_many_signals_to_reload_and_to_end_do_not_hang_it(receiver: Receiver, pair: Pair) -> None:
    for _ in range(30):
        receiver.signal(signal.SIGHUP)
        assert receiver.verify(pair).status == 200
    receiver.signal(signal.SIGHUP)
    receiver.signal(signal.SIGTERM)
    receiver.signal(signal.SIGTERM)
    assert receiver.process.wait(10) == 0
