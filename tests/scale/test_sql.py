"""The queries, by DuckDB, over the log of a real receiver. How to run it: README.md here."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections import defaultdict
from typing import Any

from engines import CHECK, HERE, HOUR, MIDNIGHT, duckdb_rows
from harness import Pair, Receiver, Start, signal_payload

OPEN = "re.notifica.event.notification.Open"
OPENS, DEVICES = HERE / "opens_per_notification.sql", HERE / "active_devices_per_hour.sql"


def payload(kind: str, at: Any, **data: Any) -> bytes:
    return json.dumps({"type": kind, "data": data, "timestamp": at}).encode()


def test_opens_per_notification_and_active_devices_per_hour_count_each_signal_once(
    start: Start, pair: Pair
) -> None:
    receiver = start("--segment-bytes", "20000")
    chance = random.Random(8)
    opens: dict[str, list[str]] = defaultdict(list)
    hours: dict[int, list[str]] = defaultdict(list)
    for number in range(400):
        kind = chance.choice([OPEN, "re.notifica.event.application.Open"])
        at = MIDNIGHT + chance.randrange(5 * HOUR)
        device, name = f"device {chance.randrange(40)}", f"notification {chance.randrange(6)}"
        sent = payload(kind, at, id=f"{number:024x}", deviceID=device, notification=name)
        if number % 7 == 0:
            assert receiver.post_encrypted(pair, sent).status == 200
        assert receiver.post(pair, sent).status == 200
        hours[(at - MIDNIGHT) // HOUR].append(device)
        if kind == OPEN:
            opens[name].append(device)
    assert receiver.post(pair, signal_payload(type=CHECK, deviceID="none")).status == 200
    # One as logrotate leaves it, and one that another receiver holds too.
    compressed, *others = receiver.closed_segments()
    subprocess.run(["gzip", "--suffix", ".1.gz", compressed], check=True)
    assert len(others) > 2
    shutil.copy(others[0], receiver.signals / "20251123T000000.000000Z.jsonl")

    by_name = [[name, len(devices), len(set(devices))] for name, devices in opens.items()]
    rows = duckdb_rows(OPENS, receiver.directory)
    assert rows == sorted(by_name, key=lambda row: (-row[1], row[0]))
    assert duckdb_rows(DEVICES, receiver.directory) == [
        [f"2025-11-23 {hour:02}:00:00", len(set(devices)), len(devices)]
        for hour, devices in sorted(hours.items())
    ]


def test_a_strange_signal_does_not_stop_a_query(receiver: Receiver, pair: Pair) -> None:
    for strange in (
        payload(OPEN, "soon", deviceID="one"),
        payload(OPEN, 99999999999999999, deviceID="two"),
        payload(OPEN, MIDNIGHT, deviceID="three").replace(b"three", b"\\ud800"),
        payload(OPEN, 0, deviceID="four").replace(b": 0}", b": 1e400}"),
        payload(OPEN, MIDNIGHT, deviceID=["five"]),
        b'{"type": 6, "data": 7}',
        payload(OPEN, MIDNIGHT, deviceID="eight"),
    ):
        assert receiver.post(pair, strange).status == 200
    # All but the third: an escaped lone surrogate is JSON, but DuckDB passes over such a line.
    hours = duckdb_rows(DEVICES, receiver.directory)
    assert hours == [["2025-11-23 00:00:00", 2, 2], [None, 3, 3]]
    assert duckdb_rows(OPENS, receiver.directory) == [[None, 5, 5]]
