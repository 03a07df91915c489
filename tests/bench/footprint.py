"""What the receiver takes apart from the rate: start, memory, idle time, and how it grows."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from load import Measured, Scenario, check_log, fire, open_idle, still_open
from pool import FASTEST, Pair, Pool, write_old_log
from servers import Server, running

DEDUPE_WINDOW = 65536
MAX_CONNECTIONS = 512
IDLE_CONNECTIONS = 100
IDLE_SECONDS = 10
OLD_LINES = 200_000  # some 130 MB: below the size at which a segment is closed
STATUS = b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@dataclass(frozen=True)
class Footprint:
    start_seconds: float
    idle_mib: float
    full_mib: float
    idle_cpu_ms: float
    idle_wake_ups: int
    still_open: int  # of the idle connections, after the measuring


def footprint(server: Server, directory: Path, pair: Pair, pool: Pool) -> Footprint:
    starts, idle_sizes = [], []
    for number in range(10):
        with running(server, directory / f"start-{number}", [pair]) as started:
            starts.append(started.ready_seconds)
            idle_sizes.append(started.resident_mib())

    with running(server, directory / "idle", [pair]) as idle:
        connections = open_idle(idle.port, [STATUS] * IDLE_CONNECTIONS)
        time.sleep(1)
        cpu, wake_ups = idle.cpu_seconds(), idle.wake_ups()
        time.sleep(IDLE_SECONDS)
        cpu, wake_ups = idle.cpu_seconds() - cpu, idle.wake_ups() - wake_ups
        kept = still_open(connections)
        for connection in connections:
            connection.close()

    with running(server, directory / "full", [pair]) as full:
        taken = 0
        while taken < DEDUPE_WINDOW + 1000:
            taken += fire(full, pool, taken, Scenario(64), 1).taken
        requests = pool.requests(taken, MAX_CONNECTIONS)
        connections = open_idle(full.port, requests)
        time.sleep(1)
        full_mib = full.resident_mib()
        kept += still_open(connections)
        for connection in connections:
            connection.close()

    return Footprint(
        start_seconds=statistics.median(starts),
        idle_mib=statistics.median(idle_sizes),
        full_mib=full_mib,
        idle_cpu_ms=cpu * 1000,
        idle_wake_ups=wake_ups,
        still_open=kept,
    )


@dataclass(frozen=True)
class Case:
    """A state of the receiver whose rate is compared with that of a fresh one."""

    title: str
    instances: int = 1
    spread: bool = False  # signals for all the instances in turn, or for the first alone
    old_lines: int = 0


CASES = (
    Case("one instance, empty log"),
    Case(f"one instance, {OLD_LINES:,} lines in the log, window full", old_lines=OLD_LINES),
    Case("10 instances, signals for one", instances=10),
    Case("50 instances, signals for one", instances=50),
    Case("10 instances, signals for all in turn", instances=10, spread=True),
    Case("50 instances, signals for all in turn", instances=50, spread=True),
)


def growth(
    server: Server, directory: Path, pool: Pool, pairs: list[Pair], *, rounds: int, seconds: int
) -> list[dict[str, object]]:
    """The rate at 16 connections in each case, the cases taken in alternating order."""
    pools = {1: pool}
    for case in CASES:
        if case.spread:
            path = directory / f"pool-{case.instances}"
            path.parent.mkdir(parents=True, exist_ok=True)
            count = FASTEST * seconds
            pools[case.instances] = Pool.make(path, pairs[: case.instances], count)
    found: dict[Case, list[Measured]] = {case: [] for case in CASES}
    starts: dict[Case, list[float]] = {case: [] for case in CASES}
    for number in range(rounds):
        for index, case in list(enumerate(CASES))[:: -1 if number % 2 else 1]:
            home = directory / f"case-{index}-{number}"
            if case.old_lines:
                write_old_log(home / "signals" / "bench.jsonl", pairs[0].name, case.old_lines)
            with running(server, home, pairs[: case.instances]) as started:
                source = pools[case.instances if case.spread else 1]
                measured = fire(started, source, 0, Scenario(16), seconds)
            check_log(home / "signals", [measured], case.old_lines)
            found[case].append(measured)
            starts[case].append(started.ready_seconds)
    return [
        {
            **asdict(case),
            "rates": [each.rate for each in found[case]],
            "ready_seconds": statistics.median(starts[case]),
        }
        for case in CASES
    ]
