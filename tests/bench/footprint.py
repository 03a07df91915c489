"""What the receiver takes apart from the rate: start, memory, idle time, disk."""

import statistics
import time
from pathlib import Path

from servers import STATUS, Server, running
from wire import post_bytes
from wrk import Pool, body, fire, held_open

DEDUPE_WINDOW = 65536
MAX_CONNECTIONS = 512
IDLE_CONNECTIONS = 100
IDLE_SECONDS = 10


def footprint(server: Server, directory: Path, pool: Pool) -> dict[str, tuple[float, float | None]]:
    """What is measured: the figure, and what it is to be at most."""
    starts, idle_sizes = [], []
    for number in range(10):
        with running(server, directory / f"start-{number}", pool.pairs) as started:
            starts.append(started.ready_seconds)
            idle_sizes.append(started.resident_mib())

    with (
        running(server, directory / "idle", pool.pairs) as idle,
        held_open(idle.port, [STATUS] * IDLE_CONNECTIONS),
    ):
        cpu, wake_ups = idle.cpu_seconds(), idle.wake_ups()
        time.sleep(IDLE_SECONDS)
        cpu, wake_ups = idle.cpu_seconds() - cpu, idle.wake_ups() - wake_ups

    home, taken = directory / "full", 0
    with running(server, home, pool.pairs) as full:
        while taken < DEDUPE_WINDOW + 1000:
            taken += fire(full, pool, taken, "64", 1).taken
        posts = [post_bytes(pool.pairs[0], body(number)) for number in range(MAX_CONNECTIONS)]
        with held_open(full.port, posts):
            full_mib = full.resident_mib()
    with running(server, home, pool.pairs) as again:
        start_full = again.ready_seconds
    log = b"".join(path.read_bytes() for path in (home / "signals").glob("*.jsonl"))

    idle_cpu = f"ms of CPU in {IDLE_SECONDS} idle seconds, {IDLE_CONNECTIONS} connections open"
    full_memory = f"MiB of memory, {MAX_CONNECTIONS} connections and a full dedupe window"
    return {
        "seconds from a cold start to the first answer": (statistics.median(starts), 0.2),
        "seconds with a full dedupe window to learn from the log": (start_full, None),
        "MiB of memory, idle": (statistics.median(idle_sizes), 40),
        full_memory: (full_mib, 80),
        idle_cpu: (cpu * 1000, 5),
        "times that a thread woke in these seconds": (wake_ups, None),
        "bytes in the log for a signal of 500 bytes": (len(log) / log.count(b"\n"), None),
    }
