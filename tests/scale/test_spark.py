"""Spark's Structured Streaming over the closed segments of real receivers, plain and compressed.

pytest tests/scale      (README.md here says what to install)
"""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import CHECK, ROWS, documented_command, examples, need, python_with, replaced
from harness import ROOT, Pair, Receiver, eventually, payload_id, signal_payload

TYPES = [
    f"re.notifica.event.{name}"
    for name in ("notification.Open", "application.Open", "region.Session", "custom.checkout")
]
HOUR = 3_600_000
Counts = Counter[tuple[str, str]]


class Job:
    """The spark-submit line of the README, in `directory` in place of /srv."""

    def __init__(self, directory: Path) -> None:
        if not shutil.which("java"):
            pytest.skip("java is missing: apt-get install openjdk-17-jre-headless")
        self.python = python_with("pyspark")
        self.directory = directory
        self.command = shlex.split(self.moved(documented_command("spark-submit")))
        self.runs: list[subprocess.Popen[bytes]] = []

    def moved(self, text: str) -> str:
        assert "/srv/" in text
        return text.replace("/srv/", f"{self.directory}/srv/")

    def fetch(self, receiver: Receiver) -> None:
        """Bring its closed segments with the README's rsync, from here in place of its VM."""
        need("rsync", "rsync")
        name = receiver.directory.name
        line = replaced(
            documented_command("rsync"),
            {
                "10.0.0.11:/var/lib/liveapi/signals/": f"{receiver.signals}/",
                "/srv/liveapi/a/": f"/srv/liveapi/{name}/",
            },
        )
        subprocess.run(shlex.split(self.moved(line)), check=True)

    def begin(self) -> subprocess.Popen[bytes]:
        with (self.directory / f"job{len(self.runs)}.log").open("wb") as log:
            bin_directory = Path(self.python).parent
            self.runs.append(
                subprocess.Popen(
                    [*self.command, "--segments-per-batch", "4"],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "PATH": f"{bin_directory}:{os.environ['PATH']}",
                        "SPARK_LOCAL_IP": "127.0.0.1",
                        "SPARK_LOCAL_DIRS": str(self.directory),
                        # Short runs: compiling much would take longer than it saves.
                        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
                    },
                    # A group of its own: spark-submit, Java and Python end together.
                    start_new_session=True,
                )
            )
        return self.runs[-1]

    def kill(self) -> None:
        for run in self.runs:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait(10)

    def finish(self) -> str:
        """Run it to its end; what it says of itself."""
        status = self.begin().wait(150)
        log = (self.directory / f"job{len(self.runs) - 1}.log").read_text()
        assert status == 0, log[-5000:]
        [said] = re.findall(r"^\d+ lines read.*$", log, re.MULTILINE)
        return str(said)

    def batches(self, what: str) -> set[str]:
        return {path.name for path in (self.directory / "srv/counts" / what).glob("*[0-9]")}

    def counts(self) -> Counts:
        """What the README's query says of the Parquet files."""
        done = subprocess.run(
            [python_with("duckdb"), "-c", f"import duckdb, sys; {ROWS}"],
            input=self.moved(*examples("sql")),
            capture_output=True,
            text=True,
            check=True,
        )
        return Counter({(hour, kind): count for hour, kind, count in json.loads(done.stdout)})


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.kill()


def closed_segments(directory: Path) -> list[Path]:
    fetched = sorted(directory.glob("srv/liveapi/*/signals/*"))
    assert all(path.name.endswith("Z.jsonl") for path in fetched)
    return fetched


def exact_counts(segments: list[Path]) -> Counts:
    """Every distinct signal of these segments, counted in plain Python."""
    found: dict[str, tuple[str, str]] = {}
    for segment in segments:
        for line in segment.read_text().splitlines():
            stored = json.loads(line)
            at = datetime.datetime.fromtimestamp(stored["signal"]["timestamp"] / 1000, datetime.UTC)
            if stored["signal"]["type"] != CHECK:
                found[stored["id"]] = (f"{at:%Y-%m-%d %H}:00:00", stored["signal"]["type"])
    return Counter(found.values())


