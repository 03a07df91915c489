"""Spark's streaming over real receivers' closed segments. How to run it: README.md here."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from engines import CHECK, HOUR, MIDNIGHT, documented_command, duckdb_rows, need, python_with
from harness import ROOT, Pair, Receiver, Start, eventually, signal_payload
from pages import examples

TYPES = [
    f"re.notifica.event.{name}"
    for name in ("notification.Open", "application.Open", "region.Session", "custom.checkout")
]
DROPPED = "dropped because they came later than 7 days"
Counts = Counter[tuple[str, str]]


class Job:
    """The README's commands for Spark, in `directory` in place of /srv."""

    def __init__(self, directory: Path) -> None:
        need("java", "openjdk-17-jre-headless")
        need("rsync", "rsync")
        programs = Path(python_with("pyspark")).parent
        self.directory, self.log = directory, directory / "job.log"
        command = shlex.split(self.moved(documented_command("spark-submit", {})))
        self.command = [*command, "--segments-per-batch", "4"]
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_LOCAL_DIRS": str(directory),
            # Short runs: compiling much would take longer than it saves.
            "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        }
        self.process: subprocess.Popen[bytes] | None = None

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

    def begin(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            # A group of its own: spark-submit, Java and Python end together.
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=ROOT, env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        return self.process

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

    def finish(self) -> str:
        """Run it to its end; what it says of itself."""
        status = self.begin().wait(150)
        log = self.log.read_text()
        assert status == 0, log[-5000:]
        [said] = re.findall(r"^\d+ lines read.*$", log, re.MULTILINE)
        return str(said)

    def segments(self) -> list[Path]:
        fetched = sorted(self.directory.glob("srv/liveapi/*/signals/*"))
        assert all(path.name.endswith("Z.jsonl") for path in fetched)
        return fetched

    def counts(self) -> Counts:
        """What the README's query says of the Parquet files."""
        [text] = examples(page="tests/scale/README.md", language="sql")
        query = self.directory / "counts.sql"
        query.write_text(self.moved(text))
        found = duckdb_rows(query, self.directory)
        return Counter({(hour, kind): count for hour, kind, count in found})


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.kill()


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


def test_spark_counts_closed_segments_exactly_across_a_kill_and_a_restart(
    start: Start, pair: Pair, job: Job, tmp_path: Path
) -> None:
    receivers: dict[str, Receiver] = {}
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        receivers[name] = start("--segment-bytes", "40000", directory=tmp_path / name)
    chance = random.Random(8)
    sent: list[bytes] = []

    def post(name: str, payload: bytes) -> None:
        assert receivers[name].post(pair, payload).status == 200

    def send(count: int) -> None:
        """New signals, each to one receiver; of each tenth and of old ones, a repeat to another."""
        for number in range(count):
            data = {"id": f"{len(sent):024x}", "deviceID": f"device {chance.randrange(99)}"}
            at = MIDNIGHT + chance.randrange(6 * HOUR)
            payload = {"type": chance.choice(TYPES), "data": data, "timestamp": at}
            sent.append(json.dumps(payload).encode())
            first, other = chance.sample(list(receivers), 2)
            post(first, sent[-1])
            if number % 5 == 0:
                post(other, sent[-1] if number % 10 == 0 else chance.choice(sent))
        post("a", signal_payload(type=CHECK))
        for name, receiver in receivers.items():
            job.fetch(name, receiver)

    # Killed in the midst of a batch, while segments go on being closed.
    send(1500)
    job.begin()
    eventually(lambda: list(tmp_path.glob("srv/counts/counts/batch=1")), 120)
    job.kill()
    send(500)
    said = job.finish()
    segments = job.segments()
    expected = exact_counts(segments)
    assert job.counts() == expected
    assert sum(len(each.read_bytes().splitlines()) for each in segments) > expected.total() + 100
    assert said.endswith(f" 0 {DROPPED}")

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
    assert said.endswith(f" {too_late} {DROPPED}")
