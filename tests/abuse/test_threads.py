"""The threads' own ways: descriptors used again, sockets shut under hands, handlers in a crowd.

Run: .venv/bin/pytest tests/abuse
Or with full counts, and the figures of each run: LIVEAPI_FULL=1 .venv/bin/pytest -s tests/abuse
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import pytest
from disks import injected
from harness import ACCEPTED, Answer, Pair, Receiver, Start, payload_id, signal_payload
from tools import needs_strace
from wire import Wire, post_bytes, request_bytes

FULL = os.environ.get("LIVEAPI_FULL") == "1"
CLIENTS = 24
KEEPALIVE = 0.2


class Client:
    """Of 24 that fight for 6 places: it is shut out, or goes, at any moment."""

    def __init__(self, receiver: Receiver, pair: Pair, seconds: float) -> None:
        self.receiver, self.pair, self.end = receiver, pair, time.monotonic() + seconds
        self.acknowledged: list[str] = []
        self.seen: Counter[str] = Counter()

    def live(self) -> None:
        while time.monotonic() < self.end:
            with suppress(OSError), Wire(self.receiver.port, 5) as wire:
                way = random.choice((self.verify, self.post, self.go, self.stall))
                way(wire)

    def exchange(self, wire: Wire, data: bytes, what: str) -> Answer | None:
        wire.send(data)
        answer = wire.reply()
        self.seen[f"{what}: {answer.status if answer else 'shut'}"] += 1
        return answer

    def verify(self, wire: Wire) -> None:
        """Again and again, at last when the keep-alive time is just over."""
        for pause in (0, 0.01, KEEPALIVE, KEEPALIVE + 0.04):
            time.sleep(pause)
            challenge = secrets.token_hex(8)
            key = {"x-notificare-public-key": self.pair.public}
            data = request_bytes("GET", f"/live?challenge={challenge}", key)
            if not (answer := self.exchange(wire, data, "verify")):
                return
            assert (answer.status, answer.body) == (
                200,
                self.pair.sign(challenge.encode()).encode(),
            )

    def post(self, wire: Wire) -> None:
        for _ in range(5):
            payload = signal_payload()
            if not (answer := self.exchange(wire, post_bytes(self.pair, payload), "post")):
                return
            assert (answer.status, answer.json) == (200, ACCEPTED)
            self.acknowledged.append(payload_id(payload))

    def go(self, wire: Wire) -> None:
        """Reset the connection while its signal is being stored: the 200 finds nobody."""
        wire.send(post_bytes(self.pair, signal_payload()))
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(random.choice((0, 0.0005, 0.002)))
        self.seen["go"] += 1

    def stall(self, wire: Wire) -> None:
        answer = self.exchange(wire, b"GET /status HTTP/1.1\r\n", "stall")
        assert answer is None or answer.status == 408


@needs_strace
@pytest.mark.parametrize("slow", ["", "sendto", "fdatasync", "close", "shutdown", "recvfrom"])
def test_where_descriptors_are_used_again_at_once_nobody_gets_anothers_answer(
    start: Start, pair: Pair, tmp_path: Path, slow: str
) -> None:
    """A call that takes 3 ms more gives the other threads time to come between."""
    options = ("--max-connections", "6", "--timeout", "0.3", "--keepalive", str(KEEPALIVE))
    receiver = start(*options)
    fault = (
        injected(receiver, tmp_path / "t", f"{slow}:delay_enter=3000") if slow else nullcontext()
    )
    with fault, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [Client(receiver, pair, 20 if FULL else 2) for _ in range(CLIENTS)]
        for done in [pool.submit(client.live) for client in clients]:
            done.result()
    seen: Counter[str] = sum((client.seen for client in clients), Counter())
    print(slow, dict(sorted(seen.items())))
    assert {"verify: 200", "verify: shut", "post: 200", "go"} <= seen.keys(), seen
    assert receiver.verify(pair).status == 200
    assert receiver.stop() == 0
    stored = Counter(receiver.ids())
    assert set(stored.values()) == {1}
    assert {id for client in clients for id in client.acknowledged} <= stored.keys()


def test_512_handlers_that_all_want_the_interpreter_store_what_they_acknowledge_and_stop(
    start: Start, pair: Pair
) -> None:
    receiver, sent = start(), set()
    with ExitStack() as stack:
        crowd = [stack.enter_context(Wire(receiver.port, 30)) for _ in range(512)]
        for _ in range(20 if FULL else 3):
            payloads = [signal_payload() for _ in crowd]
            began = time.monotonic()
            for wire, payload in zip(crowd, payloads, strict=True):
                wire.send(post_bytes(pair, payload))
            assert all(wire.answer().json == ACCEPTED for wire in crowd)
            print(f"512 signals at once: {time.monotonic() - began:.2f} s")
            sent.update(map(payload_id, payloads))
        began = time.monotonic()
        assert receiver.stop() == 0
        assert time.monotonic() - began < 10
    assert sorted(receiver.ids()) == sorted(sent)
