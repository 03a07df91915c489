"""rsyslog follows the log of a real receiver with rsyslog.conf."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import HERE, need, replaced
from harness import Pair, Receiver, eventually, signal_payload


class Shipper:
    """rsyslogd with rsyslog.conf as it is, but for its paths."""

    def __init__(self, directory: Path, signals: Path) -> None:
        self.program = need("rsyslogd", "rsyslog")
        self.spool, self.shipped = directory / "spool", directory / "shipped"
        self.spool.mkdir()
        self.shipped.mkdir()
        self.config = directory / "rsyslog.conf"
        text = (HERE / "rsyslog.conf").read_text()
        # Its first line is a comment that names the directory, too.
        first, rest = text.split("\n", 1)
        assert first.startswith("#")
        changes = {
            "/var/spool/rsyslog": str(self.spool),
            "/var/lib/liveapi/signals": str(signals),
            "/var/lib/shipped": str(self.shipped),
        }
        self.config.write_text(replaced(rest, changes))
        checked = subprocess.run(
            [self.program, "-N1", "-f", self.config], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        pid = self.spool / "pid"
        pid.unlink(missing_ok=True)
        with (self.spool / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, "-n", "-f", self.config, "-i", pid], stdout=log, stderr=log
            )

    def stop(self, number: int) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None

    def lines(self) -> Counter[bytes]:
        file = self.shipped / "signals.jsonl"
        return Counter(file.read_bytes().split(b"\n")) if file.exists() else Counter()

    def wait_for(self, lines: set[bytes]) -> None:
        eventually(lambda: lines <= self.lines().keys(), 20)


@pytest.fixture
def shipper(tmp_path: Path) -> Iterator[Shipper]:
    signals = tmp_path / "signals"
    signals.mkdir()
    shipper = Shipper(tmp_path, signals)
    yield shipper
    shipper.stop(signal.SIGKILL)


def stored_lines(receiver: Receiver, pair: Pair) -> set[bytes]:
    raw = receiver.raw(pair.name) + receiver.raw(f"{pair.name}.rejected")
    return set(raw.split(b"\n")) - {b""}


def test_every_line_is_shipped_whole_through_renames_and_restarts_of_the_shipper(
    shipper: Shipper, start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "50000")
    shipper.start()
    stop = threading.Event()
    acknowledged = Counter[int]()

    def send() -> None:
        connection = receiver.connect()
        while not stop.is_set():
            answer = receiver.post(pair, signal_payload(text="x" * 400), connection=connection)
            acknowledged[answer.status] += 1

    senders = [threading.Thread(target=send) for _ in range(3)]
    for sender in senders:
        sender.start()
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        time.sleep(1)
        shipper.stop(number)
        # Segments are closed while nobody follows.
        closed = len(receiver.segments(pair.name))
        eventually(lambda closed=closed: len(receiver.segments(pair.name)) >= closed + 2)
        shipper.start()
    time.sleep(1)
    stop.set()
    for sender in senders:
        sender.join()
    assert acknowledged.keys() == {200}
    assert receiver.post(pair, signal_payload(text="y" * 900_000)).status == 200
    assert receiver.post(pair, b"not JSON " + b"z" * 900_000).status == 200

    stored = stored_lines(receiver, pair)
    shipper.wait_for(stored)
    shipped = shipper.lines()
    assert shipped.keys() == stored | {b""}, "a line that the receiver never wrote"
    again = sum(shipped.values()) - len(shipped)
    closed = len(receiver.segments(pair.name)) - 1
    print(f"\n{len(stored)} lines, {closed} renames, 4 restarts: none missing, {again} sent again")
    assert closed > 10
    assert len(stored) == acknowledged.total() + 2


def test_segments_that_were_shipped_can_be_removed(
    shipper: Shipper, start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "5000")
    shipper.start()
    stored: set[bytes] = set()
    for _ in range(5):
        for _ in range(40):
            assert receiver.post(pair, signal_payload()).status == 200
        stored |= stored_lines(receiver, pair)
        shipper.wait_for(stored)
        shipper.stop(signal.SIGTERM)
        for segment in receiver.segments(pair.name)[:-1]:
            # A new segment may get the inode of a removed one.
            os.unlink(segment)
        assert receiver.post(pair, signal_payload()).status == 200
        shipper.start()
    stored |= stored_lines(receiver, pair)
    shipper.wait_for(stored)
    assert shipper.lines().keys() == stored | {b""}
