"""Who reads the logs of real receivers: rsyslog, PostgreSQL, DuckDB, Spark. To run: README.md."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Pair, Receiver, Start, eventually, running, signal_payload
from load import Load
from pages import examples, replaced
from tools import needs_programs

HERE = Path(__file__).parent


# rsyslog and PostgreSQL, as docs/shippers.md has them


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
        config.write_text(replaced((HERE / "rsyslog.conf").read_text(), changes))
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
        receiver.store(signal_payload(text="y" * 900_000))
        stored |= set(receiver.raw().splitlines())
        shipper.ships(stored)
        shipper.stop(signal.SIGTERM)
        for segment in receiver.closed_segments():
            segment.unlink()  # a new segment may get the inode of a removed one
        receiver.store(signal_payload())
        shipper.start()
    shipper.ships(stored | set(receiver.raw().splitlines()))


@needs_programs("pg_virtualenv")
def test_postgresql_takes_every_signal_once_and_byte_for_byte(start: Start) -> None:
    receiver = start("--segment-bytes", "500")
    sent = [signal_payload(text=text) for text in ("\\N \n", 'a "quote"', "\t", "\0", "half")]
    sent[-1] = sent[-1].replace(b"half", b"\\ud800")
    sent.append(signal_payload(text=0).replace(b":0}", b":1e400}"))
    receiver.store(*sent, *sent)
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
    throw_away = ["env", "LC_ALL=C.UTF-8", "pg_virtualenv", "-t", "sh", "-ec", script]
    subprocess.run(throw_away, check=True, cwd=receiver.directory)
    found = (receiver.directory / "rows").read_bytes().splitlines()
    no_jsonb = re.compile(rb"\\u0000|\\ud800")
    assert found == [each + (b"|t" if no_jsonb.search(each) else b"|f") for each in sent[:taken]]


# DuckDB and Spark, as README.md here has them


README = "tests/scale/README.md"
OPENS, DEVICES = HERE / "opens_per_notification.sql", HERE / "active_devices_per_hour.sql"
OPEN = "re.notifica.event.notification.Open"
OTHERS = [f"re.notifica.event.{name}" for name in ("application.Open", "custom.checkout")]
CHECK = "re.notifica.event.custom.liveapi_check"  # what `check` sends
HOUR = 3_600_000
MIDNIGHT = 1_763_856_000_000  # 2025-11-23
Counts = Counter[tuple[str, str]]


def documented_command(start: str, changes: dict[str, str]) -> str:
    """The README's one command that begins with `start`, on one line and with the changes made."""
    lines = re.sub(r"\\\n *", "", "".join(examples(page=README))).splitlines()
    [found] = [line for line in lines if line.startswith(start)]
    return replaced(found, changes)


def python_with(module: str) -> str:
    """A Python that has `module`: .venv-scale's, for Spark is larger than all else, or this one."""
    own = ROOT / ".venv-scale/bin/python"
    python = str(own if own.exists() else sys.executable)
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        pytest.skip(f"{python} has no {module}: pip install {module}")
    return python


def payload(kind: str, at: Any, **data: Any) -> bytes:
    return json.dumps({"type": kind, "data": data, "timestamp": at}).encode()


def duckdb_rows(query: Path, directory: Path) -> list[list[Any]]:
    """What the README's command for DuckDB finds with `query`, as rows in place of a table."""
    interpreter = "/opt/duckdb/bin/python"
    found = "json.dumps(duckdb.sql(sys.stdin.read()).fetchall(), default=str)"
    changes = {
        interpreter: f"'{python_with('duckdb')}'",
        "duckdb.sql(sys.stdin.read()).show(max_rows=1000)": f"import json; print({found})",
        "tests/scale/opens_per_notification.sql": f"'{query}'",
    }
    command = documented_command(interpreter, changes)
    rows: list[list[Any]] = json.loads(subprocess.check_output(command, shell=True, cwd=directory))
    return rows


