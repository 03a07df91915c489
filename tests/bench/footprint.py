"""What the receiver takes apart from the rate: start, memory, idle time, disk, many instances."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from harness import Pair
from pool import FASTEST, Pool
from servers import Server, running
from wrk import Measured, check_log, close_idle, fire, open_idle

DEDUPE_WINDOW = 65536
MAX_CONNECTIONS = 512
IDLE_CONNECTIONS = 100
IDLE_SECONDS = 10
INSTANCES = 50
STATUS = b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@dataclass(frozen=True)
class Footprint:
    start_seconds: float
    start_full_seconds: float  # with a full window to learn from the log
    idle_mib: float
    full_mib: float
    idle_cpu_ms: float
    idle_wake_ups: int
    line_bytes: float  # in the log, for a signal of 500 bytes


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
        close_idle(connections)

    home, taken = directory / "full", 0
    with running(server, home, [pair]) as full:
        while taken < DEDUPE_WINDOW + 1000:
            taken += fire(full, pool, taken, "64", 1).taken
        connections = open_idle(full.port, pool.requests(taken, MAX_CONNECTIONS))
        time.sleep(1)
        full_mib = full.resident_mib()
        close_idle(connections)
    with running(server, home, [pair]) as again:
        start_full = again.ready_seconds
    log = b"".join(path.read_bytes() for path in (home / "signals").glob("*.jsonl"))

    return Footprint(
        start_seconds=statistics.median(starts),
        start_full_seconds=start_full,
        idle_mib=statistics.median(idle_sizes),
        full_mib=full_mib,
        idle_cpu_ms=cpu * 1000,
        idle_wake_ups=wake_ups,
        line_bytes=len(log) / log.count(b"\n"),
    )


def instances(
    server: Server, directory: Path, pool: Pool, pair: Pair, *, rounds: int, seconds: int
) -> dict[int, list[Measured]]:
    """The rate at 16 connections with one instance, and with 50 whose signals come in turn."""
    directory.mkdir()
    pairs = [pair, *(Pair(f"bench-{number}") for number in range(2, INSTANCES + 1))]
    pools = {1: pool, INSTANCES: Pool.make(directory / "pool", pairs, FASTEST * (seconds + 1))}
    found: dict[int, list[Measured]] = {count: [] for count in pools}
    for number in range(rounds):
        for count in list(pools)[:: -1 if number % 2 else 1]:
            home = directory / f"{count}-{number}"
            with running(server, home, pairs[:count]) as started:
                warm_up = fire(started, pools[count], 0, "16", 1)
                measured = fire(started, pools[count], warm_up.taken, "16", seconds)
            check_log(home / "signals", [warm_up, measured])
            found[count].append(measured)
    return found
