"""rsyslog follows a real receiver's log; PostgreSQL takes its segments. How to run: README.md."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import store
from harness import Pair, Start, eventually, signal_payload
from load import Load
from pages import examples, replaced
from tools import needs_programs


class Shipper:
    """rsyslogd with rsyslog.conf as it is, but for its paths."""

    def __init__(self, directory: Path) -> None:
        for name in ("signals", "spool", "shipped"):
            (directory / name).mkdir()
        self.output = directory / "shipped/signals.jsonl"
        config = directory / "rsyslog.conf"
        changes = {
            "/var/spool/rsyslog": f"{directory}/spool",
            "/var/lib/liveapi/signals/*": f"{directory}/signals/*",
            "/var/lib/shipped": f"{directory}/shipped",
        }
        config.write_text(replaced(Path(__file__).with_name("rsyslog.conf").read_text(), changes))
        self.command = ["rsyslogd", "-f", str(config)]
        subprocess.run([*self.command, "-N1"], check=True)
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([*self.command, "-n", "-iNONE"])

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(20)

    def lines(self) -> set[bytes]:
        return set(self.output.read_bytes().splitlines()) if self.output.exists() else set()

    def ships(self, stored: set[bytes]) -> None:
        """It comes to have shipped these lines, and has shipped no other."""
        eventually(lambda: stored <= self.lines(), 20)
        assert self.lines() == stored, "a line that the receiver never wrote"


@pytest.fixture
def shipper(tmp_path: Path) -> Iterator[Shipper]:
    shipper = Shipper(tmp_path)
    yield shipper
    shipper.stop(signal.SIGKILL)


@needs_programs("rsyslogd")
def test_every_line_is_shipped_whole_through_renames_restarts_of_the_shipper_and_removals(
    shipper: Shipper, start: Start, pair: Pair
) -> None:
    receiver = start("--segment-bytes", "50000")
    stored: set[bytes] = set()
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        with Load((pair,), receiver.port, connections=3, size=400) as load:
            load.reach(500)
            shipper.stop(number)
            # Segments are closed while nobody follows.
            closed = len(receiver.segments())
            eventually(lambda closed=closed: len(receiver.segments()) >= closed + 2)
            shipper.start()
            load.reach(500)
        assert load.answers.keys() == {200}
        assert load.acknowledged <= set(receiver.ids())
        store(receiver, pair, signal_payload(text="y" * 900_000))
        stored |= set(receiver.raw().splitlines())
        shipper.ships(stored)
        shipper.stop(signal.SIGTERM)
        for segment in receiver.closed_segments():
            segment.unlink()  # a new segment may get the inode of a removed one
        store(receiver, pair, signal_payload())
        shipper.start()
    shipper.ships(stored | set(receiver.raw().splitlines()))


@needs_programs("pg_virtualenv")
def test_postgresql_takes_every_signal_once_and_byte_for_byte(start: Start, pair: Pair) -> None:
    receiver = start("--segment-bytes", "500")
    sent = [signal_payload(text=text) for text in ("\\N \n", 'a "quote"', "\t", "\0", "half")]
    sent[-1] = sent[-1].replace(b"half", b"\\ud800")
    sent.append(signal_payload(text=0).replace(b":0}", b":1e400}"))
    store(receiver, pair, *sent, *sent)
    closed = receiver.closed_segments()
    taken = b"".join(path.read_bytes() for path in closed).count(b"\n")
    assert len(closed) > 1
    assert taken >= 5
    subprocess.run(["gzip", "--suffix", ".1.gz", closed[0]], check=True)
    [load] = examples(page="docs/shippers.md", language="sql")
    (receiver.directory / "load.sql").write_text(load)
    select = "SELECT line, signal IS NULL FROM signals ORDER BY received_at"
    psql = "psql -X -q -v ON_ERROR_STOP=1"
    script = f'{psql} -f load.sql; {psql} -f load.sql; {psql} -A -t -o rows -c "{select}"'
    # With a PostgreSQL of its own, which is thrown away.
    throw_away = ["pg_virtualenv", "-t", "sh", "-ec", script]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    subprocess.run(throw_away, check=True, cwd=receiver.directory, env=environment)
    found = (receiver.directory / "rows").read_bytes().splitlines()
    no_jsonb = re.compile(rb"\\u0000|\\ud800")
    assert found == [each + (b"|t" if no_jsonb.search(each) else b"|f") for each in sent[:taken]]