def test_opens_per_notification_and_active_devices_per_hour_count_each_signal_once(
    start: Start, pair: Pair
) -> None:
    receiver = start("--segment-bytes", "20000")
    chance = random.Random(8)
    opens: dict[str, list[str]] = defaultdict(list)
    hours: dict[int, list[str]] = defaultdict(list)
    for number in range(400):
        kind = chance.choice([OPEN, OTHERS[0]])
        at = MIDNIGHT + chance.randrange(5 * HOUR)
        device, name = f"device {chance.randrange(40)}", f"notification {chance.randrange(6)}"
        sent = payload(kind, at, id=f"{number:024x}", deviceID=device, notification=name)
        if number % 7 == 0:
            assert receiver.post_encrypted(pair, sent).status == 200
        receiver.store(sent)
        hours[(at - MIDNIGHT) // HOUR].append(device)
        if kind == OPEN:
            opens[name].append(device)
    receiver.store(signal_payload(type=CHECK, deviceID="none"))
    # One as logrotate leaves it, and one that another receiver holds too.
    compressed, *others = receiver.closed_segments()
    subprocess.run(["gzip", "--suffix", ".1.gz", compressed], check=True)
    assert len(others) > 2
    shutil.copy(others[0], receiver.signals / "20251123T000000.000000Z.jsonl")

    by_name = [[name, len(devices), len(set(devices))] for name, devices in opens.items()]
    by_name.sort(key=lambda row: (-row[1], row[0]))
    assert duckdb_rows(OPENS, receiver.directory) == by_name
    assert duckdb_rows(DEVICES, receiver.directory) == [
        [f"2025-11-23 {hour:02}:00:00", len(set(devices)), len(devices)]
        for hour, devices in sorted(hours.items())
    ]


def test_a_strange_signal_does_not_stop_a_query(receiver: Receiver) -> None:
    receiver.store(
        payload(OPEN, "soon", deviceID="one"),
        payload(OPEN, 99999999999999999, deviceID="two"),
        payload(OPEN, MIDNIGHT, deviceID="three").replace(b"three", b"\\ud800"),
        payload(OPEN, 0, deviceID="four").replace(b": 0}", b": 1e400}"),
        payload(OPEN, MIDNIGHT, deviceID=["five"]),
        b'{"type": 6, "data": 7}',
        payload(OPEN, MIDNIGHT, deviceID="eight"),
    )  # fmt: skip
    # All but the third: an escaped lone surrogate is JSON, but DuckDB passes over such a line.
    hours = duckdb_rows(DEVICES, receiver.directory)
    assert hours == [["2025-11-23 00:00:00", 2, 2], [None, 3, 3]]
    assert duckdb_rows(OPENS, receiver.directory) == [[None, 5, 5]]


class Job:
    """The README's commands for Spark, in `directory` in place of /srv."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.log = directory, directory / "job.log"
        self.python = python_with("pyspark")

    def moved(self, text: str) -> str:
        assert "/srv/" in text
        return text.replace("/srv/", f"{self.directory}/srv/")

    def fetch(self, name: str, receiver: Receiver) -> None:
        """Bring its closed segments with the README's rsync, from here in place of its VM."""
        changes = {
            "10.0.0.11:/var/lib/liveapi/signals/": f"{receiver.signals}/",
            "/liveapi/a/": f"/liveapi/{name}/",
        }
        subprocess.run(shlex.split(self.moved(documented_command("rsync", changes))), check=True)

    def submitted(self) -> AbstractContextManager[tuple[subprocess.Popen[str], Any, Any]]:
        command = self.moved(documented_command("spark-submit", {})) + " --segments-per-batch 4"
        settings = (
            f"PATH={Path(self.python).parent}:{os.environ['PATH']}",
            "SPARK_LOCAL_IP=127.0.0.1",
            f"SPARK_LOCAL_DIRS={self.directory}",
            # Short runs: compiling much would take longer than it saves.
            "JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        )
        script = f"exec {command} >{self.log} 2>&1"
        return running("env", *settings, "sh", "-c", script, cwd=ROOT)

    def finish(self) -> str:
        """Run it to its end; what it says of itself."""
        with self.submitted() as (process, _, _):
            status = process.wait(150)
        assert status == 0, self.log.read_text()[-5000:]
        [said] = re.findall(r"^\d+ lines read.*$", self.log.read_text(), re.MULTILINE)
        return str(said)

    def segments(self) -> list[Path]:
        fetched = sorted(self.directory.glob("srv/liveapi/*/signals/*"))
        assert all(path.name.endswith("Z.jsonl") for path in fetched)
        return fetched

    def counts(self) -> Counts:
        """What the README's query says of the Parquet files."""
        [text] = examples(page=README, language="sql")
        query = self.directory / "counts.sql"
        query.write_text(self.moved(text))
        found = duckdb_rows(query, self.directory)
        return Counter({(hour, kind): count for hour, kind, count in found})


def exact_counts(segments: list[Path]) -> Counts:
    """Every distinct signal of these segments, counted in plain Python."""
    found: dict[str, tuple[str, str]] = {}
    text = "".join(each.read_text() for each in segments)
    for stored in map(json.loads, text.splitlines()):
        at = datetime.fromtimestamp(stored["signal"]["timestamp"] / 1000, UTC)
        if stored["signal"]["type"] != CHECK:
            found[stored["id"]] = (f"{at:%Y-%m-%d %H}:00:00", stored["signal"]["type"])
    return Counter(found.values())


def earlier(segment: Path, days: int, to: Path) -> int:
    """A copy of a segment as if received days ago, with other ids; how many lines it has."""
    day = datetime.now(UTC) - timedelta(days=days)
    text = re.sub('(?<="received_at":")[^T]+', f"{day:%Y-%m-%d}", segment.read_text())
    to.write_text(re.sub(r'(?<="id":")\w{8}(?=\w{24}","signal")', to.name[:8], text))
    return text.count("\n")


@needs_programs("java", "rsync")
def test_spark_counts_closed_segments_exactly_across_a_kill_and_a_restart(
    start: Start, tmp_path: Path
) -> None:
    job, options = Job(tmp_path), ("--segment-bytes", "40000")
    receivers = {name: start(*options, directory=tmp_path / name) for name in ("a", "b", "c")}
    chance = random.Random(8)
    sent: list[bytes] = []

    def send(count: int) -> None:
        """New signals, each to one receiver; of each tenth and of old ones, a repeat to another."""
        for number in range(count):
            at, device = MIDNIGHT + chance.randrange(6 * HOUR), f"device {chance.randrange(99)}"
            kind = chance.choice([OPEN, *OTHERS])
            sent.append(payload(kind, at, id=f"{len(sent):024x}", deviceID=device))
            first, other = chance.sample(list(receivers.values()), 2)
            first.store(sent[-1])
            if number % 5 == 0:
                other.store(sent[-1] if number % 10 == 0 else chance.choice(sent))
        receivers["a"].store(signal_payload(type=CHECK))
        for name, receiver in receivers.items():
            job.fetch(name, receiver)

    # Killed in the midst of a batch, while segments go on being closed.
    send(1500)
    with job.submitted():
        eventually(lambda: list(tmp_path.glob("srv/counts/counts/batch=1")), 120)
    send(500)
    said = job.finish()
    segments = job.segments()
    expected = exact_counts(segments)
    assert job.counts() == expected
    assert sum(len(each.read_bytes().splitlines()) for each in segments) > expected.total() + 100
    assert said.endswith(" 0 dropped because they came later than 7 days")

    # Ended by itself and started again: new segments, one that was counted and is now compressed,
    # and a receiver that comes late with two.
    send(500)
    late = tmp_path / "srv/liveapi/d/signals"
    late.mkdir(parents=True)
    earlier(segments[0], 6, late / "20261101T000000.000000Z.jsonl")
    on_time = exact_counts(job.segments())
    too_late = earlier(segments[0], 8, late / "20261102T000000.000000Z.jsonl")
    subprocess.run(["gzip", "--suffix", ".1.gz", segments[1]], check=True)
    said = job.finish()
    assert on_time.total() > expected.total() + 400
    assert job.counts() == on_time
    assert said.endswith(f" {too_late} dropped because they came later than 7 days")
