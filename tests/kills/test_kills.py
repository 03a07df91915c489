"""What was acknowledged is in the log exactly once, whatever ends the process.

Run: .venv/bin/pytest -s tests/kills
Or with a thousand kills: LIVEAPI_FULL=1. LIVEAPI_TEST_SEED picks the moments.
"""

import os
import random
import signal
import time
from functools import partial

from harness import Pair, Receiver, Start, free_ports
from load import Load, balance
from tools import full

KILLS, SECONDS = full(1000, 120), full(3600, 60)  # as many as can be had in this time
SEED = int(os.environ.get("LIVEAPI_TEST_SEED", str(random.randrange(1 << 32))))


def log_since(receiver: Receiver, name: str) -> bytes:
    """The bytes of this segment and all after it; of the rest the balance sees to the end."""
    return b"".join(path.read_bytes() for path in receiver.segments() if path.name >= name)


def test_kills_and_stops_at_random_moments_lose_double_and_tear_nothing(start: Start) -> None:
    """And every line that a reader saw before a kill is there after it.

    One time in six it is told to end instead; one in six it is stopped for a moment before; and one
    in six the next start is killed as well, before it is through.
    """
    chance, made, began = random.Random(SEED), 0, time.monotonic()
    print(f"seed {SEED}", flush=True)
    pairs = tuple(Pair(name) for name in ("one", "two", "three"))
    (port,) = free_ports(1)
    begin = partial(start, "--segment-bytes", "20000", pairs=pairs, port=port)
    receiver = begin()
    with Load(pairs, port) as load:
        while made < KILLS and time.monotonic() - began < SECONDS:
            load.reach(1)
            time.sleep(chance.uniform(0, 0.2))
            if made % 6 == 4:
                receiver.signal(signal.SIGSTOP)
                time.sleep(0.3)
                receiver.signal(signal.SIGCONT)
                load.reach(1)
            if made % 6 == 2:
                assert receiver.stop() == 0
            receiver.kill()
            first = ["", "", *(path.name for path in receiver.segments())][-3]
            seen = log_since(receiver, first)
            if made % 6 == 5:
                hasty = begin(ready=False)
                time.sleep(chance.uniform(0.05, 0.35))
                hasty.kill()
            receiver = begin()
            whole = seen[: seen.rfind(b"\n") + 1]
            receiver.pause()  # else it could close a segment meanwhile
            found = log_since(receiver, first)
            receiver.signal(signal.SIGCONT)
            assert found.startswith(whole), "a whole line has gone"
            made += 1
        load.reach(1)
    assert receiver.stop() == 0
    counts = balance(load, receiver.signals)
    print(f"{made} kills in {time.monotonic() - began:.0f} s, {counts}")
    assert made > 10, "fewer show nothing"
    assert counts.stored > 5 * made
    assert counts.cut_off > 0, "no kill hit anything"
    assert counts.segments > 2, "no closing was near"
