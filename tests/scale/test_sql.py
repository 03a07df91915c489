"""The queries, by DuckDB as README.md runs it, over the log of a real receiver.

pytest tests/scale      (README.md here says what to install)
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import CHECK, HERE, ROWS, TABLE, documented_command, python_with, replaced
from harness import Pair, Receiver, payload_id, signal_payload

OPEN = "re.notifica.event.notification.Open"
HOUR = 3_600_000
MIDNIGHT = 1_763_856_000_000


def query(name: str, directory: Path) -> list[list[Any]]:
    command = replaced(
        documented_command("/opt/duckdb/bin/python"),
        {
            "/opt/duckdb/bin/python": shlex.quote(python_with("duckdb")),
            TABLE: ROWS,
            "tests/scale/opens_per_notification.sql": shlex.quote(str(HERE / f"{name}.sql")),
        },
    )
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=directory, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    rows: list[list[Any]] = json.loads(done.stdout)
    return rows


def payload(kind: str, at: Any, **data: Any) -> bytes:
    signal = {"service": "My Service", "type": kind, "data": data, "timestamp": at}
    return json.dumps(signal).encode()


@pytest.fixture
def logged(start: Callable[..., Receiver], pair: Pair) -> tuple[Receiver, list[bytes]]:
    """A receiver with closed segments, one compressed, and the distinct signals it was sent."""
    receiver = start("--segment-bytes", "20000")
    chance = random.Random(8)
    sent = [
        payload(
            OPEN if chance.random() < 0.5 else "re.notifica.event.application.Open",
            MIDNIGHT + chance.randrange(5 * HOUR),
            id=f"{number:024x}",
            deviceID=f"device {chance.randrange(40)}",
            notification=f"notification {chance.randrange(6)}",
        )
        for number in range(400)
    ]
    connection = receiver.connect()
    for number, each in enumerate(sent):
        if number % 7 == 0:
            assert receiver.post_encrypted(pair, each).status == 200
        assert receiver.post(pair, each, connection=connection).status == 200
    assert receiver.post(pair, signal_payload(type=CHECK, deviceID="none")).status == 200
    # As logrotate leaves one.
    compressed, *others = receiver.closed_segments()
    subprocess.run(["gzip", "--suffix", ".1.gz", compressed], check=True)
    assert len(others) > 2
    return receiver, sent


def test_opens_per_notification_are_counted_exactly(logged: tuple[Receiver, list[bytes]]) -> None:
    receiver, sent = logged
    opens: dict[str, list[str]] = defaultdict(list)
    for each in map(json.loads, sent):
        if each["type"] == OPEN:
            opens[each["data"]["notification"]].append(each["data"]["deviceID"])
    expected = [[name, len(devices), len(set(devices))] for name, devices in opens.items()]
    rows = query("opens_per_notification", receiver.directory)
    assert sorted(rows) == sorted(expected)
    assert [row[1] for row in rows] == sorted((row[1] for row in expected), reverse=True)


def test_active_devices_per_hour_are_counted_exactly(logged: tuple[Receiver, list[bytes]]) -> None:
    receiver, sent = logged
    hours: dict[int, list[str]] = defaultdict(list)
    for each in map(json.loads, sent):
        hours[(each["timestamp"] - MIDNIGHT) // HOUR].append(each["data"]["deviceID"])
    expected = [
        [f"2025-11-23 {hour:02}:00:00", len(set(devices)), len(devices)]
        for hour, devices in sorted(hours.items())
    ]
    assert query("active_devices_per_hour", receiver.directory) == expected


def test_a_signal_in_two_logs_counts_once(receiver: Receiver, pair: Pair) -> None:
    assert receiver.post(pair, payload(OPEN, MIDNIGHT, notification="n")).status == 200
    (receiver.signals / "20251123T000000.000000Z.jsonl").write_bytes(receiver.raw())
    assert query("opens_per_notification", receiver.directory) == [["n", 1, 0]]


def test_a_strange_signal_does_not_stop_a_query(receiver: Receiver, pair: Pair) -> None:
    strange = [
        payload(OPEN, "soon", deviceID="one"),
        payload(OPEN, 99999999999999999, deviceID="two"),
        payload(OPEN, MIDNIGHT, deviceID="three").replace(b"three", b"\\ud800"),
        payload(OPEN, 0, deviceID="four").replace(b": 0}", b": 1e400}"),
        payload(OPEN, MIDNIGHT, deviceID=["five"]),
        b'{"type": 6, "data": 7}',
        payload(OPEN, MIDNIGHT, deviceID="eight"),
    ]
    for each in strange:
        assert receiver.post(pair, each).json == {"message": "message received"}
    assert receiver.ids() == [payload_id(each) for each in strange]
    # All but the third: an escaped lone surrogate is JSON, but DuckDB passes over such a line.
    hours = query("active_devices_per_hour", receiver.directory)
    assert hours == [["2025-11-23 00:00:00", 2, 2], [None, 3, 3]]
    assert query("opens_per_notification", receiver.directory) == [[None, 5, 5]]
