"""rsyslog follows the log of a real receiver with rsyslog.conf; PostgreSQL takes its segments.

pytest tests/scale      (README.md here says what to install)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import HERE, SHIPPERS, examples, need, replaced
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


def stored_lines(receiver: Receiver) -> set[bytes]:
    return set(receiver.raw().split(b"\n")) - {b""}


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
        closed = len(receiver.segments())
        eventually(lambda closed=closed: len(receiver.segments()) >= closed + 2)
        shipper.start()
    time.sleep(1)
    stop.set()
    for sender in senders:
        sender.join()
    assert acknowledged.keys() == {200}
    assert receiver.post(pair, signal_payload(text="y" * 900_000)).status == 200

    stored = stored_lines(receiver)
    shipper.wait_for(stored)
    shipped = shipper.lines()
    assert shipped.keys() == stored | {b""}, "a line that the receiver never wrote"
    again = sum(shipped.values()) - len(shipped)
    closed = len(receiver.segments()) - 1
    print(f"\n{len(stored)} lines, {closed} renames, 4 restarts: none missing, {again} sent again")
    assert closed > 10
    assert len(stored) == acknowledged.total() + 1


def test_segments_that_were_shipped_can_be_removed(
    shipper: Shipper, start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "5000")
    shipper.start()
    stored: set[bytes] = set()
    for _ in range(5):
        for _ in range(40):
            assert receiver.post(pair, signal_payload()).status == 200
        stored |= stored_lines(receiver)
        shipper.wait_for(stored)
        shipper.stop(signal.SIGTERM)
        for segment in receiver.closed_segments():
            # A new segment may get the inode of a removed one.
            os.unlink(segment)
        assert receiver.post(pair, signal_payload()).status == 200
        shipper.start()
    stored |= stored_lines(receiver)
    shipper.wait_for(stored)
    assert shipper.lines().keys() == stored | {b""}


@pytest.fixture
def psql(tmp_path: Path) -> Iterator[list[str]]:
    """The psql command for a PostgreSQL of its own, which does not run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("initdb is missing: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="postgres-") as home:
        root = os.geteuid() == 0
        if root:
            shutil.chown(home, "postgres")
        owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] * root
        for tool, *arguments in (
            ("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync"),
            ("pg_ctl", "--wait", f"-o-k {home} -c listen_addresses=", f"-l{home}/log", "start"),
        ):
            command = [*owner, programs[-1] / tool, "-D", f"{home}/data", *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=home)
        yield ["psql", "-h", home, "-U", "postgres", "-X", "-q", "-v", "ON_ERROR_STOP=1"]
        stop = [*owner, programs[-1] / "pg_ctl", "-D", f"{home}/data", "-m", "immediate", "stop"]
        subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, cwd=home)


def test_postgresql_takes_every_signal_once_and_byte_for_byte(
    psql: list[str], start: Callable[..., Receiver], pair: Pair, tmp_path: Path
) -> None:
    receiver = start("--segment-bytes", "500")
    sent = [signal_payload(text=text) for text in ("\\N \n", 'a "quote"', "\t", "\0", "half")]
    sent[-1] = sent[-1].replace(b"half", b"\\ud800")
    sent.append(signal_payload(text=0).replace(b":0}", b":1e400}"))
    for payload in [*sent, *sent]:
        assert receiver.post(pair, payload).status == 200
    compressed, *others = receiver.closed_segments()
    assert others
    (tmp_path / "load.sql").write_text(*examples("sql", SHIPPERS))
    taken = b"".join(path.read_bytes() for path in receiver.closed_segments()).count(b"\n")
    subprocess.run(["gzip", "--suffix", ".1.gz", compressed], check=True)
    for _ in range(2):
        subprocess.run([*psql, "-f", "load.sql"], check=True, cwd=tmp_path)
    found = subprocess.run(
        [*psql, "-A", "-t", "-c", "SELECT line, signal IS NULL FROM signals ORDER BY received_at"],
        check=True,
        capture_output=True,
    ).stdout
    rows = [row.rsplit(b"|", 1) for row in found.splitlines()]
    assert [line for line, _ in rows] == sent[:taken]
    assert [null for _, null in rows] == [
        b"t" if b"\\u0000" in each or b"\\ud800" in each else b"f" for each in sent[:taken]
    ]
    assert taken >= 5
