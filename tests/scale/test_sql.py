"""The queries, by DuckDB, over the log of a real receiver. How to run it: README.md here."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import CHECK, HERE, HOUR, MIDNIGHT, ROWS, TABLE, documented_command, python_with
from harness import Pair, Receiver, payload_id, signal_payload

OPEN = "re.notifica.event.notification.Open"


def query(name: str, directory: Path) -> list[list[Any]]:
    interpreter = "/opt/duckdb/bin/python"
    changes = {
        interpreter: f"'{python_with('duckdb')}'",
        TABLE: ROWS,
        "tests/scale/opens_per_notification.sql": f"'{HERE}/{name}.sql'",
    }
    done = subprocess.run(
        documented_command(interpreter, changes), shell=True, stdout=subprocess.PIPE,
        cwd=directory, timeout=60, check=True,
    )  # fmt: skip
    rows: list[list[Any]] = json.loads(done.stdout)
    return rows


def payload(kind: str, at: Any, **data: Any) -> bytes:
    signal = {"service": "My Service", "type": kind, "data": data, "timestamp": at}
    return json.dumps(signal).encode()


def test_opens_per_notification_and_active_devices_per_hour_count_each_signal_once(
    start: Callable[..., Receiver], pair: Pair
) -> None:
    receiver = start("--segment-bytes", "20000")
    connection = receiver.connect()
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
        assert receiver.post(pair, sent, connection=connection).status == 200
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
    rows = query("opens_per_notification", receiver.directory)
    assert rows == sorted(by_name, key=lambda row: (-row[1], row[0]))
    assert query("active_devices_per_hour", receiver.directory) == [
        [f"2025-11-23 {hour:02}:00:00", len(set(devices)), len(devices)]
        for hour, devices in sorted(hours.items())
    ]


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
