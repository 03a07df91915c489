"""A load of signals that are sent until each is acknowledged, and what the log holds of it."""

import http.client
import itertools
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from harness import Pair, eventually, payload_id, signal_payload

GIVE_UP = 50.0  # seconds that a signal may take from its first sending to its 200


@dataclass
class Load:
    """Senders that send each signal until it gets a 200, as the Live API's retries would.

    One in eight is encrypted, one in eight is sent a second time although it was acknowledged.
    """

    pairs: tuple[Pair, ...]  # the senders take turns with them
    port: int
    connections: int = 6
    size: int = 0  # bytes of ballast in each signal
    kept: bool = True  # connections; else each request has a new one
    sent: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    answers: Counter[int] = field(default_factory=Counter)
    cut_off: Counter[str] = field(default_factory=Counter)  # requests, by the error
    faults: list[str] = field(default_factory=list)
    finishing: bool = False
    aborting: bool = False

    def __enter__(self) -> "Load":
        pool = ThreadPoolExecutor(self.connections)
        self.threads = [pool.submit(self._send, number) for number in range(self.connections)]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """No new signals; what has been sent is sent until it is answered."""
        self.finishing, self.aborting = True, kind is not None
        for thread in self.threads:
            thread.result(GIVE_UP + 10)

    def reach(self, more: int) -> None:
        """Wait until `more` signals have been acknowledged than now."""
        wanted = len(self.acknowledged) + more
        eventually(lambda: len(self.acknowledged) >= wanted, 20, every=0.002)

    def _send(self, number: int) -> None:
        pair = self.pairs[number % len(self.pairs)]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        for count in itertools.count():
            if self.finishing:
                return
            payload = signal_payload(sender=number, count=count, ballast="x" * self.size)
            body = pair.encrypt(payload) if count % 8 == 3 else payload
            self.sent.add(payload_id(payload))
            for _ in range(2 if count % 8 == 7 else 1):
                if not self._is_accepted(connection, pair, body):
                    return
                self.acknowledged.add(payload_id(payload))

    def _is_accepted(self, connection: http.client.HTTPConnection, pair: Pair, body: bytes) -> bool:
        """Send it again and again; False if that is given up."""
        deadline = time.monotonic() + GIVE_UP
        while not self.aborting:
            if time.monotonic() > deadline:
                self.faults.append(f"no 200 within {GIVE_UP} s")
                return False
            try:
                headers = pair.headers(body) | ({} if self.kept else {"connection": "close"})
                connection.request("POST", "/live", body, headers)
                response = connection.getresponse()
                text = response.read()
            except (OSError, http.client.HTTPException) as error:
                self.cut_off[type(error).__name__] += 1
                connection.close()  # the next request opens it again
                time.sleep(0.01)
                continue
            self.answers[response.status] += 1
            if response.status == 200:
                return True
            if response.status != 503:
                self.faults.append(f"{response.status} {text!r}")
            time.sleep(0.05)
        return False


class Counts(NamedTuple):
    stored: int
    segments: int
    cut_off: int  # requests


def times_stored(segments: list[Path]) -> Counter[str]:
    """How often these hold each id, in whole lines."""
    stored: Counter[str] = Counter()
    for path in segments:
        *lines, rest = path.read_bytes().split(b"\n")
        assert rest == b"", f"{path.name} has a torn tail"
        stored.update(json.loads(line)["id"] for line in lines)
    return stored


def balance(load: Load, signals: Path) -> Counts:
    """Every signal of a load that has ended is acknowledged and stored, once, in a whole line."""
    assert load.faults == []
    assert load.sent == load.acknowledged
    segments = list(signals.glob("*.jsonl"))
    stored = times_stored(segments)
    assert load.acknowledged - stored.keys() == set(), "lost"
    assert stored.keys() - load.sent == set(), "never sent"
    assert [each for each in stored if stored[each] > 1] == [], "doubled"
    assert stored
    return Counts(len(stored), len(segments), load.cut_off.total())
