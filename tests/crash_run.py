"""Kill the receiver again and again under load, and count what became of the signals.

    python tests/crash_run.py [KILLS]      200 unless told otherwise

LIVEAPI_TEST_SEED picks the moments. Exit status 0 if none was doubled, lost or torn, and nothing
is stored that was never sent.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from harness import Pair, Receiver, free_ports, payload_id, signal_payload

SEGMENT_BYTES = 20_000
SEED = int(os.environ.get("LIVEAPI_TEST_SEED", str(random.randrange(1 << 32))))
GIVE_UP = 50.0  # seconds that a signal may take from its first sending to its 200


@dataclass
class Load:
    """Senders that send each signal until it gets a 200, as the Live API's retries would.

    One in eight is encrypted, one in eight is sent a second time although it was acknowledged. If
    `unreadable`, one in eight can't be read and is set aside.
    """

    pair: Pair
    port: int
    connections: int = 6
    size: int = 0  # bytes of ballast in each signal
    unreadable: bool = False
    sent: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    set_aside: set[str] = field(default_factory=set)
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
        if kind:
            self.aborting.set()
        self.finish()

    def finish(self) -> None:
        """No new signals; what has been sent is sent until it is answered."""
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
        connection = None
        for count in itertools.count():
            if self.finishing.is_set():
                return
            payload = signal_payload(sender=number, count=count, ballast="x" * self.size)
            body, kind, done = payload, "application/json", self.acknowledged
            if count % 8 == 3:
                body, kind = self.pair.encrypt(payload), "application/jose"
            elif count % 8 == 5 and self.unreadable:
                body = payload = b"[" + payload + b"]"
                done = self.set_aside
            self.sent.add(payload_id(payload))
            for _ in range(2 if count % 8 == 7 else 1):
                connection = self._until_accepted(connection, body, kind)
                if connection is None:
                    return
                done.add(payload_id(payload))

    def _until_accepted(
        self, connection: http.client.HTTPConnection | None, body: bytes, kind: str
    ) -> http.client.HTTPConnection | None:
        deadline = time.monotonic() + GIVE_UP
        while not self.aborting.is_set():
            if time.monotonic() > deadline:
                self.faults.append(f"no 200 within {GIVE_UP} s")
                return None
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            try:
                connection.request("POST", "/live", body, self.pair.headers(body, kind))
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
    kills: int = 0
    kills_in_start: int = 0
    acknowledged: int = 0
    stored: int = 0
    doubled: int = 0
    lost: int = 0
    torn: int = 0
    never_sent: int = 0
    segments: int = 0
    cut_off: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.doubled or self.lost or self.torn or self.never_sent)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.kills_in_start} of them during a start) in"
            f" {self.seconds:.0f} s, {self.cut_off} requests cut off, {self.segments} segments:"
            f" acknowledged {self.acknowledged}, stored {self.stored}, doubled {self.doubled},"
            f" lost {self.lost}, torn {self.torn}, never sent {self.never_sent}"
        )


def log_files(signals: Path) -> list[Path]:
    return sorted(signals.glob("my-app*.jsonl"))


def count_log(signals: Path, load: Load, counts: Counts) -> None:
    """Read the whole log, line by line."""
    stored: Counter[str] = Counter()
    for path in log_files(signals):
        *lines, rest = path.read_bytes().split(b"\n")
        counts.torn += bool(rest)
        for line in lines:
            try:
                stored[json.loads(line)["id"]] += 1
            except ValueError:
                counts.torn += 1
    counts.stored = sum(stored.values())
    counts.doubled = sum(times - 1 for times in stored.values())
    counts.acknowledged = len(load.acknowledged)
    counts.lost = len(load.acknowledged - set(stored))
    counts.never_sent = len(set(stored) - load.sent)
    counts.segments = len(log_files(signals))


def balance(load: Load, signals: Path) -> Counts:
    """Every signal of a load is acknowledged and stored, once."""
    counts = Counts()
    count_log(signals, load, counts)
    assert load.faults == []
    assert load.sent == load.acknowledged
    assert counts.good, counts
    assert counts.stored == counts.acknowledged > 0
    return counts


def torn_in_open_segment(signals: Path) -> int:
    """Whether a line of the open segment is torn; while it grows its last one may be on its way."""
    try:
        lines = (signals / "my-app.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:  # just closed
        return 0
    return sum(1 for line in lines if not (line.startswith(b'{"rec') and line.endswith(b"}}")))


def crash_run(directory: Path, kills: int) -> Counts:
    chance = random.Random(SEED)
    pair = Pair("my-app")
    (port,) = free_ports(1)
    counts = Counts(kills=kills)
    options = ("--segment-bytes", str(SEGMENT_BYTES))
    began = time.monotonic()
    receiver = Receiver(directory, *options, pairs=(pair,), port=port)
    load = Load(pair, port)
    try:
        with load:
            for number in range(kills):
                if number % 6 == 5:  # the next start is killed as well, before it is through
                    receiver.kill()
                    hasty = subprocess.Popen(
                        receiver.command, cwd=directory, stderr=subprocess.DEVNULL
                    )
                    time.sleep(chance.uniform(0.05, 0.35))
                    hasty.kill()
                    hasty.wait(10)
                    counts.kills_in_start += 1
                else:
                    load.reach(1)
                    time.sleep(chance.uniform(0, 0.2))
                    receiver.kill()
                receiver = Receiver(directory, *options, pairs=(pair,), port=port)
                counts.torn += torn_in_open_segment(receiver.signals)
            load.reach(1)
        assert receiver.stop() == 0
        assert load.faults == []
        assert load.sent == load.acknowledged
    finally:
        if receiver.process.poll() is None:
            receiver.kill()
    count_log(receiver.signals, load, counts)
    counts.cut_off = load.cut_off
    counts.seconds = time.monotonic() - began
    return counts


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"seed {SEED}", flush=True)
    with tempfile.TemporaryDirectory(prefix="liveapi-crash-") as directory:
        counts = crash_run(Path(directory), kills)
    print(counts)
    return 0 if counts.good and counts.acknowledged else 1


if __name__ == "__main__":
    sys.exit(main())
