"""The README's queries, by DuckDB, over the log of a real receiver."""

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
from engines import HERE, python_with, readme_command, readme_examples, replaced
from harness import Pair, Receiver, payload_id

OPEN = "re.notifica.event.notification.Open"
HOUR = 3_600_000
MIDNIGHT = 1_763_856_000_000

# The README's command shows a table; rows can be compared.
ROWS = "import json; print(json.dumps(duckdb.sql(sys.stdin.read()).fetchall(), default=str))"


def query(name: str, directory: Path) -> list[list[Any]]:
    command = replaced(
        readme_command("/opt/duckdb/bin/python"),
        {
            "/opt/duckdb/bin/python": shlex.quote(python_with("duckdb")),
            "duckdb.sql(sys.stdin.read()).show(max_rows=1000)": ROWS,
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
    """A receiver with a few closed segments, and the distinct signals that it was sent."""
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
    assert len(receiver.segments(pair.name)) > 3
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


def test_set_aside_messages_are_counted_by_reason(receiver: Receiver, pair: Pair) -> None:
    bodies = [b"not JSON", b"nor this", b'["a list"]', b"not JSON"]
    for body in bodies:
        assert receiver.post(pair, body).json["message"].startswith("set aside: ")
    assert receiver.post(pair, payload(OPEN, MIDNIGHT)).status == 200
    expected: dict[str, int] = defaultdict(int)
    for line in receiver.lines(f"{pair.name}.rejected"):
        expected[line["reason"]] += 1
    rows = query("set_aside_by_reason", receiver.directory)
    assert {row[1]: row[2] for row in rows} == expected
    assert sum(expected.values()) == 3


def test_a_signal_stored_by_two_receivers_counts_once(
    start: Callable[..., Receiver], pair: Pair, tmp_path: Path
) -> None:
    both = [
        start(directory=tmp_path / name) for name in ("a", "b") if not (tmp_path / name).mkdir()
    ]
    for receiver in both:
        assert receiver.post(pair, payload(OPEN, MIDNIGHT, notification="n")).status == 200
    (tmp_path / "signals").mkdir()
    for receiver in both:
        name = f"{receiver.directory.name}.jsonl"
        (tmp_path / "signals" / name).write_bytes(receiver.raw(pair.name))
    assert query("opens_per_notification", tmp_path) == [["n", 1, 0]]


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
    assert receiver.ids(pair.name) == [payload_id(each) for each in strange]
    # All but the third: an escaped lone surrogate is JSON, but DuckDB passes over such a line.
    hours = query("active_devices_per_hour", receiver.directory)
    assert hours == [["2025-11-23 00:00:00", 2, 2], [None, 3, 3]]
    assert query("opens_per_notification", receiver.directory) == [[None, 5, 5]]


def test_the_readmes_queries_are_these() -> None:
    files = {path.read_text() for path in HERE.glob("*.sql")}
    assert {each for each in readme_examples("sql") if "/srv/" not in each} == files
    assert len(files) == 3


def test_the_readmes_configurations_are_what_these_tests_run() -> None:
    for language, name in (("haproxy", "haproxy.cfg"), ("rsyslog", "rsyslog.conf")):
        [example] = readme_examples(language)
        assert example in (HERE / name).read_text()