def earlier(segment: Path, days: int, to: Path) -> int:
    """A copy of a segment as if received days ago, with other signals; how many they are."""
    lines = segment.read_text().splitlines()
    with to.open("w") as file:
        for line in lines:
            stored: dict[str, Any] = json.loads(line)
            at = datetime.datetime.fromisoformat(stored["received_at"])
            stored["received_at"] = f"{at - datetime.timedelta(days=days):%Y-%m-%dT%H:%M:%S.%fZ}"
            stored["signal"]["data"]["copied"] = to.name
            stored["id"] = payload_id(json.dumps(stored["signal"]).encode())
            file.write(json.dumps(stored, separators=(",", ":")) + "\n")
    return len(lines)


def test_spark_counts_closed_segments_exactly_across_a_kill_and_a_restart(
    start: Callable[..., Receiver], pair: Pair, job: Job, tmp_path: Path
) -> None:
    receivers = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        receivers.append(start("--segment-bytes", "40000", directory=tmp_path / name))
    connections = [receiver.connect() for receiver in receivers]
    chance = random.Random(8)
    sent: list[bytes] = []

    def send(count: int) -> None:
        """New signals, each to one receiver; of each tenth and of old ones, a repeat to another."""
        for number in range(count):
            at = 1_763_856_000_000 + chance.randrange(6 * HOUR)
            data = {"id": f"{len(sent):024x}", "deviceID": f"device {chance.randrange(99)}"}
            signal_sent = {"type": chance.choice(TYPES), "data": data, "timestamp": at}
            sent.append(json.dumps(signal_sent).encode())
            to = chance.sample(range(3), 2)
            again = [(to[1], sent[-1])] if number % 10 == 0 else []
            again += [(to[1], chance.choice(sent))] if number % 10 == 5 else []
            for where, payload in [(to[0], sent[-1]), *again]:
                answer = receivers[where].post(pair, payload, connection=connections[where])
                assert answer.status == 200
        assert receivers[0].post(pair, signal_payload(type=CHECK)).status == 200
        for receiver in receivers:
            job.fetch(receiver)

    # Killed in the midst of a batch, while segments go on being closed.
    send(1500)
    job.begin()
    eventually(lambda: "batch=1" in job.batches("counts"), 120)
    job.kill()
    begun, done = job.batches("checkpoint/offsets"), job.batches("checkpoint/commits")
    send(500)
    said = [job.finish()]
    segments = closed_segments(tmp_path)
    expected = exact_counts(segments)
    assert job.counts() == expected
    lines = sum(path.read_bytes().count(b"\n") for path in segments)
    print(f"\nkilled with {len(done)} batches done and {len(begun)} begun")
    print(f"{len(segments)} segments, {lines} lines, {expected.total()} signals: exact")
    assert lines > expected.total() + 100
    assert said[0].endswith(" 0 dropped because they came later than 7 days")

    # Ended by itself and started again: new segments, one that was counted and is now compressed,
    # and a receiver that comes late with two.
    send(500)
    late = tmp_path / "srv/liveapi/d/signals"
    late.mkdir(parents=True)
    earlier(segments[0], 6, late / "20261101T000000.000000Z.jsonl")
    on_time = exact_counts(closed_segments(tmp_path))
    too_late = earlier(segments[0], 8, late / "20261102T000000.000000Z.jsonl")
    subprocess.run(["gzip", "--suffix", ".1.gz", segments[1]], check=True)
    said.append(job.finish())
    print(f"{on_time.total()} signals after a second start: {said[1]}")
    assert on_time.total() > expected.total() + 400
    assert job.counts() == on_time
    assert said[1].endswith(f" {too_late} dropped because they came later than 7 days")
