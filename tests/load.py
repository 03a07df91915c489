"""A load of signals that are sent until each is acknowledged, and what the log holds of it."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from harness import Pair, payload_id, signal_payload

GIVE_UP = 50.0  # seconds that a signal may take from its first sending to its 200


@dataclass
class Load:
    """Senders that send each signal until it gets a 200, as the Live API's retries would.

    One in eight is encrypted, one in eight is sent a second time although it was acknowledged.
    The senders take turns with the pairs.
    """

    pairs: tuple[Pair, ...]
    port: int
    connections: int = 6
    size: int = 0  # bytes of ballast in each signal
    sent: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    answers: Counter[int] = field(default_factory=Counter)
    cut_off: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.finishing, self.aborting = threading.Event(), threading.Event()
        self.threads = [
            threading.Thread(target=self._send, args=(number,), daemon=True)
            for number in range(self.connections)
        ]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """No new signals; what has been sent is sent until it is answered."""
        if kind:
            self.aborting.set()
        self.finishing.set()
        for thread in self.threads:
            thread.join(GIVE_UP + 10)
            assert not thread.is_alive(), "a signal was never answered"

    def reach(self, more: int, seconds: float = 20) -> None:
        """Wait until `more` signals have been acknowledged than now."""
        wanted = len(self.acknowledged) + more
        deadline = time.monotonic() + seconds
        while len(self.acknowledged) < wanted:
            assert time.monotonic() < deadline, f"too slow: {self.answers}, {self.faults}"
            time.sleep(0.002)

    def _send(self, number: int) -> None:
        pair = self.pairs[number % len(self.pairs)]
        connection = None
        for count in itertools.count():
            if self.finishing.is_set():
                return
            payload = signal_payload(sender=number, count=count, ballast="x" * self.size)
            body = pair.encrypt(payload) if count % 8 == 3 else payload
            self.sent.add(payload_id(payload))
            for _ in range(2 if count % 8 == 7 else 1):
                connection = self._until_accepted(connection, pair, body)
                if connection is None:
                    return
                self.acknowledged.add(payload_id(payload))

    def _until_accepted(
        self, connection: http.client.HTTPConnection | None, pair: Pair, body: bytes
    ) -> http.client.HTTPConnection | None:
        deadline = time.monotonic() + GIVE_UP
        while not self.aborting.is_set():
            if time.monotonic() > deadline:
                self.faults.append(f"no 200 within {GIVE_UP} s")
                return None
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            try:
                connection.request("POST", "/live", body, pair.headers(body))
                response = connection.getresponse()
                text = response.read()
                self.answers[response.status] += 1
                if response.status == 200:
                    return connection
                if response.status != 503:
                    self.faults.append(f"{response.status} {text!r}")
                time.sleep(0.05)
            except (OSError, http.client.HTTPException):
                self.cut_off += 1
                connection.close()
                connection = None
                time.sleep(0.01)
        return None


@dataclass
class Counts:
    """What became of a load: how many signals, and how many that it should not be."""

    acknowledged: int = 0
    stored: int = 0
    doubled: int = 0
    lost: int = 0
    torn: int = 0
    never_sent: int = 0
    segments: int = 0
    cut_off: int = 0

    @property
    def good(self) -> bool:
        return not (self.doubled or self.lost or self.torn or self.never_sent)

    def __str__(self) -> str:
        return (
            f"{self.cut_off} requests cut off, {self.segments} segments:"
            f" acknowledged {self.acknowledged}, stored {self.stored}, doubled {self.doubled},"
            f" lost {self.lost}, torn {self.torn}, never sent {self.never_sent}"
        )


def count(load: Load, signals: Path) -> Counts:
    """Read the whole log, line by line."""
    counts = Counts(acknowledged=len(load.acknowledged), cut_off=load.cut_off)
    stored: Counter[str] = Counter()
    for path in signals.glob("*.jsonl"):
        counts.segments += 1
        *lines, rest = path.read_bytes().split(b"\n")
        counts.torn += bool(rest)
        for line in lines:
            try:
                stored[json.loads(line)["id"]] += 1
            except ValueError:
                counts.torn += 1
    counts.stored = stored.total()
    counts.doubled = counts.stored - len(stored)
    counts.lost = len(load.acknowledged - set(stored))
    counts.never_sent = len(set(stored) - load.sent)
    return counts


def balance(load: Load, signals: Path) -> Counts:
    """Every signal of a load that has ended is acknowledged and stored, once."""
    counts = count(load, signals)
    assert load.faults == []
    assert load.sent == load.acknowledged
    assert counts.good, counts
    assert counts.stored == counts.acknowledged > 0
    return counts
